"""gRPC face of Tolaria's gateway: control for users, the link for training processes."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any, Final

from grpc.aio import ServicerContext

from esper.tolaria.v1 import training_service_pb2 as pb
from esper.tolaria.v1.training_link_service_pb2 import (
    RUN_COMMAND_KIND_CHECKPOINT,
    RUN_COMMAND_KIND_PAUSE,
    RUN_COMMAND_KIND_RESUME,
    RUN_COMMAND_KIND_ROLLBACK,
    RUN_COMMAND_KIND_STOP,
    AttachAccepted,
    AttachRequest,
    AttachResponse,
    RunCommand,
    RunCommandKind,
    RunCommandResult,
)
from esper.tolaria.v1.training_link_service_pb2_grpc import TrainingLinkServiceServicer
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceServicer
from services.chassis.errors import required
from services.chassis.ids import new_id, parse_name
from services.chassis.link import first_message, serve_link
from services.chassis.pagination import decode_offset, encode_token, page_size_of
from services.tolaria.gateway import TolariaGateway

_ALL_RUNS: Final = {"runs": "all"}


class TrainingServicer(TrainingServiceServicer):
    """``esper.tolaria.v1.TrainingService``."""

    def __init__(self, gateway: TolariaGateway, *, draining: asyncio.Event) -> None:
        self._gateway = gateway
        self._draining = draining

    async def GetRun(
        self, request: pb.GetRunRequest, context: ServicerContext[pb.GetRunRequest, pb.GetRunResponse]
    ) -> pb.GetRunResponse:
        """See the contract."""
        return pb.GetRunResponse(run=self._gateway.run(_run(request.name)))

    async def ListRuns(
        self, request: pb.ListRunsRequest, context: ServicerContext[pb.ListRunsRequest, pb.ListRunsResponse]
    ) -> pb.ListRunsResponse:
        """See the contract."""
        size = page_size_of(request.page_size)
        start = decode_offset(_ALL_RUNS, request.page_token)
        runs = self._gateway.runs()
        token = encode_token(_ALL_RUNS, str(start + size)) if len(runs) > start + size else ""
        return pb.ListRunsResponse(runs=runs[start : start + size], next_page_token=token)

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: ServicerContext[pb.WatchRunRequest, pb.WatchRunResponse]
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """See the contract."""
        name = request.name and _run(request.name)
        stream = self._gateway.hub.watch(
            snapshot=self._gateway.runs,  # what matches; a run may attach later
            draining=self._draining,
            match=lambda run: name in ("", run.name),
            resume_token=request.resume_token or None,
        )
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield pb.WatchRunResponse(
                    change=item.change, run=item.item, revision=item.revision, resume_token=item.token
                )

    async def PauseRun(
        self, request: pb.PauseRunRequest, context: ServicerContext[pb.PauseRunRequest, pb.PauseRunResponse]
    ) -> pb.PauseRunResponse:
        """See the contract."""
        result = await self._command(request.name, RUN_COMMAND_KIND_PAUSE, request, context)
        return pb.PauseRunResponse(run=result.run)

    async def ResumeRun(
        self, request: pb.ResumeRunRequest, context: ServicerContext[pb.ResumeRunRequest, pb.ResumeRunResponse]
    ) -> pb.ResumeRunResponse:
        """See the contract."""
        result = await self._command(request.name, RUN_COMMAND_KIND_RESUME, request, context)
        return pb.ResumeRunResponse(run=result.run)

    async def StopRun(
        self, request: pb.StopRunRequest, context: ServicerContext[pb.StopRunRequest, pb.StopRunResponse]
    ) -> pb.StopRunResponse:
        """See the contract."""
        result = await self._command(request.name, RUN_COMMAND_KIND_STOP, request, context, reason=request.reason)
        return pb.StopRunResponse(run=result.run)

    async def CreateCheckpoint(
        self,
        request: pb.CreateCheckpointRequest,
        context: ServicerContext[pb.CreateCheckpointRequest, pb.CreateCheckpointResponse],
    ) -> pb.CreateCheckpointResponse:
        """See the contract."""
        result = await self._command(request.run, RUN_COMMAND_KIND_CHECKPOINT, request, context, field="run")
        return pb.CreateCheckpointResponse(checkpoint=result.checkpoint)

    async def Rollback(
        self, request: pb.RollbackRequest, context: ServicerContext[pb.RollbackRequest, pb.RollbackResponse]
    ) -> pb.RollbackResponse:
        """See the contract."""
        if request.checkpoint:
            parse_name("runs/{r}/checkpoints/{c}", request.checkpoint, field="checkpoint")
        result = await self._command(
            request.run,
            RUN_COMMAND_KIND_ROLLBACK,
            request,
            context,
            field="run",
            reason=request.reason,
            checkpoint=request.checkpoint,
        )
        return pb.RollbackResponse(run=result.run)

    async def _command(
        self,
        run: str,
        kind: RunCommandKind.ValueType,
        request: Any,
        context: ServicerContext[Any, Any],
        *,
        field: str = "name",
        reason: str = "",
        checkpoint: str = "",
    ) -> RunCommandResult:
        _run(run, field=field)
        if not request.request_id:
            raise required("request_id")
        command = RunCommand(command_id=request.request_id, kind=kind, reason=reason, checkpoint=checkpoint)
        remaining: float | None = context.time_remaining()
        return await self._gateway.command(run, command, remaining=math.inf if remaining is None else remaining)


class TrainingLinkServicer(TrainingLinkServiceServicer):
    """``esper.tolaria.v1.TrainingLinkService``."""

    def __init__(self, gateway: TolariaGateway, *, draining: asyncio.Event) -> None:
        self._gateway = gateway
        self._draining = draining
        self._gateway_id = new_id()

    async def Attach(
        self, request_iterator: AsyncIterator[AttachRequest], context: ServicerContext[AttachRequest, AttachResponse]
    ) -> AsyncIterator[AttachResponse]:
        """See the contract."""
        requests = aiter(request_iterator)
        first = await first_message(requests, self._draining)
        if first is None or first.WhichOneof("message") != "hello":
            raise required("hello")
        run = _run(first.hello.run.name, field="hello.run.name")
        if first.hello.incarnation < 1:
            raise required("hello.incarnation")
        link = self._gateway.links.attach(run, first.hello.incarnation)

        def take(message: AttachRequest) -> None:
            self._gateway.take(run, message)

        take(first)
        commands = serve_link(requests, link, self._gateway.links, take, self._draining)
        try:
            yield AttachResponse(accepted=AttachAccepted(gateway_id=self._gateway_id))
            async with contextlib.aclosing(commands):
                async for command in commands:
                    yield command
        finally:
            self._gateway.links.detach(link)
            self._gateway.detached(run)


def _run(name: str, *, field: str = "name") -> str:
    parse_name("runs/{r}", name, field=field)
    return name
