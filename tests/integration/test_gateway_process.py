"""Each gateway alone in its process: what a drain, a lost client, a newer process and a stranger do to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
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
from esper.tolaria.v1 import training_link_service_pb2 as training
from esper.tolaria.v1 import training_service_pb2 as tolaria
from esper.tolaria.v1.training_link_service_pb2_grpc import TrainingLinkServiceStub
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from services.chassis.errors import Reason, RemoteError, from_rpc_error
from services.chassis.ids import new_id
from services.tolaria.links import GatewayLink
from tests.infrastructure.single_service import SingleService, single_service

pytestmark = [pytest.mark.fast, pytest.mark.timeout(120)]
_SECONDS = 20.0
_LIMIT = 3


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SingleService]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                single_service(name, tmp_path_factory.mktemp(name), {"command_queue_limit": _LIMIT})
            )
            for name in ("kasmina", "tolaria")
        }


@pytest.fixture
async def channels(gateways: dict[str, SingleService]) -> AsyncIterator[dict[str, Any]]:
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(gateway.address))
            for name, gateway in gateways.items()
        }


@pytest.fixture
def run() -> str:
    return f"runs/{new_id()}"


async def refusal(call: Any) -> RemoteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(_SECONDS):
            await call
    return from_rpc_error(caught.value)


async def until(condition: Callable[[], Any]) -> Any:
    """The first true answer of the asynchronous ``condition``, asked again while the gateway has not caught up."""
    async with asyncio.timeout(_SECONDS):
        while not (answer := await condition()):
            await asyncio.sleep(0.01)
    return answer


def seed(run: str, name: str, state: seed_pb2.SeedState.ValueType = seed_pb2.SEED_STATE_TRAINING) -> seed_pb2.Seed:
    return seed_pb2.Seed(name=f"{run}/seeds/{name}", state=state)


async def attach_execution(channel: Any, run: str, incarnation: int = 1, *seeds: seed_pb2.Seed) -> Any:
    """A training process on Kasmina's link."""
    call: Any = ExecutionLinkServiceStub(channel).Attach()
    await call.write(execution.AttachRequest(hello=execution.ExecutionHello(run=run, incarnation=incarnation)))
    assert (await call.read()).accepted.gateway_id
    for one in seeds:
        await call.write(execution.AttachRequest(seed=one))
    return call


def germinate(run: str, command_id: str, slot: str = "") -> kasmina.ApplyAdaptationRequest:
    action = adaptation_pb2.Germinate(slot=slot or f"{run}/slots/a", blueprint="blueprints/b", size=2)
    command = adaptation_pb2.AdaptationCommand(command_id=command_id, run=run, germinate=action)
    return kasmina.ApplyAdaptationRequest(command=command)


def told(run: str, state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_TRAINING, **fields: Any) -> run_pb2.Run:
    return run_pb2.Run(name=run, state=state, **fields)


async def attach_training(channel: Any, run: run_pb2.Run, incarnation: int = 1) -> Any:
    """A training process on Tolaria's link."""
    call: Any = TrainingLinkServiceStub(channel).Attach()
    await call.write(training.AttachRequest(hello=training.TrainingHello(run=run, incarnation=incarnation)))
    assert (await call.read()).accepted.gateway_id
    return call


# Kasmina.


async def test_a_newer_process_tells_its_own_seeds_and_the_older_ones_are_gone(
    channels: dict[str, Any], run: str
) -> None:
    stub: Any = KasminaServiceStub(channels["kasmina"])
    first = await attach_execution(channels["kasmina"], run, 1, seed(run, "s0"), seed(run, "s1"))
    listing = kasmina.ListSeedsRequest(run=run)

    async def both() -> bool:
        return len((await stub.ListSeeds(listing)).seeds) == 2

    await until(both)
    watch = stub.WatchSeeds(kasmina.WatchSeedsRequest(run=run), timeout=_SECONDS)
    snapshot = [await watch.read() for _ in range(3)]
    assert [item.change for item in snapshot] == [1, 1, ChangeType.CHANGE_TYPE_BOOKMARK]
    assert [item.resume_token != "" for item in snapshot] == [False, False, True]
    # The same process again after a cut: what it repeats is no change.
    first.cancel()
    again = await attach_execution(
        channels["kasmina"], run, 1, seed(run, "s0"), seed(run, "s1", seed_pb2.SEED_STATE_FOSSILIZED)
    )
    item = await watch.read()
    assert (item.change, item.seed) == (
        ChangeType.CHANGE_TYPE_MODIFIED,
        seed(run, "s1", seed_pb2.SEED_STATE_FOSSILIZED),
    )
    second = await attach_execution(channels["kasmina"], run, 2, seed(run, "s0"))
    changes = [await watch.read() for _ in range(3)]
    assert [(item.change, item.seed.name[-2:]) for item in changes] == [
        (ChangeType.CHANGE_TYPE_DELETED, "s0"),
        (ChangeType.CHANGE_TYPE_DELETED, "s1"),
        (ChangeType.CHANGE_TYPE_ADDED, "s0"),
    ]
    assert await again.read() is grpc.aio.EOF
    resumed = stub.WatchSeeds(
        kasmina.WatchSeedsRequest(run=run, resume_token=changes[1].resume_token), timeout=_SECONDS
    )
    assert (await resumed.read()).revision == changes[2].revision
    everywhere = stub.WatchSeeds(kasmina.WatchSeedsRequest(run="runs/-"), timeout=_SECONDS)
    assert (await everywhere.read()).change == ChangeType.CHANGE_TYPE_SNAPSHOT
    for call in (watch, resumed, everywhere, second):
        call.cancel()


async def test_a_withdrawal_outlives_a_cut_and_takes_no_room(channels: dict[str, Any], run: str) -> None:
    stub: Any = KasminaServiceStub(channels["kasmina"])
    call = await attach_execution(channels["kasmina"], run)
    await stub.ApplyAdaptation(germinate(run, "c0"))
    assert (await call.read()).apply.command_id == "c0"
    call.cancel()
    for _ in range(2):  # withdrawing twice is withdrawing once
        cancel = kasmina.CancelAdaptationRequest(name=f"{run}/adaptations/c0")
        state = (await stub.CancelAdaptation(cancel)).adaptation.state
        assert state == adaptation_pb2.ADAPTATION_STATE_CANCELLED
    for number in range(_LIMIT):
        await stub.ApplyAdaptation(germinate(run, f"c{number + 1}"))
    full = await refusal(stub.ApplyAdaptation(germinate(run, "too-many")))
    assert full.reason is Reason.COMMAND_QUEUE_FULL
    assert full.retry_after
    call = await attach_execution(channels["kasmina"], run)
    commands = [await call.read() for _ in range(_LIMIT + 1)]
    assert [command.apply.command_id for command in commands[:-1]] == ["c1", "c2", "c3"]
    assert commands[-1].cancel == "c0"
    # It was applied before the withdrawal came: the training process has the last word, and is not asked again.
    result = execution.CommandResult(command_id="c0", state=adaptation_pb2.ADAPTATION_STATE_APPLIED, applied_step=4)
    await call.write(execution.AttachRequest(result=result))
    # A result that nobody waits for, and a kind of message that this gateway does not know, change nothing.
    await call.write(execution.AttachRequest(result=execution.CommandResult(command_id="stranger")))
    await call.write(execution.AttachRequest())

    async def applied() -> bool:
        found = await stub.GetAdaptation(kasmina.GetAdaptationRequest(name=f"{run}/adaptations/c0"))
        return bool(found.adaptation.applied_step == 4)

    await until(applied)
    call.cancel()
    call = await attach_execution(channels["kasmina"], run)
    for number in range(_LIMIT):
        assert (await call.read()).apply.command_id == f"c{number + 1}"
    for number in range(_LIMIT + 1):  # more withdrawals than may wait: the oldest is let go
        if number == _LIMIT:
            await stub.ApplyAdaptation(germinate(run, "c4"))
        await stub.CancelAdaptation(kasmina.CancelAdaptationRequest(name=f"{run}/adaptations/c{number + 1}"))
    call.cancel()
    call = await attach_execution(channels["kasmina"], run)
    assert [(await call.read()).cancel for _ in range(_LIMIT)] == ["c2", "c3", "c4"]
    call.cancel()


async def test_hints_are_bounded_when_the_training_process_reads_nothing(channels: dict[str, Any], run: str) -> None:
    stub: Any = KasminaServiceStub(channels["kasmina"])
    kernel = f"blueprints/b/kernels/{'k' * 20_000}"
    prefetch = kasmina.PrefetchKernelRequest(run=run, kernel=kernel, request_id="p")
    assert (await refusal(stub.PrefetchKernel(prefetch))).reason is Reason.RUN_NOT_FOUND
    call = await attach_execution(channels["kasmina"], run)
    accepted = 0
    async with asyncio.timeout(_SECONDS):
        try:
            while accepted < 5_000:
                accepted += (await stub.PrefetchKernel(prefetch)).accepted
        except grpc.aio.AioRpcError as error:
            assert from_rpc_error(error).reason is Reason.COMMAND_QUEUE_FULL  # noqa: PT017  # it may come at any turn
    assert 0 < accepted < 5_000
    call.cancel()

    async def declined() -> bool:
        return not (await stub.PrefetchKernel(prefetch)).accepted

    await until(declined)


async def test_kasminas_bad_requests_name_the_field(channels: dict[str, Any], run: str) -> None:
    stub: Any = KasminaServiceStub(channels["kasmina"])
    link: Any = ExecutionLinkServiceStub(channels["kasmina"])
    negative, both = germinate(run, "c"), germinate(run, "c d")
    negative.command.germinate.size = -1
    cull = adaptation_pb2.AdaptationCommand(command_id="c", run=run, cull=adaptation_pb2.Cull(seed="runs/x/seeds/s"))
    calls = [
        (stub.ApplyAdaptation(germinate(run, "c", "runs/other/slots/a")), "command.germinate.slot"),
        (stub.ApplyAdaptation(negative), "command.germinate.size"),
        (stub.ApplyAdaptation(both), "command.command_id"),
        (stub.ApplyAdaptation(kasmina.ApplyAdaptationRequest(command=cull)), "command.cull.seed"),
        (stub.GetSeed(kasmina.GetSeedRequest(name="runs/r")), "name"),
        (stub.ListSeeds(kasmina.ListSeedsRequest(run=run, page_size=-1)), "page_size"),
        (link.Attach(iter(())).read(), "hello"),
        (
            link.Attach(iter([execution.AttachRequest(hello=execution.ExecutionHello(incarnation=1))])).read(),
            "hello.run",
        ),
        (
            link.Attach(iter([execution.AttachRequest(hello=execution.ExecutionHello(run=run))])).read(),
            "hello.incarnation",
        ),
    ]
    for call, field in calls:
        error = await refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == [field]


# Tolaria.


async def test_a_watch_waits_for_a_run_that_has_not_attached(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    watch = stub.WatchRun(tolaria.WatchRunRequest(name=run), timeout=_SECONDS)
    assert (await watch.read()).change == ChangeType.CHANGE_TYPE_BOOKMARK
    other = await attach_training(channels["tolaria"], told(f"{run}-other"))
    call = await attach_training(channels["tolaria"], told(run))
    item = await watch.read()
    assert (item.change, item.run.name) == (ChangeType.CHANGE_TYPE_ADDED, run)
    for stream in (watch, other, call):
        stream.cancel()


async def test_commands_nobody_will_answer_end_with_the_run(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    other = f"{run}-other"
    bystander = await attach_training(channels["tolaria"], told(other))
    elsewhere = asyncio.ensure_future(stub.PauseRun(tolaria.PauseRunRequest(name=other, request_id="p")))
    assert (await bystander.read()).command.command_id == "p"
    call = await attach_training(channels["tolaria"], told(run))
    waiting = asyncio.ensure_future(stub.PauseRun(tolaria.PauseRunRequest(name=run, request_id="p")))
    assert (await call.read()).command.command_id == "p"
    await call.write(training.AttachRequest(run=told(run, run_pb2.RUN_STATE_SUCCEEDED)))
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert (await refusal(waiting)).reason is Reason.RUN_ALREADY_ENDED
    late = await refusal(stub.ResumeRun(tolaria.ResumeRunRequest(name=run, request_id="r")))
    assert late.reason is Reason.RUN_ALREADY_ENDED
    # Another run's command still waits, and is answered; the run need not be told with it.
    await bystander.write(training.AttachRequest(result=training.RunCommandResult(command_id="p")))
    assert not (await elsewhere).run.name
    bystander.cancel()


async def test_a_cut_keeps_commands_for_the_process_that_comes_back(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    call = await attach_training(channels["tolaria"], told(run))
    stop = tolaria.StopRunRequest(name=run, request_id="s", reason="enough")
    waiting = asyncio.ensure_future(stub.StopRun(stop, timeout=_SECONDS))
    assert (await call.read()).command.reason == "enough"
    call.cancel()

    async def unattached() -> bool:
        return not (await stub.GetRun(tolaria.GetRunRequest(name=run))).run.attached

    await until(unattached)
    gone = await refusal(stub.PauseRun(tolaria.PauseRunRequest(name=run, request_id="p")))
    assert (gone.reason, gone.retry_after) == (Reason.RUN_NOT_ATTACHED, 1.0)
    newer = await attach_training(channels["tolaria"], told(run), incarnation=2)
    assert (await newer.read()).command.command_id == "s"
    stopped = told(run, run_pb2.RUN_STATE_STOPPED, reason="enough")
    answer = training.RunCommandResult(command_id="s", run=stopped)
    await newer.write(training.AttachRequest(result=answer))
    assert (await waiting).run.reason == "enough"
    # The same id asks for the same answer, also when the run is over.
    assert (await stub.StopRun(stop)).run.state == run_pb2.RUN_STATE_STOPPED
    newer.cancel()


async def test_a_rollback_names_its_checkpoint_or_takes_the_newest(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    call = await attach_training(channels["tolaria"], told(run))
    for checkpoint in ("", f"{run}/checkpoints/7"):
        request = tolaria.RollbackRequest(run=run, checkpoint=checkpoint, request_id=new_id(), reason="it diverged")
        waiting = asyncio.ensure_future(stub.Rollback(request, timeout=_SECONDS))
        command = (await call.read()).command
        assert (command.kind, command.checkpoint) == (training.RUN_COMMAND_KIND_ROLLBACK, checkpoint)
        assert (command.command_id, command.reason) == (request.request_id, "it diverged")
        back = training.RunCommandResult(command_id=command.command_id, run=told(run, step=7))
        await call.write(training.AttachRequest(result=back))
        assert (await waiting).run.step == 7
    call.cancel()


async def test_a_link_tells_of_its_own_run_only(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    result = training.RunCommandResult(command_id="c", run=told("runs/stranger"))
    for message, field in (
        (training.AttachRequest(run=told("runs/stranger")), "run.name"),
        (training.AttachRequest(result=result), "result.run.name"),
    ):
        call = await attach_training(channels["tolaria"], told(run))
        await call.write(training.AttachRequest())
        await call.write(message)
        error = await refusal(call.read())
        assert [violation.field for violation in error.violations] == [field]
    assert (await refusal(stub.GetRun(tolaria.GetRunRequest(name="runs/stranger")))).reason is Reason.RUN_NOT_FOUND


async def test_tolarias_bad_requests_name_the_field(channels: dict[str, Any], run: str) -> None:
    stub: Any = TrainingServiceStub(channels["tolaria"])
    link: Any = TrainingLinkServiceStub(channels["tolaria"])
    hello = training.TrainingHello
    calls = [
        (stub.GetRun(tolaria.GetRunRequest()), "name"),
        (stub.ListRuns(tolaria.ListRunsRequest(page_size=-1)), "page_size"),
        (stub.CreateCheckpoint(tolaria.CreateCheckpointRequest(request_id="c")), "run"),
        (stub.Rollback(tolaria.RollbackRequest(run=run, request_id="c", checkpoint="x")), "checkpoint"),
        (stub.PauseRun(tolaria.PauseRunRequest(name=run)), "request_id"),
        (link.Attach(iter(())).read(), "hello"),
        (link.Attach(iter([training.AttachRequest(hello=hello(incarnation=1))])).read(), "hello.run.name"),
        (link.Attach(iter([training.AttachRequest(hello=hello(run=told(run)))])).read(), "hello.incarnation"),
    ]
    for call, field in calls:
        error = await refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == [field]
    noise = await refusal(stub.ListRuns(tolaria.ListRunsRequest(page_token="noise")))
    assert noise.reason is Reason.INVALID_PAGE_TOKEN
    late = await refusal(stub.PauseRun(tolaria.PauseRunRequest(name=run, request_id="p")))
    assert late.reason is Reason.RUN_NOT_FOUND


# Both.


async def test_a_drain_ends_every_open_stream_at_once(tmp_path: Path) -> None:
    with single_service("kasmina", tmp_path) as first, single_service("tolaria", tmp_path) as second:
        async with (
            grpc.aio.insecure_channel(first.address) as to_kasmina,
            grpc.aio.insecure_channel(second.address) as to_tolaria,
        ):
            seeds: Any = KasminaServiceStub(to_kasmina)
            runs: Any = TrainingServiceStub(to_tolaria)
            watches = [seeds.WatchSeeds(kasmina.WatchSeedsRequest()), runs.WatchRun(tolaria.WatchRunRequest())]
            for watch in watches:
                assert (await watch.read()).change == ChangeType.CHANGE_TYPE_BOOKMARK
            links = [await attach_execution(to_kasmina, "runs/r"), await attach_training(to_tolaria, told("runs/r"))]
            assert (await watches[1].read()).run.attached
            silent: list[Any] = [
                ExecutionLinkServiceStub(to_kasmina).Attach(),
                TrainingLinkServiceStub(to_tolaria).Attach(),
            ]
            for call in silent:
                await call.wait_for_connection()
            # A later call on the same connection was served: the silent streams have arrived too.
            assert (await seeds.GetCacheStats(kasmina.GetCacheStatsRequest(run="runs/r"))).HasField("stats") is False
            await runs.ListRuns(tolaria.ListRunsRequest())
            first.drain()
            second.drain()
            for call in silent:
                assert (await refusal(call.read())).reason is Reason.DRAINING
            for call in links:
                assert await call.read() is grpc.aio.EOF
            async with asyncio.timeout(_SECONDS):
                while (left := await watches[1].read()) is not grpc.aio.EOF:
                    assert not left.run.attached
                assert await watches[0].read() is grpc.aio.EOF
        for gateway in (first, second):
            assert await asyncio.to_thread(gateway.process.wait, 5) == 0, "a drain must not wait for open streams"


async def test_a_gateway_that_was_killed_is_fed_again_by_the_real_link(tmp_path: Path) -> None:
    received: list[execution.AttachResponse] = []
    run = "runs/r"
    with single_service("kasmina", tmp_path) as first:
        async with grpc.aio.insecure_channel(
            first.address, options=[("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
        ) as channel:
            stub: Any = KasminaServiceStub(channel)
            link = GatewayLink(
                "kasmina",
                ExecutionLinkServiceStub(channel).Attach,
                lambda: execution.AttachRequest(hello=execution.ExecutionHello(run=run, incarnation=1)),
                received.append,
            )
            link.show("topology", execution.AttachRequest(topology=topology_pb2.Topology(run=run, parameters=7)))
            link.show("seed", execution.AttachRequest(seed=seed(run, "s0")))
            running = asyncio.ensure_future(link.run())

            async def known() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    seeds = (await stub.ListSeeds(kasmina.ListSeedsRequest(run=run))).seeds
                    network = (await stub.GetTopology(kasmina.GetTopologyRequest(run=run))).topology
                    return (len(seeds), network.parameters) == (1, 7)
                return False

            async def delivered(times: int) -> bool:
                return [message.apply.command_id for message in received].count("c1") == times

            await until(known)
            before = received[0].accepted.gateway_id
            await stub.ApplyAdaptation(germinate(run, "c1"))
            await until(lambda: delivered(1))
            first.kill()
            with single_service("kasmina", tmp_path, port=int(first.address.rsplit(":", 1)[1])):
                await until(known)
                after = [message.accepted.gateway_id for message in received if message.HasField("accepted")]
                assert after[0] == before
                assert after[-1] != before, "a new identity tells that the gateway knows nothing"
                # Its ledger died with it: the caller asks again with the same id, and the receiver drops repeats.
                lost = stub.GetAdaptation(kasmina.GetAdaptationRequest(name=f"{run}/adaptations/c1"))
                assert (await refusal(lost)).reason is Reason.ADAPTATION_NOT_FOUND
                await stub.ApplyAdaptation(germinate(run, "c1"))
                await until(lambda: delivered(2))
                link.close()
                await running
