"""Which processor cores are whose: those that compute for a job, and those that the services share. Linux.

An interrupt takes its core from whatever computes there, and the services write to the disk just while a kernel is on
its way. Seen once, in runs one after the other: training on the core that serves the disk, its median step took a tenth
longer then; on the other core, one to two percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_INTERRUPTS: Final = Path("/proc/interrupts")


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Which processor cores are whose; both empty where there are too few to divide."""

    job: frozenset[int]
    services: frozenset[int]


def place(cores: frozenset[int], threads: int, interrupts: Mapping[int, int]) -> Placement:
    """Give the job ``threads`` of ``cores`` and the services the rest; nothing is divided if none were left.

    The job's are neighbors, as neighbors share their caches: those that devices have interrupted least, by
    ``interrupts`` (see :func:`device_interrupts`), and of several such the last.
    """
    if threads >= len(cores):
        return Placement(frozenset(), frozenset())
    ordered = sorted(cores)
    neighbors = [ordered[first : first + threads] for first in range(len(ordered) - threads, -1, -1)]
    own = frozenset(min(neighbors, key=lambda some: sum(interrupts.get(core, 0) for core in some)))
    return Placement(own, cores - own)


def device_interrupts(path: Path = _INTERRUPTS) -> dict[int, int]:
    """How often devices have interrupted each core since the machine started; empty where the system does not say.

    Those of the processors themselves (timers, calls between cores), which are named and not numbered, do not count.
    See proc(5).
    """
    try:
        header, *lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except (OSError, ValueError):
        return {}
    cores = [int(name.removeprefix("CPU")) for name in header.split()]
    found = dict.fromkeys(cores, 0)
    for line in lines:
        label, _, counts = line.partition(":")
        if label.strip().isdigit():
            for core, count in zip(cores, counts.split(), strict=False):
                found[core] += int(count)
    return found
