"""The training process's clients against the real services, each in a process of its own, kills included."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from esper.common.v1 import common_pb2
from esper.events.v1 import events_pb2
from esper.kasmina.v1 import adaptation_pb2, kasmina_service_pb2, seed_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.tamiyo.v1 import outcome_pb2
from esper.tezzeret.v1 import compile_job_pb2, compile_service_pb2
from esper.tezzeret.v1.compile_service_pb2_grpc import CompileServiceStub
from esper.tolaria.v1 import run_pb2, training_link_service_pb2, training_service_pb2
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from esper.urza.v1 import blueprint_service_pb2, kernel_pb2
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from services.blueprints import signature
from services.chassis.config.loader import dump
from services.chassis.events import EventSubscriber
from services.chassis.telemetry import setup
from services.kasmina.kernel_cache import KernelCache
from services.tolaria import observation
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.mesh import MeshClient
from services.tolaria.ports import (
    CommandKind,
    CommandResult,
    Decision,
    KernelTarget,
    KernelUnavailableError,
    NoDecision,
)
from services.tolaria.trainer import TolariaTrainer
from tests.integration.live_services import SECONDS, Services, until
from tests.integration.trainer_harness import WIDEN, Harness, config_of

pytestmark = pytest.mark.parallel
RUN = "run-1"
PAUSE = training_link_service_pb2.RUN_COMMAND_KIND_PAUSE


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("mesh")
    config = config_of(growth={"decision_deadline_seconds": 5.0})
    (folder / "config.yaml").write_text(dump(config))
    signature.generate_keypair(folder / "state" / "keys")
    running = Services(config, folder)
    running.start()
    yield running
    running.stop()


def shelf_of(services: Services) -> KernelShelf:
    keys = signature.load_public_key(services.run_dir / "state" / "keys")
    return KernelShelf(services.run_dir / "kernels", KernelCache(1 << 20), keys)


def client_of(
    services: Services, *, incarnation: int, rpc_timeout_seconds: float | None = None, **growth: Any
) -> MeshClient:
    config = services.config.model_copy(update={"growth": services.config.growth.model_copy(update=growth)})
    if rpc_timeout_seconds is not None:
        patient = config.services.model_copy(update={"rpc_timeout_seconds": rpc_timeout_seconds})
        config = config.model_copy(update={"services": patient})
    shelf = shelf_of(services)
    telemetry = setup("training", config.telemetry, services.run_dir, RUN)
    return MeshClient(
        config=config, run=RUN, run_dir=services.run_dir, shelf=shelf, telemetry=telemetry, incarnation=incarnation
    )


@pytest.fixture
def mesh(services: Services) -> Iterator[MeshClient]:
    client = client_of(services, incarnation=time.time_ns())
    client.start()
    client.show(run_pb2.Run(name=f"runs/{RUN}", epochs=6, state=run_pb2.RUN_STATE_TRAINING))
    yield client
    client.stop()


@pytest.fixture
def trainer(services: Services, tmp_path: Path) -> TolariaTrainer:
    return Harness(tmp_path, services.config).trainer()


def observe(trainer: TolariaTrainer) -> Any:
    trainer.step = 9
    trainer._measure_health(1)
    return observation.observe(trainer._situation(1), trainer.engine, trainer.health, [WIDEN])


def target_of(trainer: TolariaTrainer, *, size: int = 1, seed: int = 1, slot: str = "groups.0.conv1") -> KernelTarget:
    return KernelTarget(WIDEN, trainer.engine.interface(slot), size, seed)


# ---- asking ------------------------------------------------------------------------------------------------------


def test_tamiyo_decides_and_explains(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    assert WIDEN.id in {blueprint.id for blueprint in mesh.candidates()}
    answer = mesh.decide(observe(trainer), policy="utilization", request_id="a", deadline=5.0)
    assert isinstance(answer, Decision)
    assert answer.plan
    assert answer.policy == "policies/utilization@1"
    assert {change.blueprint for change in answer.plan} == {WIDEN.id}
    evidence = {item["slot"]: item for item in answer.evidence}
    assert {change.slot for change in answer.plan} == {slot for slot, item in evidence.items() if item["chosen"]}
    again = mesh.decide(observe(trainer), policy="utilization", request_id="a", deadline=5.0)
    assert isinstance(again, Decision)
    assert again.decision == answer.decision


def test_what_tamiyo_cannot_answer_is_said(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    answer = mesh.decide(observe(trainer), policy="oracle", request_id="b", deadline=5.0)
    assert isinstance(answer, NoDecision)
    assert "oracle" in answer.reason
    late = mesh.decide(observe(trainer), policy="utilization", request_id="c", deadline=1e-4)
    assert isinstance(late, NoDecision)
    assert late.latency_ms < 2000


def test_a_loop_that_is_busy_costs_the_decision_and_nothing_else(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    mesh._loop.call_soon_threadsafe(time.sleep, 1.0)
    answer = mesh.decide(observe(trainer), policy="utilization", request_id="d", deadline=0.1)
    assert isinstance(answer, NoDecision)
    assert answer.reason == "Tamiyo did not answer within 0.1 s"


def test_only_wanted_blueprints_are_candidates(services: Services) -> None:
    client = client_of(services, incarnation=1, blueprints=("residual_bottleneck",))
    client.start()
    try:
        assert {blueprint.family for blueprint in client.candidates()} == {"residual_bottleneck"}
    finally:
        client.stop()


def test_a_kernel_is_compiled_once_and_resolved_after(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    first = mesh.obtain_kernel(target_of(trainer))
    digest = first.result(SECONDS)
    assert first.done
    assert isinstance(mesh._shelf, KernelShelf)
    kernel = mesh._shelf.take(digest)
    assert kernel.manifest.size == 1
    assert mesh.obtain_kernel(target_of(trainer)).result(SECONDS) == digest


def test_a_kernel_that_cannot_be_is_refused_with_the_reason(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    with pytest.raises(KernelUnavailableError):
        mesh.obtain_kernel(KernelTarget(WIDEN, trainer.engine.interface("span:groups.0"), 1, 1)).result(SECONDS)


def test_what_urza_does_not_understand_is_refused_with_its_words(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    with pytest.raises(KernelUnavailableError, match="size"):
        mesh.obtain_kernel(target_of(trainer, size=0)).result(SECONDS)


def test_a_kernel_that_was_retired_is_refused_although_its_job_succeeded(
    services: Services, mesh: MeshClient, trainer: TolariaTrainer
) -> None:
    target = target_of(trainer, seed=7001)
    digest = mesh.obtain_kernel(target).result(SECONDS)
    key = signature.load_private_key(services.run_dir / "state" / "keys")
    with grpc.insecure_channel(services.address("urza")) as channel:
        BlueprintServiceStub(channel).SetKernelStatus(
            blueprint_service_pb2.SetKernelStatusRequest(
                name=f"blueprints/{WIDEN.id}/kernels/{digest[:32]}",
                status=kernel_pb2.KERNEL_STATUS_RETIRED,
                reason="a test",
                attestation=signature.attest_status(key, bytes.fromhex(digest), "RETIRED"),
                request_id="retired-7001",
            )
        )
    with pytest.raises(KernelUnavailableError, match="no validated kernel although its compile job succeeded"):
        mesh.obtain_kernel(target).result(SECONDS)


def test_a_job_that_is_cancelled_ends_the_wait(services: Services, mesh: MeshClient, trainer: TolariaTrainer) -> None:
    requests = {seed: mesh.obtain_kernel(target_of(trainer, seed=seed, size=3)) for seed in range(2000, 2040)}
    with grpc.insecure_channel(services.address("tezzeret")) as channel:
        stub = CompileServiceStub(channel)

        def waiting() -> list[compile_job_pb2.CompileJob]:
            jobs = stub.ListCompileJobs(compile_service_pb2.ListCompileJobsRequest(page_size=1000)).jobs
            queued = compile_job_pb2.COMPILE_STATE_QUEUED
            return [job for job in jobs if job.spec.init_seed in requests and job.state == queued]

        # Newest first: the one that waits longest from now on. They do not come in the order they were asked for.
        job = until(waiting, "one waits in the queue")[0]
        stub.CancelCompileJob(compile_service_pb2.CancelCompileJobRequest(name=job.name))
    with pytest.raises(KernelUnavailableError, match=r"ended without a kernel"):
        requests.pop(job.spec.init_seed).result(SECONDS)
    assert next(iter(requests.values())).result(SECONDS)


def test_a_kernel_may_take_too_long_or_be_unwanted(mesh: MeshClient, trainer: TolariaTrainer) -> None:
    request = mesh.obtain_kernel(target_of(trainer, seed=99))
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        request.result(0.0)
    request.cancel()
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        request.result(SECONDS)


def test_outcomes_reach_the_library(services: Services, mesh: MeshClient, trainer: TolariaTrainer) -> None:
    digest = mesh.obtain_kernel(target_of(trainer, seed=5)).result(SECONDS)
    kernel = f"blueprints/{WIDEN.id}/kernels/{digest[:32]}"
    outcome = outcome_pb2.Outcome(
        seed=f"runs/{RUN}/seeds/seed-1",
        slot=f"runs/{RUN}/slots/groups.0.conv1",
        blueprint=f"blueprints/{WIDEN.id}",
        family="widen",
        state=seed_pb2.SEED_STATE_FOSSILIZED,
        contribution=common_pb2.Interval(value=2.0, low=1.0, high=3.0, confidence_ratio=0.95, samples=100),
    )
    mesh.report_outcome(outcome, kernel)
    culled = outcome_pb2.Outcome()
    culled.CopyFrom(outcome)
    culled.seed = f"runs/{RUN}/seeds/seed-2"
    culled.state = seed_pb2.SEED_STATE_CULLED
    culled.ClearField("contribution")
    mesh.report_outcome(culled, kernel)
    mesh.report_outcome(outcome_pb2.Outcome(), "")  # refused by Tamiyo, and no reason to stop
    with grpc.insecure_channel(services.address("urza")) as channel:
        stub = BlueprintServiceStub(channel)

        def told() -> Any:
            found = stub.GetKernel(blueprint_service_pb2.GetKernelRequest(name=kernel)).kernel.outcomes
            return found if found.fossilized and found.culled else None

        assert until(told, "both outcomes are there").mean_contribution == 2.0


# ---- telling -----------------------------------------------------------------------------------------------------


def test_gateways_show_the_run_and_know_it_again_after_a_kill(
    services: Services, mesh: MeshClient, trainer: TolariaTrainer
) -> None:
    engine = trainer.engine
    mesh.show(observation.topology(RUN, engine, epoch=0, step=7))
    trainer._measure_health(1)
    assert trainer.health is not None
    mesh.show(observation.health_report(RUN, trainer.health, 0))
    mesh.show(observation.cache_to_proto(shelf_of(services).stats()))
    mesh.show(seed_pb2.Seed(name=f"runs/{RUN}/seeds/seed-1", state=seed_pb2.SEED_STATE_GERMINATED))

    def shown() -> bool:
        with grpc.insecure_channel(services.address("kasmina")) as channel:
            stub = KasminaServiceStub(channel)
            try:
                topology = stub.GetTopology(kasmina_service_pb2.GetTopologyRequest(run=f"runs/{RUN}")).topology
                health = stub.GetHealthReport(kasmina_service_pb2.GetHealthReportRequest(run=f"runs/{RUN}")).report
                stats = stub.GetCacheStats(kasmina_service_pb2.GetCacheStatsRequest(run=f"runs/{RUN}")).stats
                seeds = stub.ListSeeds(kasmina_service_pb2.ListSeedsRequest(run=f"runs/{RUN}")).seeds
            except grpc.RpcError:
                return False
        return (topology.step, len(health.slots), stats.limit_bytes, len(seeds)) == (7, 4, 1 << 20, 1)

    until(shown, "the gateway shows the run")
    services.kill("kasmina")
    until(shown, "the gateway that was killed shows the run again")
    services.kill("tolaria")
    with grpc.insecure_channel(services.address("tolaria")) as channel:
        stub = TrainingServiceStub(channel)

        def attached() -> bool:
            try:
                return bool(stub.GetRun(training_service_pb2.GetRunRequest(name=f"runs/{RUN}")).run.attached)
            except grpc.RpcError:
                return False

        until(attached, "the run attached again")


def test_events_are_published_and_counted(mesh: MeshClient) -> None:
    event = events_pb2.RunStateChanged(run=f"runs/{RUN}", state=run_pb2.RUN_STATE_TRAINING, reason="test")
    mesh.publish("system.events.epoch", RUN, event)
    mesh.publish("telemetry.seed.health", RUN, event)  # not of that topic: refused, and counted
    until(lambda: mesh.event_counts().published == 1 and mesh.event_counts().dropped == 1, "one of each")


# ---- obeying -----------------------------------------------------------------------------------------------------


def attached_stub(services: Services, channel: grpc.Channel) -> TrainingServiceStub:
    stub = TrainingServiceStub(channel)

    def attached() -> bool:
        try:
            return bool(stub.GetRun(training_service_pb2.GetRunRequest(name=f"runs/{RUN}")).run.attached)
        except grpc.RpcError:
            return False

    until(attached, "the run is attached")
    return stub


def test_commands_come_down_and_answers_go_up(services: Services, mesh: MeshClient) -> None:
    with grpc.insecure_channel(services.address("tolaria")) as channel, ThreadPoolExecutor() as pool:
        stub = attached_stub(services, channel)
        name = f"runs/{RUN}"
        pausing = pool.submit(
            stub.PauseRun, training_service_pb2.PauseRunRequest(name=name, request_id="p"), timeout=20
        )
        mesh.wait(SECONDS)
        (command,) = mesh.commands()
        assert command.kind is CommandKind.PAUSE
        assert mesh.commands() == ()
        mesh.show(run_pb2.Run(name=name, state=run_pb2.RUN_STATE_PAUSED))
        mesh.answer(CommandResult(command=command, step=3))
        assert pausing.result().run.state == run_pb2.RUN_STATE_PAUSED
        saving = pool.submit(
            stub.CreateCheckpoint,
            training_service_pb2.CreateCheckpointRequest(run=name, request_id="c"),
            timeout=20,
        )
        (command,) = until(mesh.commands, "the next command")
        mesh.answer(CommandResult(command=command, step=3, checkpoint_step=3))
        assert saving.result().checkpoint.name == f"{name}/checkpoints/3"
        rolling = pool.submit(
            stub.Rollback,
            training_service_pb2.RollbackRequest(run=name, checkpoint=f"{name}/checkpoints/9", request_id="r"),
            timeout=20,
        )
        (command,) = until(mesh.commands, "the rollback")
        assert command.checkpoint == "9"
        mesh.answer(
            CommandResult(command=command, step=3, error_reason="CHECKPOINT_NOT_FOUND", error_message="there is none")
        )
        with pytest.raises(grpc.RpcError) as caught:
            rolling.result()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_adaptations_are_applied_refused_and_withdrawn(
    services: Services, mesh: MeshClient, trainer: TolariaTrainer
) -> None:
    mesh.show(observation.topology(RUN, trainer.engine, epoch=0, step=0))
    run = f"runs/{RUN}"
    with grpc.insecure_channel(services.address("kasmina")) as channel:
        stub = KasminaServiceStub(channel)
        until(lambda: mesh._kasmina.attachments, "the link stands")

        def wish(command_id: str, **action: Any) -> None:
            command = adaptation_pb2.AdaptationCommand(command_id=command_id, run=run, requester="test", **action)
            stub.ApplyAdaptation(kasmina_service_pb2.ApplyAdaptationRequest(command=command))

        def state(command_id: str) -> Any:
            name = f"{run}/adaptations/{command_id}"
            return stub.GetAdaptation(kasmina_service_pb2.GetAdaptationRequest(name=name)).adaptation

        germinate = adaptation_pb2.Germinate(
            slot=f"{run}/slots/groups.0.conv1", blueprint=f"blueprints/{WIDEN.id}", size=2
        )
        wish("g", germinate=germinate)
        (command,) = until(mesh.commands, "the wish")
        assert (command.slot, command.blueprint, command.size) == ("groups.0.conv1", WIDEN.id, 2)
        mesh.answer(CommandResult(command=command, step=4, seed="seed-1"))
        until(lambda: state("g").state == adaptation_pb2.ADAPTATION_STATE_APPLIED, "it is applied")
        assert state("g").seed == f"{run}/seeds/seed-1"
        wish("k", cull=adaptation_pb2.Cull(seed=f"{run}/seeds/seed-7", reason="because"))
        (command,) = until(mesh.commands, "the second wish")
        assert (command.kind, command.seed, command.reason) == (CommandKind.CULL, "seed-7", "because")
        mesh.answer(
            CommandResult(command=command, step=4, error_reason="SEED_NOT_FOUND", error_message="there is no seed-7")
        )
        until(lambda: state("k").state == adaptation_pb2.ADAPTATION_STATE_REFUSED, "it is refused")
        wish("w", germinate=germinate)
        wish("x", germinate=germinate)
        until(lambda: len(mesh._waiting) == 2, "two more wishes")
        stub.CancelAdaptation(kasmina_service_pb2.CancelAdaptationRequest(name=f"{run}/adaptations/w"))
        until(lambda: state("w").state == adaptation_pb2.ADAPTATION_STATE_CANCELLED, "it is withdrawn")
        until(lambda: [each.command_id for each in mesh._waiting] == ["x"], "the other one waits")
        stub.CancelAdaptation(kasmina_service_pb2.CancelAdaptationRequest(name=f"{run}/adaptations/x"))
        until(lambda: not mesh._waiting, "nothing waits")


def test_a_command_that_is_passed_on_again_is_one_command(mesh: MeshClient) -> None:
    up = training_link_service_pb2.AttachResponse
    message = up(command=training_link_service_pb2.RunCommand(command_id="z", kind=PAUSE, reason="twice"))
    mesh._from_tolaria(message)
    mesh._from_tolaria(message)
    (command,) = mesh.commands()
    mesh.answer(CommandResult(command=command, step=1))
    taken = threading.Event()
    mesh._loop.call_soon_threadsafe(mesh._from_tolaria, message)
    mesh._loop.call_soon_threadsafe(taken.set)
    assert taken.wait(SECONDS)
    until(lambda: "result/z" not in mesh._tolaria._waiting, "it is answered again")
    assert mesh.commands() == ()
    for number in range(5000):
        mesh._results[f"old-{number}"] = None
    mesh.answer(CommandResult(command=command, step=1))
    assert len(mesh._results) == 4096


def test_a_kernel_is_prefetched(services: Services, mesh: MeshClient, trainer: TolariaTrainer) -> None:
    digest = mesh.obtain_kernel(target_of(trainer, seed=77)).result(SECONDS)
    assert isinstance(mesh._shelf, KernelShelf)
    mesh._shelf._cache.unload(bytes.fromhex(digest))
    (services.run_dir / "kernels" / f"{digest}.safetensors").unlink()
    kernel = f"blueprints/{WIDEN.id}/kernels/{digest[:32]}"
    with grpc.insecure_channel(services.address("kasmina")) as channel:
        stub = KasminaServiceStub(channel)
        until(lambda: mesh._kasmina.attachments, "the link stands")
        for name in (f"blueprints/{WIDEN.id}/kernels/{'0' * 32}", kernel):
            stub.PrefetchKernel(
                kasmina_service_pb2.PrefetchKernelRequest(run=f"runs/{RUN}", kernel=name, request_id=name[-8:])
            )
    until((services.run_dir / "kernels" / f"{digest}.safetensors").exists, "the kernel is on the shelf")


def test_a_bus_that_refuses_the_subscription_is_done_without(
    mesh: MeshClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def listen() -> None:
        subscriber = EventSubscriber(mesh._channels.channel("oona"), "group", ["no.such.topic"], mesh._telemetry)
        await mesh._kernels.listen(subscriber)

    asyncio.run_coroutine_threadsafe(listen(), mesh._loop).result(SECONDS)
    assert "no events of compile jobs" in caplog.text


# ---- services that are away --------------------------------------------------------------------------------------


def test_a_compile_outlives_the_services_it_needs(
    services: Services, mesh: MeshClient, trainer: TolariaTrainer
) -> None:
    request = mesh.obtain_kernel(target_of(trainer, seed=1234, size=2))
    services.kill("tezzeret")
    services.kill("oona")
    assert request.result(60.0)


def test_without_urza_the_last_known_blueprints_are_used(services: Services, mesh: MeshClient) -> None:
    known = mesh.candidates()
    assert known
    assert services.supervisor is not None
    pid = services.supervisor.services["urza"].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert mesh.candidates() == known
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_end_does_not_wait_for_a_service_that_hangs(services: Services, trainer: TolariaTrainer) -> None:
    # Longer than the end waits: what is still asked for then is dropped.
    client = client_of(services, incarnation=time.time_ns(), rpc_timeout_seconds=10 * SECONDS)
    client.start()
    # A service that it never met it may not even reach, which is over sooner.
    answer = client.decide(observe(trainer), policy="utilization", request_id="met", deadline=SECONDS)
    assert isinstance(answer, Decision), answer
    assert services.supervisor is not None
    pids = [services.supervisor.services[name].pid for name in ("tamiyo", "tezzeret")]
    with contextlib.ExitStack() as stack:
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        client.report_outcome(outcome_pb2.Outcome(seed="runs/x/seeds/y"), "")
        request = client.obtain_kernel(target_of(trainer, seed=4711))
        started = time.monotonic()
        client.stop()
        assert time.monotonic() - started < SECONDS
    with pytest.raises(KernelUnavailableError):
        request.result(0.0)


def test_a_kernel_that_is_not_genuine_is_refused(services: Services, tmp_path: Path, trainer: TolariaTrainer) -> None:
    stranger = signature.generate_keypair(tmp_path / "other")
    client = client_of(services, incarnation=1)
    client._shelf = KernelShelf(tmp_path / "kernels", KernelCache(1 << 20), stranger.public_key)
    client.start()
    try:
        with pytest.raises(KernelUnavailableError, match="was refused"):
            client.obtain_kernel(target_of(trainer)).result(SECONDS)
    finally:
        client.stop()
    assert not (tmp_path / "kernels").exists()
