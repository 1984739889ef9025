"""What control calls cost training: ``python -m tests.benchmarks.control_load --out FILE [--turns N] [--window S]``.

One real run of `train.py` trains all the time. A client process calls the gateways of Kasmina and Tolaria, 200 times a
second in one window and not at all in another, the order changing from turn to turn. It runs where the services run,
not on the training thread's core: which core a caller uses is not the gateways' doing. The step times come from the
training process itself (``telemetry.step_times``) and are matched to the windows by the wall clock. Every twentieth
call is one that goes all the way into the training loop (ResumeRun of a run that is not paused).
Limits: the median step time changes by less than 2 %, the 99th percentile by less than 10 %.

In a third window of each turn it makes as many calls to a server of nobody's that runs where the services run
(``other_server``): what the machine makes of any such work beside training. ``beyond_other_server`` is what calls to
ours cost more than those. ``noise`` compares windows without calls with each other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

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
#: As the services.
_NICE: Final = 10
_AGAIN: Final = (sys.executable, "-m", "tests.benchmarks.control_load")
#: Which window of a turn is which, and the places that they take by turns.
_QUIET, _OURS, _OTHERS = range(3)
_ORDERS: Final = ((2, 0, 1), (0, 1, 2), (2, 1, 0), (0, 2, 1))
Call = Callable[[], Awaitable[object]]
Span = tuple[float, float]


async def load(
    *,
    kasmina: str,
    tolaria: str,
    other: str,
    run: str,
    cores: Sequence[int],
    windows: Sequence[tuple[float, float]],
    other_windows: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """Call at RATE within the windows (wall clock); returns counts and latencies. Runs in the client process."""
    os.sched_setaffinity(0, cores)
    latencies: list[float] = []
    errors: dict[str, int] = {}
    name = f"runs/{run}"
    async with (
        grpc.aio.insecure_channel(kasmina) as first,
        grpc.aio.insecure_channel(tolaria) as second,
        grpc.aio.insecure_channel(other) as third,
    ):
        seeds, training, stranger = KasminaServiceStub(first), TrainingServiceStub(second), HealthStub(third)
        reads: list[Call] = [
            lambda: seeds.GetTopology(kasmina_service_pb2.GetTopologyRequest(run=name), timeout=5.0),
            lambda: training.GetRun(training_service_pb2.GetRunRequest(name=name), timeout=5.0),
            lambda: seeds.ListSeeds(kasmina_service_pb2.ListSeedsRequest(run=name), timeout=5.0),
            lambda: training.ListRuns(training_service_pb2.ListRunsRequest(), timeout=5.0),
        ]

        def through() -> Awaitable[object]:
            request = training_service_pb2.ResumeRunRequest(name=name, request_id=new_id())
            return training.ResumeRun(request, timeout=5.0)

        async def ours(number: int) -> None:
            began = time.perf_counter()
            try:
                await (through() if number % 20 == 19 else reads[number % len(reads)]())
            except grpc.aio.AioRpcError as error:
                errors[error.code().name] = errors.get(error.code().name, 0) + 1
            latencies.append(time.perf_counter() - began)

        async def theirs(_: int) -> None:
            await stranger.Check(health_pb2.HealthCheckRequest(), timeout=5.0)

        plans = sorted([*((window, ours) for window in windows), *((window, theirs) for window in other_windows)])
        async with asyncio.TaskGroup() as calls:
            for (begin, end), one in plans:
                for number in range(int((end - begin) * RATE)):
                    await asyncio.sleep(max(0.0, begin + number / RATE - time.time()))
                    calls.create_task(one(number))
    return {
        "calls": len(latencies),
        "errors": errors,
        "p50_ms": 1e3 * measure.median(latencies),
        "p99_ms": 1e3 * measure.p99(latencies),
    }


async def serve_other(cores: Sequence[int]) -> None:
    """A server that has nothing to do with training, placed as ours are; says its address in a line."""
    os.sched_setaffinity(0, cores)
    os.nice(_NICE)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


@contextlib.contextmanager
def other_server(cores: Sequence[int]) -> Iterator[str]:
    """Address of such a server, in a process of its own."""
    command = [*_AGAIN, "--other-server", json.dumps(cores)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def plan(begin: float, turns: int, window: float) -> list[tuple[Span, Span, Span]]:
    """(without calls, calls to ours, calls to the other server) of each turn, from ``begin`` on.

    Each is as often first and last, and windows without calls of two turns lie side by side: compared with each other
    they show what noise alone does.
    """
    found = []
    for turn in range(turns):
        spans = [(begin + (3 * turn + place) * window, begin + (3 * turn + place + 1) * window) for place in range(3)]
        quiet, ours, others = _ORDERS[turn % len(_ORDERS)]
        found.append((spans[quiet], spans[ours], spans[others]))
    return found


def run_benchmark(turns: int, window: float) -> dict[str, Any]:
    """The whole measurement."""
    with (
        tempfile.TemporaryDirectory(prefix="esper-control-load-") as folder,
        measure.endless_run(Path(folder)) as run,
        other_server(cores := run.process("kasmina").cpu_affinity()) as other,
    ):
        before = measure.environment()
        schedule = plan(time.time() + _START_SECONDS, turns, window)
        arguments = {
            "kasmina": run.address("kasmina"),
            "tolaria": run.address("tolaria"),
            "other": other,
            "run": run.folder.name,
            "cores": cores,
            "windows": [ours for _, ours, _ in schedule],
            "other_windows": [others for _, _, others in schedule],
        }
        # -m again, as another process: the client's own work must not be timed as ours.
        client = subprocess.run(
            [*_AGAIN, "--client", json.dumps(arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            timeout=60 + 6 * turns * window,
        )
        last = max(end for turn in schedule for _, end in turn)
        run.until(lambda: measure.step_times(run.folder)[-1]["began"] > last, "the last window's steps", timeout=120.0)
        steps = measure.step_times(run.folder)
    calls = json.loads(client.stdout)

    def between(span: Span, key: str) -> list[float]:
        return [step[key] for step in steps if span[0] + _GUARD <= step["began"] < span[1]]

    def compare(key: str, control: int, treated: int) -> dict[str, Any]:
        windows = [(between(turn[control], key), between(turn[treated], key)) for turn in schedule]
        return _changes(windows)

    quiet = [between(turn[_QUIET], "seconds") for turn in schedule]
    wall = compare("seconds", _QUIET, _OURS)
    return {
        "method": __doc__,
        "limits": LIMITS,
        "rate_asked": RATE,
        "rate_reached": calls["calls"] / (turns * window),
        "calls": calls,
        "window_seconds": window,
        "steps": {"control": sum(map(len, quiet)), "all": len(steps)},
        "control_step_ms": {
            "median": 1e3 * measure.median([value for values in quiet for value in values]),
            "p99": 1e3 * measure.p99([value for values in quiet for value in values]),
        },
        "step_time": wall,
        "step_cpu_time": compare("cpu_seconds", _QUIET, _OURS),
        "other_server": compare("seconds", _QUIET, _OTHERS),
        "beyond_other_server": compare("seconds", _OTHERS, _OURS),
        "noise": _changes([(quiet[index], quiet[index + 1]) for index in range(0, len(quiet) - 1, 2)]),
        # Paired, window by window. Null where the interval holds the limit: the machine was too restless, or there were
        # too few turns. The pooled tail beside it is made by the few worst windows of the whole run: see its noise.
        "holds": {key: measure.below(LIMITS[f"{key}_percent"], wall[key]["interval"]) for key in ("median", "p99")},
        "environment": {"before": before, "after": measure.environment()},
    }


def _changes(windows: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any]:
    return {
        "median": measure.change_percent(windows, measure.median),
        "p99": measure.change_percent(windows, measure.p99),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--client"]:
        sys.stdout.write(json.dumps(asyncio.run(load(**json.loads(words[1])))))
        return 0
    if words[:1] == ["--other-server"]:
        asyncio.run(serve_other(json.loads(words[1])))
        return 0
    parser: argparse.ArgumentParser = measure.parser(__doc__)
    parser.add_argument("--turns", type=int, default=100, help="turns of three windows, two at least")
    parser.add_argument("--window", type=float, default=0.5, help="length of a window, seconds")
    arguments = parser.parse_args(words)
    result = run_benchmark(max(2, arguments.turns), arguments.window)

    def row(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        below, above = found["pooled_interval"]
        return (
            f"{found['percent']:+.2f} % [{low:+.2f}, {high:+.2f}]  pooled {found['pooled_percent']:+.2f} % "
            f"[{below:+.2f}, {above:+.2f}]"
        )

    rows = [("calls per second", f"{result['rate_reached']:.0f}, errors {result['calls']['errors'] or 'none'}")]
    for name in ("step_time", "step_cpu_time", "other_server", "beyond_other_server", "noise"):
        rows += [(f"{name} {key}", row(result[name][key])) for key in ("median", "p99")]
    measure.publish(arguments.out, result, [*rows, ("holds", json.dumps(result["holds"]))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
