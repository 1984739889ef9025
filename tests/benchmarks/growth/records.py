"""Finished runs: one small JSON file each, under a folder that says by which protocol and which code. Torch-free.

``docs/benchmarks/runs/<experiment>/<protocol>/<code>/<entry>.<arm>.<seed>.json``; ``<protocol>`` is the protocol's hash
and ``<code>`` that of the files that can change what a run computes (:data:`CODE`), when the folder was made, which for
final runs is when the protocol was fixed. Code that changed since may go on in the same folder if it still computes the
same: a fixed set of tiny runs, one for each kind of arm and host (:mod:`tests.benchmarks.growth.canary`), is repeated.
On one machine they come out bit for bit. Elsewhere batches and widths have to be equal, and losses may differ as far as
processors and layouts of memory round differently (:data:`TOLERANCES`); a different draw, order, rule or schedule is
far outside. What only shows in longer runs than those is not seen: such a change wants a new protocol. Any other code
is refused for final runs, and they go on in a checkout of theirs; tuning begins anew with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from services.chassis.files import write_atomically
from tests.benchmarks.growth.protocol import TRAINED, Protocol
from tests.infrastructure.processes import ROOT

RUNS: Final = ROOT / "docs" / "benchmarks" / "runs"
#: What can change a trained result, as globs from the repository's root.
CODE: Final = (
    "services/kasmina/*.py",
    "services/blueprints/**/*.py",
    "services/tamiyo/policies/*.py",
    "services/tamiyo/observation.py",
    "services/tolaria/*.py",
    "services/tolaria/data/*.py",
    "tests/benchmarks/growth/arms.py",
    "tests/benchmarks/growth/hosts.py",
    "tests/benchmarks/growth/training.py",
)
#: Relative, of the loss of the first epoch and of the later ones: what rounding does grows from step to step.
#: (Measured for another layout of memory: 2e-4 and 4e-3.)
TOLERANCES: Final = (1e-3, 1e-2)
_INDEX: Final = "folder.json"
_SHORT: Final = 12
#: Losses and widths by arm.
Figures = Mapping[str, Mapping[str, Any]]


class OtherCodeError(RuntimeError):
    """Final runs with code that computes something else than the code that the protocol was fixed with."""


class Records:
    """The finished runs of one protocol by one code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def index(self) -> Path:
        """Which code made them, and what it computes."""
        return self.folder / _INDEX

    def path(self, name: str) -> Path:
        """Where the run ``name`` is kept, or will be."""
        return self.folder / f"{name}.json"

    def weights(self, name: str) -> Path:
        """Of a trained host, which later runs begin with: part of the repository like its record."""
        return self.folder / f"{name}.safetensors"

    def finished(self) -> dict[str, dict[str, Any]]:
        """All that is there, by name; a trained host without its weights is not.

        A file that is no JSON is a damaged checkout and raises ValueError.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            name = path.name.removesuffix(".json")
            lost = name.startswith(f"{TRAINED}.") and not self.weights(name).exists()
            if path.name != _INDEX and not lost:
                try:
                    found[name] = json.loads(path.read_bytes())
                except ValueError as error:
                    raise ValueError(f"{path} is damaged: delete it, and its run is made again ({error})") from error
        return found

    def keep(self, name: str, record: Mapping[str, Any]) -> Path:
        """Write one finished run, whole or not at all."""
        path = self.path(name)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        return path


def code_hash(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of :data:`CODE`, hex."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        found.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def open_records(
    protocol: Protocol,
    *,
    figures: Callable[[], Figures],
    runs: Path = RUNS,
    tune: bool = False,
    create: bool = True,
    root: Path = ROOT,
) -> Records:
    """The folder to go on in: the one that this code made or computes the same as, else a new one.

    ``figures`` repeats the tiny runs; it is asked only when the code is not known yet. Raises OtherCodeError if
    ``create`` is false and there is no such folder.
    """
    code = code_hash(root)
    within = runs / protocol.name / (f"tuning-{protocol.tuning_hash[:_SHORT]}" if tune else protocol.hash[:_SHORT])
    folders = {path.parent: json.loads(path.read_bytes()) for path in sorted(within.glob(f"*/{_INDEX}"))}
    for folder, index in folders.items():
        if code in index["codes"]:
            return Records(folder)
    now = {arm: dict(found) for arm, found in figures().items()}
    for folder, index in folders.items():
        if same_figures(index["figures"], now):
            index["codes"].append(code)
            write_atomically(folder / _INDEX, json.dumps(index, indent=1) + "\n")
            return Records(folder)
    if not create:
        raise OtherCodeError(
            f"this code ({code[:_SHORT]}) computes something else than the code that the protocol "
            f"{protocol.hash[:_SHORT]} was fixed with ({', '.join(folder.name for folder in folders) or 'none'}): "
            "go on in a checkout of that code (the newest commit of its runs has it), write the JSON of what is there "
            "with --minutes 0, or fix the protocol anew with --write-protocol"
        )
    folder = within / code[:_SHORT]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _INDEX, json.dumps({"codes": [code], "figures": now}, indent=1) + "\n")
    return Records(folder)


def best_records(protocol: Protocol, *, runs: Path = RUNS) -> Records:
    """The folder of the protocol with the most finished runs, to be read and not to be added to, whatever the code.

    Raises OtherCodeError if there is none.
    """
    within = runs / protocol.name / protocol.hash[:_SHORT]
    folders = [Records(path.parent) for path in sorted(within.glob(f"*/{_INDEX}"))]
    if not folders:
        raise OtherCodeError(f"no run of the protocol {protocol.hash[:_SHORT]} was begun: see --write-protocol")
    return max(folders, key=lambda records: len(records.finished()))


def same_figures(kept: Figures, now: Figures) -> bool:
    """Whether the tiny runs that a folder keeps came out alike ``now``; later code may know more of them."""
    return kept.keys() <= now.keys() and all(
        kept[name]["widths"] == now[name]["widths"]
        and kept[name]["batches"] == now[name]["batches"]
        and _alike(kept[name]["losses"], now[name]["losses"])
        for name in kept
    )


def _alike(kept: Sequence[float], now: Sequence[float]) -> bool:
    first, later = TOLERANCES
    return len(kept) == len(now) and all(
        math.isclose(left, right, rel_tol=later if epoch else first)
        for epoch, (left, right) in enumerate(zip(kept, now, strict=True))
    )
