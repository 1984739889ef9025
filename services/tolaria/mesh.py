"""All that a run says to the services and hears from them: one thread, one event loop, all grpc.aio clients.

It lives in a process of its own (:mod:`services.tolaria.mesh_process`): Python code beside the training thread would
take turns with it. Every method of :class:`MeshClient` may be called from any thread. None but ``decide`` and
``candidates`` waits for the network, and those have deadlines; what cannot be told is dropped and counted, never held.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc.aio
from google.protobuf.message import Message

from esper.kasmina.v1 import (
    adaptation_pb2,
    execution_link_service_pb2,
    kasmina_service_pb2,
    seed_pb2,
    topology_pb2,
)
from esper.kasmina.v1.execution_link_service_pb2_grpc import ExecutionLinkServiceStub
from esper.tamiyo.v1 import decision_pb2, observation_pb2, outcome_pb2, policy_service_pb2
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceStub
from esper.tolaria.v1 import run_pb2, training_link_service_pb2
from esper.tolaria.v1.training_link_service_pb2_grpc import TrainingLinkServiceStub
from esper.urza.v1 import blueprint_service_pb2, kernel_pb2
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from services.blueprints.spec import Blueprint
from services.chassis.channel import ChannelFactory
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, from_rpc_error
from services.chassis.events import EventPublisher, EventSubscriber
from services.chassis.telemetry import Telemetry, context_from, current_traceparent
from services.tolaria import kernels
from services.tolaria.links import GatewayLink
from services.tolaria.names import bare, run_name
from services.tolaria.ports import (
    ADAPTATION_COMMANDS,
    Command,
    CommandKind,
    CommandResult,
    Decision,
    EventCounts,
    KernelTarget,
    KernelUnavailableError,
    NoDecision,
    PendingKernel,
    Picture,
    PlannedChange,
)

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
#: How much longer than its deadline the training thread waits for the loop to say that the deadline is over, seconds.
_GRACE_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 5.0
_REMEMBERED_COMMANDS: Final = 4096
_RUN_COMMANDS: Final = {
    training_link_service_pb2.RUN_COMMAND_KIND_PAUSE: CommandKind.PAUSE,
    training_link_service_pb2.RUN_COMMAND_KIND_RESUME: CommandKind.RESUME,
    training_link_service_pb2.RUN_COMMAND_KIND_STOP: CommandKind.STOP,
    training_link_service_pb2.RUN_COMMAND_KIND_CHECKPOINT: CommandKind.CHECKPOINT,
    training_link_service_pb2.RUN_COMMAND_KIND_ROLLBACK: CommandKind.ROLLBACK,
}
_OUTCOME_RESULTS: Final = {
    seed_pb2.SEED_STATE_FOSSILIZED: kernel_pb2.KERNEL_OUTCOME_RESULT_FOSSILIZED,
    seed_pb2.SEED_STATE_CULLED: kernel_pb2.KERNEL_OUTCOME_RESULT_CULLED,
    seed_pb2.SEED_STATE_ROLLED_BACK: kernel_pb2.KERNEL_OUTCOME_RESULT_ROLLED_BACK,
}


class MeshClient:
    """The mesh of one run (``ports.Mesh``).

    Args:
        config: The whole configuration.
        run: Id of the run.
        run_dir: The run folder, where the addresses of the services are.
        shelf: Where verified kernels go.
        telemetry: Spans of the training process.
        incarnation: Rises with every start of the run's training process.
    """

    def __init__(
        self,
        *,
        config: EsperConfig,
        run: str,
        run_dir: Path,
        shelf: kernels.Shelf,
        telemetry: Telemetry,
        incarnation: int,
    ) -> None:
        self._config = config
        self._run = run
        self._run_dir = run_dir
        self._shelf = shelf
        self._telemetry = telemetry
        self._incarnation = incarnation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mesh", daemon=True)
        # Shared by both threads, under the lock.
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._waiting: deque[Command] = deque()
        self._results: OrderedDict[str, CommandResult | None] = OrderedDict()
        self._picture = run_pb2.Run(name=run_name(run))
        # The loop's own.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._searches: set[asyncio.Task[Any]] = set()
        self._known: Sequence[Blueprint] = ()
        self._publisher: EventPublisher | None = None

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect to the services, all at once and in the background. Raises EsperError (ADDRESS_UNKNOWN)."""
        self._thread.start()
        self._call(self._start()).result()

    async def _start(self) -> None:
        services = self._config.services
        self._channels = ChannelFactory(services, self._telemetry, run_dir=self._run_dir, run_id=self._run)
        channel = self._channels.channel
        self._policy = PolicyServiceStub(channel("tamiyo"))
        self._library = BlueprintServiceStub(channel("urza"))
        wanted = self._config.growth.blueprints
        self._kernels = kernels.KernelSource(self._run, channel("urza"), channel("tezzeret"), self._shelf, wanted)
        self._publisher = EventPublisher(
            channel("oona"), "tolaria", self._telemetry, self._config.telemetry.event_queue_size
        )
        await self._publisher.start()
        group = f"tolaria-{self._run}"
        self._subscriber = EventSubscriber(channel("oona"), group, kernels.TOPICS, self._telemetry, latest=True)
        self._kasmina = GatewayLink(
            "kasmina", ExecutionLinkServiceStub(channel("kasmina")).Attach, self._execution_hello, self._from_kasmina
        )
        self._tolaria = GatewayLink(
            "tolaria", TrainingLinkServiceStub(channel("tolaria")).Attach, self._training_hello, self._from_tolaria
        )
        self._links = [asyncio.ensure_future(link.run()) for link in (self._kasmina, self._tolaria)]
        self._listening = asyncio.ensure_future(self._kernels.listen(self._subscriber))

    def stop(self) -> None:
        """Say what is still to be said, for at most a few seconds, and disconnect."""
        self._call(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._subscriber.stop()
        for search in self._searches:  # nobody will take what they find
            search.cancel()
        for link in (self._kasmina, self._tolaria):
            link.close()
        assert self._publisher is not None, "stop() comes after start()"
        waited = [
            *self._links,
            self._listening,
            *self._tasks,
            *self._searches,
            asyncio.ensure_future(self._publisher.stop(_STOP_SECONDS)),
        ]
        _, late = await asyncio.wait(waited, timeout=_STOP_SECONDS + _GRACE_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._channels.close()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # ---- asking ----------------------------------------------------------------------------------------------------

    def candidates(self) -> Sequence[Blueprint]:
        """Blueprints as Urza has them now, or as it had them last if it does not answer in time."""
        deadline = self._config.growth.decision_deadline_seconds
        future = self._call(self._candidates(deadline, current_traceparent()))
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._known = future.result(deadline + _GRACE_SECONDS)
        return self._known

    async def _candidates(self, deadline: float, cause: str | None) -> Sequence[Blueprint]:
        with self._telemetry.span("list blueprints", parent=context_from(cause)):
            try:
                return await self._kernels.blueprints(deadline)
            except grpc.aio.AioRpcError as error:
                _LOG.warning("Urza did not list its blueprints: %s %s", error.code().name, error.details())
                return self._known

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """Ask Tamiyo; see ``ports.Mesh``."""
        started = time.perf_counter()
        request = policy_service_pb2.DecideRequest(
            observation=observation,
            policy=policy if policy.startswith("policies/") else f"policies/{policy}",
            request_id=request_id,
        )
        future = self._call(self._decide(request, deadline, current_traceparent()))
        try:
            answer = future.result(deadline + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            return NoDecision(f"Tamiyo did not answer within {deadline:g} s", _milliseconds_since(started))
        except EsperError as error:
            return NoDecision(f"Tamiyo gave no decision: {error}", _milliseconds_since(started))
        return _decision(answer, _milliseconds_since(started))

    async def _decide(
        self, request: policy_service_pb2.DecideRequest, deadline: float, cause: str | None
    ) -> decision_pb2.Decision:
        with self._telemetry.span("ask Tamiyo", parent=context_from(cause)):
            try:
                return (await self._policy.Decide(request, timeout=deadline)).decision
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

    def obtain_kernel(self, target: KernelTarget) -> PendingKernel:
        """Go after a kernel; see ``ports.Mesh``."""
        return PendingKernel(self._call(self._obtain(target, current_traceparent())))

    async def _obtain(self, target: KernelTarget, cause: str | None) -> str:
        task = asyncio.current_task()
        assert task is not None, "this runs as a task"
        self._searches.add(task)
        task.add_done_callback(self._searches.discard)
        blueprint, parent = target.blueprint.id, context_from(cause)
        with self._telemetry.span("obtain kernel", {"esper.blueprint": blueprint}, parent=parent):
            return await self._kernels.obtain(target)

    # ---- telling ---------------------------------------------------------------------------------------------------

    def report_outcome(self, outcome: outcome_pb2.Outcome, kernel: str) -> None:
        """Tell Tamiyo, and Urza about the ``kernel`` (empty: there was none)."""
        self._call(self._report(outcome, kernel, current_traceparent()))

    async def _report(self, outcome: outcome_pb2.Outcome, kernel: str, cause: str | None) -> None:
        task = asyncio.current_task()
        assert task is not None, "this runs as a task"
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        request_id = f"{outcome.seed}/{self._incarnation}"
        with self._telemetry.span("report outcome", {"esper.seed": bare(outcome.seed)}, parent=context_from(cause)):
            calls: list[Any] = [
                self._policy.ReportOutcome(
                    policy_service_pb2.ReportOutcomeRequest(outcome=outcome, request_id=request_id)
                )
            ]
            if kernel and outcome.state in _OUTCOME_RESULTS:
                result = kernel_pb2.KernelOutcome(seed=outcome.seed, result=_OUTCOME_RESULTS[outcome.state])
                if outcome.HasField("contribution"):
                    result.contribution.CopyFrom(outcome.contribution)
                calls.append(
                    self._library.RecordKernelOutcome(
                        blueprint_service_pb2.RecordKernelOutcomeRequest(
                            name=kernel, outcome=result, request_id=request_id
                        )
                    )
                )
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(answer, grpc.aio.AioRpcError):
                    _LOG.warning("%s: its outcome was not taken: %s", outcome.seed, answer.details())

    def publish(self, topic: str, key: str, payload: Message) -> None:
        """Queue one event; dropped and counted when the queue is full."""
        assert self._publisher is not None, "publish() comes after start()"
        self._publisher.publish(topic, key, payload)

    def event_counts(self) -> EventCounts:
        """What became of the events so far."""
        assert self._publisher is not None, "event_counts() comes after start()"
        counts = self._publisher.counts
        return EventCounts(counts.published, counts.dropped + counts.rejected)

    def show(self, picture: Picture) -> None:
        """Let the gateways know; see ``ports.Mesh``."""
        if isinstance(picture, run_pb2.Run):
            with self._lock:
                self._picture = picture
        self._loop.call_soon_threadsafe(self._show, picture)

    def _show(self, picture: Picture) -> None:
        up = execution_link_service_pb2.AttachRequest
        if isinstance(picture, run_pb2.Run):
            self._tolaria.show("run", training_link_service_pb2.AttachRequest(run=picture))
        elif isinstance(picture, topology_pb2.Topology):
            self._kasmina.show("topology", up(topology=picture))
        elif isinstance(picture, seed_pb2.Seed):
            self._kasmina.show(picture.name, up(seed=picture))
        elif isinstance(picture, kasmina_service_pb2.HealthReport):
            self._kasmina.show("health", up(health=picture))
        else:
            self._kasmina.show("cache", up(cache=picture))

    # ---- obeying ---------------------------------------------------------------------------------------------------

    def commands(self) -> Sequence[Command]:
        """Commands that arrived since the last call. Costs one attribute look when there are none."""
        if not self._waiting:
            return ()
        with self._lock:
            found = list(self._waiting)
            self._waiting.clear()
            self._arrived.clear()
        return found

    @property
    def waiting(self) -> bool:
        """Whether :meth:`commands` has something to say."""
        return bool(self._waiting)

    def wait(self, timeout: float) -> None:
        """Sleep until a command may have arrived."""
        self._arrived.wait(timeout)

    def answer(self, result: CommandResult) -> None:
        """Tell the gateway, now and whenever it asks again."""
        with self._lock:
            self._results[result.command.command_id] = result
            while len(self._results) > _REMEMBERED_COMMANDS:
                self._results.popitem(last=False)
        self._loop.call_soon_threadsafe(self._send_result, result)

    def _send_result(
        self, result: CommandResult, state: adaptation_pb2.AdaptationState.ValueType | None = None
    ) -> None:
        command = result.command
        if command.kind in ADAPTATION_COMMANDS:
            refused = adaptation_pb2.ADAPTATION_STATE_REFUSED
            outcome = execution_link_service_pb2.CommandResult(
                command_id=command.command_id,
                state=state or (refused if result.error_reason else adaptation_pb2.ADAPTATION_STATE_APPLIED),
                seed=f"{run_name(self._run)}/seeds/{result.seed}" if result.seed else "",
                applied_step=result.step,
                error_reason=result.error_reason,
                error_message=result.error_message,
            )
            self._kasmina.send(f"result/{command.command_id}", execution_link_service_pb2.AttachRequest(result=outcome))
            return
        answer = training_link_service_pb2.RunCommandResult(
            command_id=command.command_id, error_reason=result.error_reason, error_message=result.error_message
        )
        with self._lock:
            answer.run.CopyFrom(self._picture)
        if result.checkpoint_step is not None:
            answer.checkpoint.name = f"{run_name(self._run)}/checkpoints/{result.checkpoint_step}"
            answer.checkpoint.step = result.checkpoint_step
        self._tolaria.send(f"result/{command.command_id}", training_link_service_pb2.AttachRequest(result=answer))

    def _take(self, command: Command) -> None:
        """A command from a gateway, perhaps again: what was answered is answered again, what waits waits."""
        with self._lock:
            known = command.command_id in self._results
            result = self._results.get(command.command_id)
            if not known:
                self._results[command.command_id] = None
                self._waiting.append(command)
                self._arrived.set()
        if result is not None:
            self._send_result(result)

    def _execution_hello(self) -> Message:
        hello = execution_link_service_pb2.ExecutionHello(run=run_name(self._run), incarnation=self._incarnation)
        return execution_link_service_pb2.AttachRequest(hello=hello)

    def _training_hello(self) -> Message:
        with self._lock:
            hello = training_link_service_pb2.TrainingHello(run=self._picture, incarnation=self._incarnation)
        return training_link_service_pb2.AttachRequest(hello=hello)

    def _from_kasmina(self, message: execution_link_service_pb2.AttachResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "apply":
            self._take(_adaptation(message.apply))
        elif kind == "cancel":
            self._withdraw(message.cancel)
        elif kind == "prefetch":
            task = asyncio.ensure_future(self._prefetch(message.prefetch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _from_tolaria(self, message: training_link_service_pb2.AttachResponse) -> None:
        command = message.command
        if message.WhichOneof("message") == "command" and command.kind in _RUN_COMMANDS:
            self._take(
                Command(
                    command_id=command.command_id,
                    kind=_RUN_COMMANDS[command.kind],
                    reason=command.reason,
                    checkpoint=bare(command.checkpoint),
                )
            )

    def _withdraw(self, command_id: str) -> None:
        """Take a command back if the training thread does not have it yet; otherwise its result says what became."""
        with self._lock:
            found = [command for command in self._waiting if command.command_id == command_id]
            for command in found:
                self._waiting.remove(command)
            if not self._waiting:
                self._arrived.clear()
        for command in found:
            cancelled = CommandResult(command=command, step=0)
            self._send_result(cancelled, adaptation_pb2.ADAPTATION_STATE_CANCELLED)

    async def _prefetch(self, name: str) -> None:
        try:
            await self._kernels.download(name)
        except (grpc.aio.AioRpcError, KernelUnavailableError) as error:
            _LOG.warning("%s was not prefetched: %s", name, error)


def _adaptation(command: adaptation_pb2.AdaptationCommand) -> Command:
    if command.WhichOneof("action") == "cull":
        return Command(
            command_id=command.command_id,
            kind=CommandKind.CULL,
            reason=command.cull.reason,
            requester=command.requester,
            seed=bare(command.cull.seed),
        )
    return Command(
        command_id=command.command_id,
        kind=CommandKind.GERMINATE,
        reason=command.germinate.reason,
        requester=command.requester,
        slot=bare(command.germinate.slot),
        blueprint=bare(command.germinate.blueprint),
        size=command.germinate.size,
    )


def _decision(answer: decision_pb2.Decision, latency_ms: float) -> Decision:
    return Decision(
        decision=bare(answer.name),
        policy=answer.policy,
        plan=tuple(
            PlannedChange(bare(change.slot), bare(change.blueprint), change.size, change.reason)
            for change in answer.plan
        ),
        evidence=tuple(_evidence(item) for item in answer.evidence),
        explanation=answer.explanation,
        latency_ms=latency_ms,
    )


def _evidence(item: decision_pb2.SlotEvidence) -> dict[str, Any]:
    return {
        "slot": bare(item.slot),
        "width": item.width,
        "planned_width": item.planned_width,
        "need": item.need if item.HasField("need") else None,
        "chosen": item.chosen,
        "reason": item.reason,
    }


def _milliseconds_since(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)
