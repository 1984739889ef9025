"""What control calls cost training: ``python -m tests.benchmarks.control_load --out FILE [--pairs N] [--window S]``.

One real run of `train.py` trains all the time. A client process calls the gateways of Kasmina and Tolaria, 200 times a
second in one window and not at all in the next, the order of the two changing by turns (ABBA). It runs where the
services run, not on the training thread's core: which core a caller uses is not the gateways' doing. The step times
come from the training process itself (``telemetry.step_times``) and are matched to the windows by the wall clock. Every
twentieth call is one that goes all the way into the training loop (ResumeRun of a run that is not paused).
Limits: the median step time changes by less than 2 %, the 99th percentile by less than 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc.aio

import services  # noqa: F401 - puts the generated contracts on sys.path
from esper.kasmina.v1 import kasmina_service_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.tolaria.v1 import training_service_pb2
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from services.chassis.ids import new_id
from tests.benchmarks import measure
from tests.infrastructure.processes import ROOT

RATE: Final = 200
LIMITS: Final = {"median_percent": 2.0, "p99_percent": 10.0}
#: Cut off from the beginning of each window, seconds: what the window before it left behind.
_GUARD: Final = 0.1
_START_SECONDS: Final = 2.0
Call = Callable[[], Awaitable[object]]


async def load(
    kasmina: str, tolaria: str, run: str, cores: Sequence[int], windows: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Call at RATE within ``windows`` (wall clock); returns counts and latencies. Runs in the client process."""
    os.sched_setaffinity(0, cores)
    latencies: list[float] = []
    errors: dict[str, int] = {}
    name = f"runs/{run}"
    async with grpc.aio.insecure_channel(kasmina) as first, grpc.aio.insecure_channel(tolaria) as second:
        seeds, training = KasminaServiceStub(first), TrainingServiceStub(second)
        reads: list[Call] = [
            lambda: seeds.GetTopology(kasmina_service_pb2.GetTopologyRequest(run=name), timeout=5.0),
            lambda: training.GetRun(training_service_pb2.GetRunRequest(name=name), timeout=5.0),
            lambda: seeds.ListSeeds(kasmina_service_pb2.ListSeedsRequest(run=name), timeout=5.0),
            lambda: training.ListRuns(training_service_pb2.ListRunsRequest(), timeout=5.0),
        ]

        def through() -> Awaitable[object]:
            request = training_service_pb2.ResumeRunRequest(name=name, request_id=new_id())
            return training.ResumeRun(request, timeout=5.0)

        async def one(number: int) -> None:
            began = time.perf_counter()
            try:
                await (through() if number % 20 == 19 else reads[number % len(reads)]())
            except grpc.aio.AioRpcError as error:
                errors[error.code().name] = errors.get(error.code().name, 0) + 1
            latencies.append(time.perf_counter() - began)

        async with asyncio.TaskGroup() as calls:
            for begin, end in windows:
                for number in range(int((end - begin) * RATE)):
                    await asyncio.sleep(max(0.0, begin + number / RATE - time.time()))
                    calls.create_task(one(number))
    return {
        "calls": len(latencies),
        "errors": errors,
        "p50_ms": 1e3 * measure.median(latencies),
        "p99_ms": 1e3 * measure.p99(latencies),
    }


def plan(begin: float, pairs: int, window: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """(control window, loaded window) of each pair, in ABBA order, from ``begin`` on."""
    found = []
    for pair in range(pairs):
        first = begin + 2 * pair * window
        halves = (first, first + window), (first + window, first + 2 * window)
        found.append(halves if pair % 2 == 0 else halves[::-1])
    return found


def run_benchmark(pairs: int, window: float) -> dict[str, Any]:
    """The whole measurement."""
    with tempfile.TemporaryDirectory(prefix="esper-control-load-") as folder, measure.endless_run(Path(folder)) as run:
        before = measure.environment()
        schedule = plan(time.time() + _START_SECONDS, pairs, window)
        arguments = {
            "kasmina": run.address("kasmina"),
            "tolaria": run.address("tolaria"),
            "run": run.folder.name,
            "cores": run.process("kasmina").cpu_affinity(),
            "windows": [loaded for _, loaded in schedule],
        }
        # -m again, as another process: the client's own work must not be timed as ours.
        client = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.control_load", "--client", json.dumps(arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            timeout=60 + 4 * pairs * window,
        )
        last = max(end for pair in schedule for _, end in pair)
        run.until(lambda: measure.step_times(run.folder)[-1]["began"] > last, "the last window's steps", timeout=120.0)
        steps = measure.step_times(run.folder)
    calls = json.loads(client.stdout)

    def between(span: tuple[float, float], key: str) -> list[float]:
        return [step[key] for step in steps if span[0] + _GUARD <= step["began"] < span[1]]

    def compare(key: str) -> dict[str, Any]:
        windows = [(between(control, key), between(loaded, key)) for control, loaded in schedule]
        return {
            "median": measure.change_percent(windows, measure.median),
            "p99": measure.change_percent(windows, measure.p99),
        }

    # ABBA puts the controls of two pairs side by side: compared with each other they show what noise alone does.
    quiet = [between(control, "seconds") for control, _ in schedule]
    noise = [(quiet[index], quiet[index + 1]) for index in range(0, len(quiet) - 1, 2)]
    wall = compare("seconds")
    return {
        "method": __doc__,
        "limits": LIMITS,
        "rate_asked": RATE,
        "rate_reached": calls["calls"] / (pairs * window),
        "calls": calls,
        "window_seconds": window,
        "steps": {"control": sum(map(len, quiet)), "all": len(steps)},
        "control_step_ms": {
            "median": 1e3 * measure.median([value for values in quiet for value in values]),
            "p99": 1e3 * measure.p99([value for values in quiet for value in values]),
        },
        "step_time": wall,
        "step_cpu_time": compare("cpu_seconds"),
        "noise": {
            "median": measure.change_percent(noise, measure.median),
            "p99": measure.change_percent(noise, measure.p99),
        },
        # Paired, window by window. Null where the interval holds the limit: the machine was too restless, or there were
        # too few pairs. The pooled tail beside it is made by the few worst windows of the whole run: see its noise.
        "holds": {key: measure.below(LIMITS[f"{key}_percent"], wall[key]["interval"]) for key in ("median", "p99")},
        "environment": {"before": before, "after": measure.environment()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--client"]:
        sys.stdout.write(json.dumps(asyncio.run(load(**json.loads(words[1])))))
        return 0
    parser: argparse.ArgumentParser = measure.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of windows, two at least")
    parser.add_argument("--window", type=float, default=1.0, help="length of a window, seconds")
    arguments = parser.parse_args(words)
    result = run_benchmark(max(2, arguments.pairs), arguments.window)

    def row(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        below, above = found["pooled_interval"]
        return (
            f"{found['percent']:+.2f} % [{low:+.2f}, {high:+.2f}]  pooled {found['pooled_percent']:+.2f} % "
            f"[{below:+.2f}, {above:+.2f}]"
        )

    rows = [("calls per second", f"{result['rate_reached']:.0f}, errors {result['calls']['errors'] or 'none'}")]
    for name in ("step_time", "step_cpu_time", "noise"):
        rows += [(f"{name} {key}", row(result[name][key])) for key in ("median", "p99")]
    measure.publish(arguments.out, result, [*rows, ("holds", json.dumps(result["holds"]))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
