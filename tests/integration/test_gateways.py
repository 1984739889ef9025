"""The gateways of Kasmina and Tolaria as processes, with a training process played by the test over the real links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from esper.common.v1.common_pb2 import ChangeType
from esper.kasmina.v1 import adaptation_pb2, seed_pb2, topology_pb2
from esper.kasmina.v1 import execution_link_service_pb2 as execution
from esper.kasmina.v1 import kasmina_service_pb2 as kasmina
from esper.kasmina.v1.execution_link_service_pb2_grpc import ExecutionLinkServiceStub
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.tolaria.v1 import run_pb2
from esper.tolaria.v1 import training_link_service_pb2 as link
from esper.tolaria.v1 import training_service_pb2 as tolaria
from esper.tolaria.v1.training_link_service_pb2_grpc import TrainingLinkServiceStub
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from services.chassis.channel import wait_until_serving
from services.chassis.errors import Reason, from_rpc_error
from tests.infrastructure.mesh import LiveMesh, live_mesh

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(180)]
_RUN = "runs/r"


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[LiveMesh]:
    limits = ["services.kasmina.command_queue_limit=2"]
    async with live_mesh(tmp_path / "run", limits, services=("kasmina", "tolaria")) as live:
        yield live


async def restarted(mesh: LiveMesh, service: str) -> None:
    """Kill -9, and return when the service is serving again."""
    mesh.kill(service)
    status = mesh.supervisor.services[service]
    before = status.restarts
    while status.restarts == before:
        await asyncio.sleep(0.02)
    await wait_until_serving(service, status.address or "", tls_config=mesh.config.services.tls, timeout=30)


async def reason_of(call: Any) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value).reason


def germinate(command_id: str, size: int = 2) -> kasmina.ApplyAdaptationRequest:
    action = adaptation_pb2.Germinate(slot=f"{_RUN}/slots/a", blueprint="blueprints/b", size=size)
    command = adaptation_pb2.AdaptationCommand(command_id=command_id, run=_RUN, germinate=action)
    return kasmina.ApplyAdaptationRequest(command=command)


@contextlib.asynccontextmanager
async def executing(mesh: LiveMesh, incarnation: int = 1) -> AsyncIterator[Any]:
    """A training process attached to Kasmina's gateway, its full state told."""
    call: Any = ExecutionLinkServiceStub(mesh.channel("kasmina")).Attach()
    hello = execution.ExecutionHello(run=_RUN, incarnation=incarnation)
    await call.write(execution.AttachRequest(hello=hello))
    assert (await call.read()).WhichOneof("message") == "accepted"
    await call.write(execution.AttachRequest(topology=topology_pb2.Topology(run=_RUN, parameters=7)))
    for number, state in enumerate((seed_pb2.SEED_STATE_FOSSILIZED, seed_pb2.SEED_STATE_EVALUATING)):
        seed = seed_pb2.Seed(name=f"{_RUN}/seeds/s{number}", state=state)
        await call.write(execution.AttachRequest(seed=seed))
    try:
        yield call
    finally:
        call.cancel()


async def until(condition: Any) -> Any:
    """The first true answer of ``condition``, asked again while the gateway has not caught up."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                if answer := await condition():
                    return answer
            await asyncio.sleep(0.02)


async def test_kasmina_answers_from_what_the_training_process_pushed(mesh: LiveMesh) -> None:
    stub: Any = KasminaServiceStub(mesh.channel("kasmina"))
    assert await reason_of(stub.GetTopology(kasmina.GetTopologyRequest(run=_RUN))) is Reason.RUN_NOT_FOUND
    watch = stub.WatchSeeds(kasmina.WatchSeedsRequest(run=_RUN))
    assert (await watch.read()).change == ChangeType.CHANGE_TYPE_BOOKMARK
    async with executing(mesh) as call:
        assert [(await watch.read()).seed.name for _ in range(2)] == [f"{_RUN}/seeds/s0", f"{_RUN}/seeds/s1"]
        assert (await stub.GetTopology(kasmina.GetTopologyRequest(run=_RUN))).topology.parameters == 7
        every = await stub.ListSeeds(kasmina.ListSeedsRequest(run="runs/-", page_size=1))
        rest = await stub.ListSeeds(
            kasmina.ListSeedsRequest(run="runs/-", page_size=1, page_token=every.next_page_token)
        )
        assert [seed.name[-2:] for seed in (*every.seeds, *rest.seeds)] == ["s0", "s1"]
        settled = kasmina.ListSeedsRequest(run=_RUN, states=[seed_pb2.SEED_STATE_FOSSILIZED])
        assert len((await stub.ListSeeds(settled)).seeds) == 1
        assert (await stub.GetSeed(kasmina.GetSeedRequest(name=f"{_RUN}/seeds/s0"))).seed.state
        unknown = stub.GetSeed(kasmina.GetSeedRequest(name=f"{_RUN}/seeds/x"))
        assert await reason_of(unknown) is Reason.SEED_NOT_FOUND
        health = kasmina.GetHealthReportRequest(run=_RUN)
        assert await reason_of(stub.GetHealthReport(health)) is Reason.HEALTH_NOT_MEASURED
        await call.write(execution.AttachRequest(health=kasmina.HealthReport(run=_RUN, epoch=4)))
        await call.write(execution.AttachRequest(cache=kasmina.CacheStats(hits=3)))
        assert (await until(lambda: stub.GetHealthReport(health))).report.epoch == 4
        stats = kasmina.GetCacheStatsRequest(run=_RUN)
        assert await until(lambda: _hits(stub, stats)) == 3
        changed = seed_pb2.Seed(name=f"{_RUN}/seeds/s1", state=seed_pb2.SEED_STATE_CULLED)
        await call.write(execution.AttachRequest(seed=changed))
        told = await watch.read()
        assert (told.change, told.seed.state) == (ChangeType.CHANGE_TYPE_MODIFIED, seed_pb2.SEED_STATE_CULLED)
        prefetch = kasmina.PrefetchKernelRequest(run=_RUN, kernel="blueprints/b/kernels/k", request_id="p")
        assert (await stub.PrefetchKernel(prefetch)).accepted
        assert (await call.read()).prefetch == "blueprints/b/kernels/k"
    watch.cancel()
    # Nobody is attached: a hint is declined, not kept.
    await until(lambda: _declined(stub, prefetch))


async def _hits(stub: Any, request: kasmina.GetCacheStatsRequest) -> int:
    return int((await stub.GetCacheStats(request)).stats.hits)


async def _declined(stub: Any, request: kasmina.PrefetchKernelRequest) -> bool:
    return not (await stub.PrefetchKernel(request)).accepted


async def test_adaptations_are_queued_delivered_again_and_answered(mesh: LiveMesh) -> None:
    stub: Any = KasminaServiceStub(mesh.channel("kasmina"))
    assert await reason_of(stub.ApplyAdaptation(germinate("c"))) is Reason.RUN_NOT_FOUND
    async with executing(mesh, incarnation=1) as first:
        receipt = (await until(lambda: stub.ApplyAdaptation(germinate("c1")))).adaptation
        assert receipt.state == adaptation_pb2.ADAPTATION_STATE_QUEUED
        assert (await stub.ApplyAdaptation(germinate("c1"))).adaptation == receipt
        assert await reason_of(stub.ApplyAdaptation(germinate("c1", size=3))) is Reason.REQUEST_ID_REUSED
        await stub.ApplyAdaptation(germinate("c2"))
        assert await reason_of(stub.ApplyAdaptation(germinate("c3"))) is Reason.COMMAND_QUEUE_FULL
        assert (await first.read()).apply.command_id == "c1"
        withdrawn = (
            await stub.CancelAdaptation(kasmina.CancelAdaptationRequest(name=f"{_RUN}/adaptations/c2"))
        ).adaptation
        assert withdrawn.state == adaptation_pb2.ADAPTATION_STATE_CANCELLED
        # A newer process of the run takes over and is told what is open; the older one's stream ends.
        async with executing(mesh, incarnation=2) as second:
            assert (await second.read()).apply.command_id == "c1"
            while (left := await first.read()) is not grpc.aio.EOF:
                assert left.WhichOneof("message") in ("apply", "cancel")
            older: Any = ExecutionLinkServiceStub(mesh.channel("kasmina")).Attach()
            await older.write(execution.AttachRequest(hello=execution.ExecutionHello(run=_RUN, incarnation=1)))
            assert await reason_of(older.read()) is Reason.RUN_ALREADY_ATTACHED
            applied = execution.CommandResult(
                command_id="c1", state=adaptation_pb2.ADAPTATION_STATE_APPLIED, seed=f"{_RUN}/seeds/s9", applied_step=5
            )
            await second.write(execution.AttachRequest(result=applied))
            name = f"{_RUN}/adaptations/c1"
            get = kasmina.GetAdaptationRequest(name=name)
            found = await until(lambda: _when_applied(stub, get))
            assert (found.seed, found.applied_step) == (f"{_RUN}/seeds/s9", 5)
            cancel = stub.CancelAdaptation(kasmina.CancelAdaptationRequest(name=name))
            assert await reason_of(cancel) is Reason.ADAPTATION_ALREADY_APPLIED
            refused = execution.CommandResult(
                command_id="c5", state=adaptation_pb2.ADAPTATION_STATE_REFUSED, error_reason="SLOT_NOT_FREE"
            )
            await stub.ApplyAdaptation(germinate("c5"))
            await second.write(execution.AttachRequest(result=refused))
            get = kasmina.GetAdaptationRequest(name=f"{_RUN}/adaptations/c5")
            assert (await until(lambda: _when_refused(stub, get))).error.reason == "SLOT_NOT_FREE"
    missing = stub.GetAdaptation(kasmina.GetAdaptationRequest(name=f"{_RUN}/adaptations/none"))
    assert await reason_of(missing) is Reason.ADAPTATION_NOT_FOUND


async def _when_applied(stub: Any, request: kasmina.GetAdaptationRequest) -> Any:
    found = (await stub.GetAdaptation(request)).adaptation
    return found if found.state == adaptation_pb2.ADAPTATION_STATE_APPLIED else None


async def _when_refused(stub: Any, request: kasmina.GetAdaptationRequest) -> Any:
    found = (await stub.GetAdaptation(request)).adaptation
    return found if found.state == adaptation_pb2.ADAPTATION_STATE_REFUSED else None


async def test_kasminas_requests_are_checked(mesh: LiveMesh) -> None:
    stub: Any = KasminaServiceStub(mesh.channel("kasmina"))
    no_action = adaptation_pb2.AdaptationCommand(command_id="c", run=_RUN)
    cull = adaptation_pb2.AdaptationCommand(command_id="c", run=_RUN, cull=adaptation_pb2.Cull(seed="x"))
    calls = [
        (stub.GetTopology(kasmina.GetTopologyRequest()), Reason.REQUIRED_FIELD),
        (stub.GetTopology(kasmina.GetTopologyRequest(run="r")), Reason.INVALID_NAME),
        (stub.ApplyAdaptation(kasmina.ApplyAdaptationRequest()), Reason.REQUIRED_FIELD),
        (stub.ApplyAdaptation(kasmina.ApplyAdaptationRequest(command=no_action)), Reason.REQUIRED_FIELD),
        (stub.ApplyAdaptation(kasmina.ApplyAdaptationRequest(command=cull)), Reason.INVALID_NAME),
        (stub.ApplyAdaptation(germinate("c", size=0)), Reason.REQUIRED_FIELD),
        (
            stub.PrefetchKernel(kasmina.PrefetchKernelRequest(run=_RUN, kernel="blueprints/b/kernels/k")),
            Reason.REQUIRED_FIELD,
        ),
    ]
    for call, reason in calls:
        assert await reason_of(call) is reason
    mute: Any = ExecutionLinkServiceStub(mesh.channel("kasmina")).Attach()
    await mute.write(execution.AttachRequest(cache=kasmina.CacheStats()))
    assert await reason_of(mute.read()) is Reason.REQUIRED_FIELD
    async with executing(mesh, incarnation=3):
        pass
    silent: Any = ExecutionLinkServiceStub(mesh.channel("kasmina")).Attach()
    await silent.write(execution.AttachRequest(hello=execution.ExecutionHello(run="runs/other", incarnation=1)))
    await silent.read()
    assert await reason_of(stub.GetTopology(kasmina.GetTopologyRequest(run="runs/other"))) is Reason.RUN_NOT_FOUND
    silent.cancel()


def run(name: str = _RUN, state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_TRAINING, step: int = 1) -> run_pb2.Run:
    told = run_pb2.Run(name=name, state=state, step=step)
    told.start_time.FromSeconds(1000 + len(name))
    return told


@contextlib.asynccontextmanager
async def training(mesh: LiveMesh, told: run_pb2.Run, incarnation: int = 1) -> AsyncIterator[Any]:
    """A training process attached to Tolaria's gateway."""
    call: Any = TrainingLinkServiceStub(mesh.channel("tolaria")).Attach()
    await call.write(link.AttachRequest(hello=link.TrainingHello(run=told, incarnation=incarnation)))
    assert (await call.read()).WhichOneof("message") == "accepted"
    try:
        yield call
    finally:
        call.cancel()


async def test_tolaria_tells_of_runs_and_forgets_nothing_that_is_told_again(mesh: LiveMesh) -> None:
    stub: Any = TrainingServiceStub(mesh.channel("tolaria"))
    assert await reason_of(stub.GetRun(tolaria.GetRunRequest(name=_RUN))) is Reason.RUN_NOT_FOUND
    async with training(mesh, run()) as call, training(mesh, run("runs/longer")):
        watch = stub.WatchRun(tolaria.WatchRunRequest(name=_RUN))
        assert (await watch.read()).run.name == _RUN
        await watch.read()
        await call.write(link.AttachRequest(run=run(step=9)))
        await call.write(link.AttachRequest(run=run(step=9)))
        assert (await watch.read()).run.step == 9
        page = await stub.ListRuns(tolaria.ListRunsRequest(page_size=1))
        rest = await stub.ListRuns(tolaria.ListRunsRequest(page_size=1, page_token=page.next_page_token))
        assert [one.name for one in (*page.runs, *rest.runs)] == ["runs/longer", _RUN]
    assert not (await watch.read()).run.attached
    await restarted(mesh, "tolaria")
    assert not (await stub.ListRuns(tolaria.ListRunsRequest())).runs
    async with training(mesh, run(step=11)):
        assert (await stub.GetRun(tolaria.GetRunRequest(name=_RUN))).run.attached


async def test_commands_wait_for_their_safe_point(mesh: LiveMesh) -> None:
    stub: Any = TrainingServiceStub(mesh.channel("tolaria"))
    async with training(mesh, run()) as call:
        pause = tolaria.PauseRunRequest(name=_RUN, request_id="p")
        assert await reason_of(stub.PauseRun(pause, timeout=0.5)) is Reason.DEADLINE_EXCEEDED
        assert (await call.read()).command.kind == link.RUN_COMMAND_KIND_PAUSE
        paused = run(state=run_pb2.RUN_STATE_PAUSED)
        await call.write(link.AttachRequest(result=link.RunCommandResult(command_id="p", run=paused)))
        assert (await stub.PauseRun(pause)).run.state == run_pb2.RUN_STATE_PAUSED
        await call.write(link.AttachRequest(result=link.RunCommandResult(command_id="p", run=paused)))
        reused = tolaria.ResumeRunRequest(name=_RUN, request_id="p")
        assert await reason_of(stub.ResumeRun(reused)) is Reason.REQUEST_ID_REUSED

        async def answer(expected: int, **fields: Any) -> None:
            command = (await call.read()).command
            assert command.kind == expected
            result = link.RunCommandResult(command_id=command.command_id, run=run(), **fields)
            await call.write(link.AttachRequest(result=result))

        saved = run_pb2.Checkpoint(name=f"{_RUN}/checkpoints/3", step=3)
        create = stub.CreateCheckpoint(tolaria.CreateCheckpointRequest(run=_RUN, request_id="c"))
        await answer(link.RUN_COMMAND_KIND_CHECKPOINT, checkpoint=saved)
        assert (await create).checkpoint == saved
        back = stub.Rollback(tolaria.RollbackRequest(run=_RUN, checkpoint=saved.name, request_id="b", reason="why"))
        await answer(link.RUN_COMMAND_KIND_ROLLBACK, error_reason="CHECKPOINT_NOT_FOUND", error_message="gone")
        assert await reason_of(back) is Reason.CHECKPOINT_NOT_FOUND
        resume = stub.ResumeRun(tolaria.ResumeRunRequest(name=_RUN, request_id="r"))
        await answer(link.RUN_COMMAND_KIND_RESUME)
        assert (await resume).run.name == _RUN
        stop = stub.StopRun(tolaria.StopRunRequest(name=_RUN, request_id="s", reason="enough"))
        await answer(link.RUN_COMMAND_KIND_STOP)
        assert (await stop).run.name == _RUN
        ended = run(state=run_pb2.RUN_STATE_SUCCEEDED)
        await call.write(link.AttachRequest(run=ended))
        over = tolaria.PauseRunRequest(name=_RUN, request_id="late")
        assert await until(lambda: _refusal(stub, over)) is Reason.RUN_ALREADY_ENDED
        await call.write(link.AttachRequest(run=run()))
    await until(lambda: _detached(stub))
    gone = stub.PauseRun(tolaria.PauseRunRequest(name=_RUN, request_id="gone"))
    assert await reason_of(gone) is Reason.RUN_NOT_ATTACHED
    nameless = stub.PauseRun(tolaria.PauseRunRequest(name=_RUN))
    assert await reason_of(nameless) is Reason.REQUIRED_FIELD
    odd = stub.Rollback(tolaria.RollbackRequest(run=_RUN, request_id="x", checkpoint="nonsense"))
    assert await reason_of(odd) is Reason.INVALID_NAME
    mute: Any = TrainingLinkServiceStub(mesh.channel("tolaria")).Attach()
    await mute.write(link.AttachRequest(run=run()))
    assert await reason_of(mute.read()) is Reason.REQUIRED_FIELD


async def _detached(stub: Any) -> bool:
    return not (await stub.GetRun(tolaria.GetRunRequest(name=_RUN))).run.attached


async def _refusal(stub: Any, request: tolaria.PauseRunRequest) -> Reason | None:
    """The reason a command is refused at once with; None while it would still be passed on."""
    try:
        await stub.PauseRun(request, timeout=0.3)
    except grpc.aio.AioRpcError as error:
        reason = from_rpc_error(error).reason
        return None if reason is Reason.DEADLINE_EXCEEDED else reason
    return None
