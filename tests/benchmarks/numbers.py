"""The platform's numbers against their limits: ``python -m tests.benchmarks.numbers --out FILE [--seconds S]``.

Every number of the design's list that can be measured is measured here, on real parts: services as processes on
loopback, one real run of `train.py` that grows, the real trainer and growth engine in this process where only they are
concerned. ``value`` is null and ``holds`` is null for what was not measured; each says in ``method`` how it was. A
latency's value is its median, with the 99th percentile beside it. The controls are in the same run: the twin without a
seed (drift), the state as captured (rollback), the steps without a compile (pauses), bare torch (start-up).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import services  # noqa: F401 - puts the generated contracts on sys.path
from esper.kasmina.v1 import kasmina_service_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.tamiyo.v1 import observation_pb2, policy_service_pb2
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.blueprints.signature import generate_keypair
from services.kasmina.kernel_cache import KernelCache
from services.tamiyo.decisions import DecisionMaker
from services.tamiyo.registry import PolicyRegistry
from services.tamiyo.store import Store, sqlite_url
from services.tamiyo.wire import read_observation
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.ports import KernelFile
from tests.benchmarks import measure, oona, startup
from tests.infrastructure.kernels import signed_kernel
from tests.infrastructure.mesh import LiveMesh, live_mesh
from tests.infrastructure.runs import SERVICES, json_lines, running
from tests.integration.trainer_harness import Harness, config_of
from tests.support.growth import Loop, ResidualNet, engine_for, fresh, graft

_POLICY: Final = "policies/utilization@1"
#: A safe point that took longer than this was held up, seconds.
_HELD_UP: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Number:
    """One line of the list. ``holds`` is None where ``value`` is."""

    name: str
    limit: str
    value: float | None
    unit: str
    holds: bool | None
    method: str
    p99: float | None = None


def below(name: str, limit: float, unit: str, values: Sequence[float], method: str) -> Number:
    """A number whose median must be below ``limit``; without values it is unmeasured."""
    if not values:
        return Number(name=name, limit=f"< {limit:g}", value=None, unit=unit, holds=None, method=method)
    value = measure.median(values)
    tail = measure.p99(values)
    return Number(name=name, limit=f"< {limit:g}", value=value, unit=unit, holds=value < limit, method=method, p99=tail)


def exactly(name: str, limit: float, unit: str, value: float | None, method: str) -> Number:
    """A number that must be ``limit``."""
    holds = None if value is None else value == limit
    return Number(name=name, limit=f"= {limit:g}", value=value, unit=unit, holds=holds, method=method)


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


# ---- Tamiyo --------------------------------------------------------------------------------------------------------


def observed(folder: Path) -> observation_pb2.Observation:
    """What a real trainer tells Tamiyo at its first decision."""
    harness = Harness(folder, config_of(training={"epochs": 3}, growth={"decisions": 1}))
    harness.trainer().train()
    return harness.scripted.asked[0]


def tamiyo_in_process(folder: Path, observation: observation_pb2.Observation, calls: int) -> Number:
    """Decisions by the core alone."""
    store = Store(sqlite_url(folder), decision_limit=1000)
    try:
        maker = DecisionMaker(store, PolicyRegistry(store))

        numbers = itertools.count()

        def decide() -> None:
            seen = read_observation(observation)
            maker.decide(seen, _POLICY, request_id=str(next(numbers)), digest="", request_digest="")

        taken = [_milliseconds(decide) for _ in range(calls + 10)][10:]
    finally:
        store.close()
    method = f"{calls} decisions on the observation of a real trainer, kept durably, no RPC"
    return below("Tamiyo decision, in process", 10, "ms", taken, method)


async def tamiyo_over_grpc(mesh: LiveMesh, observation: observation_pb2.Observation, calls: int) -> list[Number]:
    """Decisions as a trainer asks for them, and what the way there and back costs."""
    stub = PolicyServiceStub(mesh.channel("tamiyo"))
    whole, way = [], []
    for number in range(calls + 10):
        request = policy_service_pb2.DecideRequest(
            observation=observation, policy=_POLICY, request_id=f"benchmark-{number}"
        )
        began = time.perf_counter()
        decision = (await stub.Decide(request, timeout=5.0)).decision
        taken = time.perf_counter() - began
        whole.append(1e3 * taken)
        way.append(1e3 * (taken - decision.compute_duration.ToNanoseconds() / 1e9))
    return [
        below("Tamiyo decision, over gRPC", 10, "ms", whole[10:], f"{calls} calls of Decide, one after another"),
        below(
            "telemetry to Tamiyo",
            10,
            "ms",
            way[10:],
            "the same calls less the policy's own time: the observation there, kept, and the decision back",
        ),
    ]


# ---- the mesh ------------------------------------------------------------------------------------------------------


async def recovery(mesh: LiveMesh) -> Number:
    """Kill -9 each service; how long until it serves again. The value is the slowest."""
    taken: dict[str, float] = {}
    for service in SERVICES:
        before = mesh.supervisor.services[service].pid
        began = time.perf_counter()
        mesh.kill(service)
        while time.perf_counter() - began < 60.0:
            if mesh.supervisor.services[service].pid != before and await _serving(mesh, service):
                taken[service] = time.perf_counter() - began
                break
            await asyncio.sleep(0.02)
    method = f"kill -9 until grpc.health.v1 says SERVING again; the slowest of {_words(taken)}"
    slowest = [max(taken.values())] if len(taken) == len(SERVICES) else [math.inf]
    return below("recovery of a killed service", 10, "s", slowest, method)


async def _serving(mesh: LiveMesh, service: str) -> bool:
    address = mesh.supervisor.services[service].address
    assert address is not None, f"{service} has served before"
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _words(taken: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())


async def with_mesh(folder: Path, observation: observation_pb2.Observation, calls: int) -> list[Number]:
    """What needs the services."""
    async with live_mesh(folder / "mesh") as mesh:
        return [*await tamiyo_over_grpc(mesh, observation, calls), await recovery(mesh)]


def bus(seconds: float) -> list[Number]:
    """Oona, embedded."""
    found = asyncio.run(oona.measure(seconds, {}))
    stream, delivered = found["publish_stream"], found["end_to_end"]
    rate = stream["messages_per_second"]
    return [
        Number(
            name="Oona rate",
            limit="> 10000",
            value=rate,
            unit="messages/s",
            holds=rate > oona.LIMITS["messages_per_second_min"],
            method=f"one stream at a steady {oona.RATE} events/s for {seconds:g} s, durable acknowledgements",
        ),
        Number(
            name="Oona latency at that rate",
            limit="< 10",
            value=stream["p50_ms"],
            unit="ms",
            holds=stream["p50_ms"] < oona.LIMITS["p50_ms_max"],
            method="from the moment a batch is due to its acknowledgement",
            p99=stream["p99_ms"],
        ),
        Number(
            name="Oona delivery",
            limit="< 10",
            value=delivered["p50_ms"],
            unit="ms",
            holds=delivered["p50_ms"] < oona.LIMITS["p50_ms_max"],
            method=f"from Publish to the subscriber, {delivered['rate']} events/s",
            p99=delivered["p99_ms"],
        ),
    ]


# ---- a run that grows ----------------------------------------------------------------------------------------------


def grown_run(folder: Path, epochs: int) -> list[Number]:
    """One run of the quick start until its seeds are settled: adaptations, pauses, the kernel cache."""
    with running(folder, f"training.epochs={epochs}", "compare=[]", "telemetry.step_times=true") as run:
        ends: dict[str, dict[str, float]] = {}

        def settled() -> bool:
            for event in run.lines("events.jsonl"):
                if event["kind"] == "transition":
                    ends.setdefault(event["seed"], {}).setdefault(event["to_state"], event["time"])
            return bool(ends) and all({"FOSSILIZED", "CULLED"} & states.keys() for states in ends.values())

        run.until(settled, "an end of every seed", timeout=150.0)
        with run.channel("kasmina") as channel:
            request = kasmina_service_pb2.GetCacheStatsRequest(run=f"runs/{run.folder.name}")
            stats = KasminaServiceStub(channel).GetCacheStats(request, timeout=5.0).stats
        run.signal(signal.SIGTERM)
        run.wait()
        steps = measure.step_times(run.folder)
        epoch_ends = {line["step"] for line in json_lines(run.folder / "metrics.jsonl")}
    durations = [_without_epochs(states, steps) for states in ends.values()]
    compiling = [(states["GERMINATED"], states["LOADING"]) for states in ends.values() if "LOADING" in states]
    gaps = [
        step["gap_seconds"]
        for step in steps
        if step["gap_seconds"] is not None
        and step["step"] - 1 not in epoch_ends
        and any(begin <= step["began"] < end for begin, end in compiling)
    ]
    longest = max((end - begin for begin, end in compiling), default=None)
    held_up = float(sum(gap > _HELD_UP for gap in gaps)) if gaps else None
    lookups = stats.hits + stats.misses
    ratio = 100.0 * stats.hits / lookups if lookups else None
    return [
        below(
            "one whole adaptation without its epochs",
            300,
            "s",
            durations,
            f"{len(durations)} seeds of a real run: from GERMINATED to the end, less the optimizer steps between",
        ),
        exactly(
            "training pauses caused by compilation",
            0,
            "pauses",
            held_up,
            f"safe points over {_HELD_UP:g} s among {len(gaps)} while kernels were compiled and fetched"
            + ("" if longest is None else f" (which took {longest:.2f} s)"),
        ),
        Number(
            name="kernel cache hits",
            limit="> 99.5",
            value=ratio,
            unit="%",
            holds=None if ratio is None else ratio > 99.5,
            method=f"{lookups} lookups of the training thread in that run, as GetCacheStats tells",
        ),
    ]


def _without_epochs(states: dict[str, float], steps: Sequence[dict[str, Any]]) -> float:
    begin, end = min(states.values()), states.get("FOSSILIZED") or states["CULLED"]
    return float(end - begin - sum(step["seconds"] for step in steps if begin <= step["began"] < end))


# ---- in this process -----------------------------------------------------------------------------------------------


def cached_load(folder: Path, calls: int) -> Number:
    """A kernel from the shelf."""
    keys = generate_keypair(folder / "keys")
    shelf = KernelShelf(folder / "kernels", KernelCache(1 << 24), keys.public_key)
    digests = []
    for seed in range(16):
        kernel = signed_kernel(folder / "keys", seed=seed)
        file = KernelFile(
            name=f"blueprints/b/kernels/{kernel.id}",
            digest=kernel.digest.hex(),
            signature=kernel.signature,
            data=kernel.data,
        )
        digests.append(shelf.admit(file))
    turn = itertools.cycle(digests)
    taken = [_milliseconds(lambda: shelf.take(next(turn))) for _ in range(calls)]
    return below("cached kernel load", 1, "ms", taken, f"{calls} times one of 16 verified branch kernels off the shelf")


def rollback(folder: Path, trials: int) -> Number:
    """Capture, train on, restore, train on again: the state must come back, and so must what follows from it."""
    trainer = Harness(folder, config_of(training={"epochs": 40})).trainer(grow=False)
    exact = 0
    for trial in range(trials):
        good = trainer.capture().detached()
        ends = []
        for _ in range(2):
            for _ in range(2 + trial % 3):
                trainer.train_step()
            ends.append(trainer.capture().detached())
            trainer.restore(good)
        back = trainer.capture()
        pairs = [(good.tensors, back.tensors), (ends[0].tensors, ends[1].tensors)]
        exact += all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
        trainer.train_step()
    share = 100.0 * exact / trials
    method = (
        f"{trials} times: captured, trained on, restored, trained on: host, optimizer and generators equal to the last "
        "bit, and equal again after the same steps"
    )
    return exactly("rollback, exact", 100, "%", share, method)


def drift(steps: int) -> Number:
    """The host beside an isolated branch against its twin without one."""
    alone, beside = fresh(ResidualNet), fresh(ResidualNet)
    engine = engine_for(beside, isolation_steps=10 * steps)
    slots = [slot.name for slot in engine.slots() if slot.name.startswith("span:")]
    shapes = {name: engine.interface(name) for name in slots}
    spans = [name for name, interface in shapes.items() if interface.input_shape == interface.output_shape]
    graft(engine, spans[0], 2)
    host = {name.replace(".host.", "."): parameter for name, parameter in beside.named_parameters() if ".host." in name}
    Loop(alone).train(steps)
    Loop(beside, engine).train(steps)
    everyone = {**dict(beside.named_parameters()), **host}
    worst = 0.0
    for name, parameter in alone.named_parameters():
        cosine = torch.nn.functional.cosine_similarity(parameter.flatten(), everyone[name].flatten(), dim=0)
        worst = max(worst, 0.0 if torch.equal(parameter, everyone[name]) else 1.0 - float(cosine))
    method = f"1 - cosine of the worst layer after {steps} steps, a branch in isolation over {spans[0]} in one twin"
    return below("drift of untouched layers", 0.05, "1 - cosine", [worst], method)


# ---- all of them ---------------------------------------------------------------------------------------------------


def run_benchmark(seconds: float, calls: int, epochs: int) -> dict[str, Any]:
    """The whole list."""
    torch.set_num_threads(1)
    before = measure.environment()
    with tempfile.TemporaryDirectory(prefix="esper-numbers-") as name:
        folder = Path(name)
        observation = observed(folder / "observed")
        begun = startup.run_benchmark(1)
        numbers = [
            tamiyo_in_process(folder / "tamiyo", observation, calls),
            *asyncio.run(with_mesh(folder, observation, calls)),
            *bus(seconds),
            *grown_run(folder / "grown", epochs),
            cached_load(folder / "cache", calls),
            below(
                "start-up",
                startup.LIMIT_SECONDS,
                "s",
                [begun["first_step_seconds"]["median"]],
                f"from the command to the first step; bare torch beside it {begun['control_seconds']['median']:.1f} s",
            ),
            rollback(folder / "rollback", max(3, calls // 10)),
            drift(max(5, calls // 5)),
            below("dormant overhead", 1, "%", [], "not measured here: python -m tests.benchmarks.dormant"),
        ]
    return {
        "method": __doc__,
        "numbers": [asdict(number) for number in numbers],
        "environment": {"before": before, "after": measure.environment()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement of Oona")
    parser.add_argument("--calls", type=int, default=200, help="calls per latency")
    parser.add_argument("--epochs", type=int, default=60, help="length of the run that grows")
    arguments = parser.parse_args(argv)
    result = run_benchmark(arguments.seconds, arguments.calls, arguments.epochs)
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    rows = []
    for number in result["numbers"]:
        value = "-" if number["value"] is None else f"{number['value']:.4g}"
        rows.append((number["name"], f"{value} {number['unit']} (limit {number['limit']}): {words[number['holds']]}"))
    measure.publish(arguments.out, result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
