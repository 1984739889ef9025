"""What Tolaria's gateway knows: the runs as their training processes last told, and the commands it passes on."""

from __future__ import annotations

import asyncio

from esper.common.v1.common_pb2 import ChangeType
from esper.tolaria.v1 import run_pb2, training_link_service_pb2
from services.chassis.errors import EsperError, Reason, invalid, not_found, reason_named
from services.chassis.idempotency import digest_of
from services.chassis.link import LinkRegistry
from services.chassis.watch import WatchHub

AttachResponse = training_link_service_pb2.AttachResponse
RunCommand = training_link_service_pb2.RunCommand
RunCommandResult = training_link_service_pb2.RunCommandResult

_ENDED = frozenset({run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_STOPPED})
# Left of a call's deadline when the gateway stops waiting for the training process, seconds: enough to say so.
_MARGIN_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 60.0
# Commands that were answered and are kept for those who ask again; the oldest go first.
_KEPT_COMMANDS = 1000


class TolariaGateway:
    """Runs by name, the watches on them, and the commands under way. For one event loop."""

    def __init__(self, *, command_limit: int) -> None:
        self.links: LinkRegistry[AttachResponse] = LinkRegistry(command_limit)
        self.hub: WatchHub[run_pb2.Run] = WatchHub()
        self._runs: dict[str, run_pb2.Run] = {}
        self._commands: dict[tuple[str, str], tuple[str, asyncio.Future[RunCommandResult]]] = {}

    def runs(self) -> list[run_pb2.Run]:
        """All runs, newest first."""
        return sorted(self._runs.values(), key=lambda run: (run.start_time.ToNanoseconds(), run.name), reverse=True)

    def run(self, name: str) -> run_pb2.Run:
        """One run.

        Raises:
            EsperError: RUN_NOT_FOUND.
        """
        if name not in self._runs:
            raise not_found("run", name, reason=Reason.RUN_NOT_FOUND)
        return self._runs[name]

    def take(self, name: str, message: training_link_service_pb2.AttachRequest) -> None:
        """Take over what the training process of run ``name`` pushed.

        Raises:
            EsperError: INVALID_FIELD for the picture of another run.
        """
        match message.WhichOneof("message"):
            case "hello":
                self._take_run(name, message.hello.run, "hello.run.name")
            case "run":
                self._take_run(name, message.run, "run.name")
            case "result":
                self._answer(name, message.result)
            case _:
                pass  # a kind of message that a newer training process knows

    def detached(self, name: str) -> None:
        """The stream of a run is over; the run stays known. Nobody will answer what still waits if the run is over."""
        run, attached = self._runs[name], self.links.attached(name)
        self._put(run, attached=attached)
        if attached or run.state not in _ENDED:
            return
        for (owner, command_id), (_, answer) in self._commands.items():
            if owner == name and not answer.done():
                self.links.answered(name, command_id)
                answer.set_result(
                    RunCommandResult(
                        command_id=command_id,
                        error_reason=Reason.RUN_ALREADY_ENDED,
                        error_message="the run ended before the command was applied",
                    )
                )

    def _take_run(self, name: str, run: run_pb2.Run, field: str) -> None:
        if run.name != name:
            raise invalid(field, f"{run.name!r} is not the run of this link, {name!r}", "tell of one run per link")
        self._put(run, attached=True)

    def _put(self, run: run_pb2.Run, *, attached: bool) -> None:
        told = run_pb2.Run()
        told.CopyFrom(run)
        told.attached = attached
        known = self._runs.get(run.name)
        if known == told:
            return
        self._runs[run.name] = told
        self.hub.publish(told, ChangeType.CHANGE_TYPE_ADDED if known is None else ChangeType.CHANGE_TYPE_MODIFIED)

    def _answer(self, name: str, result: RunCommandResult) -> None:
        if result.HasField("run"):
            self._take_run(name, result.run, "result.run.name")
        self.links.answered(name, result.command_id)
        command = self._commands.get((name, result.command_id))
        if command is not None and not command[1].done():
            command[1].set_result(result)

    async def command(self, name: str, command: RunCommand, *, remaining: float) -> RunCommandResult:
        """Pass a command on and wait for its result; the same command id again waits for the same result.

        Args:
            name: ``runs/{r}``.
            command: what to do.
            remaining: seconds until the caller's deadline.

        Raises:
            EsperError: RUN_NOT_FOUND, RUN_ALREADY_ENDED, RUN_NOT_ATTACHED, COMMAND_QUEUE_FULL, REQUEST_ID_REUSED,
                DEADLINE_EXCEEDED (the command stays on its way), or what the training process refused it with.
        """
        key, digest = (name, command.command_id), digest_of(command)
        run = self.run(name)
        if key not in self._commands:
            self._accepts(run)
            self.links.send(name, command.command_id, AttachResponse(command=command))
            self._commands[key] = (digest, asyncio.get_running_loop().create_future())
            self._forget_old()
        known, answer = self._commands[key]
        if known != digest:
            raise EsperError(
                f"request_id {command.command_id!r} was used for another command: choose a new one",
                reason=Reason.REQUEST_ID_REUSED,
            )
        wait = max(min(remaining - _MARGIN_SECONDS, _LONGEST_WAIT_SECONDS), 0.0)
        done, _ = await asyncio.wait([answer], timeout=wait)
        if not done:
            raise EsperError(
                f"{name}: the command waits for the next safe point; ask again with the same request_id for its result",
                reason=Reason.DEADLINE_EXCEEDED,
                metadata={"command_id": command.command_id},
            )
        result = answer.result()
        if result.error_reason:
            raise EsperError(f"{name}: {result.error_message}", reason=reason_named(result.error_reason))
        return result

    def _forget_old(self) -> None:
        answered = [key for key, (_, answer) in self._commands.items() if answer.done()]
        for key in answered[: max(len(answered) - _KEPT_COMMANDS, 0)]:
            del self._commands[key]

    def _accepts(self, run: run_pb2.Run) -> None:
        if run.state in _ENDED:
            raise EsperError(f"{run.name} is over ({run.reason or 'no reason given'})", reason=Reason.RUN_ALREADY_ENDED)
        if not self.links.attached(run.name):
            raise EsperError(
                f"{run.name}: its training process is not attached now", reason=Reason.RUN_NOT_ATTACHED, retry_after=1.0
            )
