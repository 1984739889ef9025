"""What the benchmarks share: pairs, intervals, the machine they ran on, real runs with step times."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from services.chassis.files import write_atomically
from services.tolaria.step_times import STEP_TIMES_FILE
from tests.infrastructure.runs import Run, json_lines, running

CONFIDENCE: Final = 0.95
_DRAWS: Final = 2000
#: The quick start without an end: whoever measures stops it. Growth is attached, its window is never reached.
ENDLESS: Final = (
    "training.epochs=1000000",
    "training.checkpoint_every_epochs=1000000",
    "growth.window=[0.5,0.6]",
    "compare=[]",
    "telemetry.step_times=true",
)


def environment() -> dict[str, Any]:
    """The machine, as of now: ``load_average`` is of the last 1, 5 and 15 minutes."""
    return {
        "processors": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": metadata.version("torch"),
        "grpcio": metadata.version("grpcio"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile (0..1) by linear interpolation; needs one value."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def change_percent(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    statistic: Callable[[Sequence[float]], float],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """By how much ``statistic`` of the treated windows' values exceeds that of the controls', in percent.

    ``pairs`` holds (control values, treated values) of neighboring windows. Two estimates with 95 % bootstrap
    intervals over whole pairs: ``percent`` is the median over the pairs of each pair's own change, which slow drift of
    the machine does not touch; ``pooled_percent`` compares the statistic of all values, for tails that one window is
    too short for.
    """
    own = [100.0 * (statistic(treated) / statistic(control) - 1.0) for control, treated in pairs]

    def pooled(chosen: Sequence[int]) -> float:
        control = [value for index in chosen for value in pairs[index][0]]
        treated = [value for index in chosen for value in pairs[index][1]]
        return 100.0 * (statistic(treated) / statistic(control) - 1.0)

    generator = random.Random(seed)
    samples = [[generator.randrange(len(pairs)) for _ in pairs] for _ in range(_DRAWS)]
    return {
        "percent": statistics.median(own),
        "interval": _interval([statistics.median(own[index] for index in chosen) for chosen in samples]),
        "pooled_percent": pooled(range(len(pairs))),
        # Each costs a sort of all values: fewer draws.
        "pooled_interval": _interval([pooled(chosen) for chosen in samples[:200]]),
        "pairs": len(pairs),
        "confidence": CONFIDENCE,
    }


def nested_median(groups: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, list[float]]:
    """The median of all values, with its 95 % bootstrap interval over groups and the values within them.

    For groups that differ beyond what their values do (Davison and Hinkley, Bootstrap Methods, section 3.8).
    """
    generator = random.Random(seed)
    draws = [
        statistics.median(
            value
            for group in generator.choices(groups, k=len(groups))
            for value in generator.choices(group, k=len(group))
        )
        for _ in range(_DRAWS)
    ]
    return statistics.median(value for group in groups for value in group), _interval(draws)


def below(limit: float, interval: Sequence[float]) -> bool | None:
    """Whether the whole ``interval`` is below ``limit``; False if all of it is above, None if the noise decides."""
    low, high = interval
    return True if high < limit else False if low >= limit else None


def _interval(draws: Sequence[float]) -> list[float]:
    outside = (1.0 - CONFIDENCE) / 2
    return [percentile(draws, outside), percentile(draws, 1.0 - outside)]


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return percentile(values, 0.99)


@contextlib.contextmanager
def endless_run(
    output: Path,
    *overrides: str,
    config: str = "configs/quickstart.yaml",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """A real run (`train.py`, its services and its training process) that trains until the block ends."""
    with running(output, *ENDLESS, *overrides, config=config, environment=environment) as run:
        run.until(lambda: run.lines(STEP_TIMES_FILE), "the first epoch's step times")
        try:
            yield run
        finally:
            # In good order: whoever holds the folder wants to delete it.
            run.signal(signal.SIGTERM)
            run.wait()


def step_times(run_folder: Path, arm: str = "grown") -> list[dict[str, Any]]:
    """The steps of one arm, as ``services.tolaria.step_times`` describes them."""
    return [line for line in json_lines(run_folder / STEP_TIMES_FILE) if line["arm"] == arm]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with --out."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return made


def publish(out: Path, result: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    """Write the JSON, print a short table."""
    write_atomically(out, json.dumps(result, indent=2) + "\n")
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in rows))
