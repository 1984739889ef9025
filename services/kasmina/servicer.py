"""gRPC face of Kasmina's gateway: control for users, the link for training processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from grpc.aio import ServicerContext

from esper.kasmina.v1 import kasmina_service_pb2 as pb
from esper.kasmina.v1.execution_link_service_pb2 import AttachAccepted, AttachRequest, AttachResponse
from esper.kasmina.v1.execution_link_service_pb2_grpc import ExecutionLinkServiceServicer
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceServicer
from services.chassis.errors import invalid, required
from services.chassis.ids import new_id, parse_name
from services.chassis.link import first_message, serve_link
from services.chassis.pagination import decode_offset, encode_token, page_size_of
from services.kasmina.gateway import KasminaGateway


class KasminaServicer(KasminaServiceServicer):
    """``esper.kasmina.v1.KasminaService``."""

    def __init__(self, gateway: KasminaGateway, *, draining: asyncio.Event) -> None:
        self._gateway = gateway
        self._draining = draining

    async def GetTopology(
        self, request: pb.GetTopologyRequest, context: ServicerContext[pb.GetTopologyRequest, pb.GetTopologyResponse]
    ) -> pb.GetTopologyResponse:
        """See the contract."""
        return pb.GetTopologyResponse(topology=self._gateway.topology(_run(request.run)))

    async def ListSeeds(
        self, request: pb.ListSeedsRequest, context: ServicerContext[pb.ListSeedsRequest, pb.ListSeedsResponse]
    ) -> pb.ListSeedsResponse:
        """See the contract."""
        states = set(request.states)
        scope = {"seeds of": request.run, "states": sorted(states)}
        size = page_size_of(request.page_size)
        start = decode_offset(scope, request.page_token)
        seeds = self._gateway.seeds(_run(request.run), lambda seed: not states or seed.state in states)
        token = encode_token(scope, str(start + size)) if len(seeds) > start + size else ""
        return pb.ListSeedsResponse(seeds=seeds[start : start + size], next_page_token=token)

    async def GetSeed(
        self, request: pb.GetSeedRequest, context: ServicerContext[pb.GetSeedRequest, pb.GetSeedResponse]
    ) -> pb.GetSeedResponse:
        """See the contract."""
        run, _ = parse_name("runs/{r}/seeds/{s}", request.name)
        return pb.GetSeedResponse(seed=self._gateway.seed(f"runs/{run}", request.name))

    async def WatchSeeds(
        self, request: pb.WatchSeedsRequest, context: ServicerContext[pb.WatchSeedsRequest, pb.WatchSeedsResponse]
    ) -> AsyncIterator[pb.WatchSeedsResponse]:
        """See the contract."""
        run = request.run and _run(request.run)
        stream = self._gateway.hub.watch(
            snapshot=lambda: self._gateway.seeds(""),  # what matches; a run may attach later
            draining=self._draining,
            match=self._gateway.watches(run),
            resume_token=request.resume_token or None,
        )
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield pb.WatchSeedsResponse(
                    change=item.change, seed=item.item, revision=item.revision, resume_token=item.token
                )

    async def ApplyAdaptation(
        self,
        request: pb.ApplyAdaptationRequest,
        context: ServicerContext[pb.ApplyAdaptationRequest, pb.ApplyAdaptationResponse],
    ) -> pb.ApplyAdaptationResponse:
        """See the contract."""
        command = request.command
        parse_name("{command_id}", command.command_id, field="command.command_id")
        _run(command.run, field="command.run")
        match command.WhichOneof("action"):
            case "germinate":
                _of_run(command.run, "runs/{r}/slots/{slot}", command.germinate.slot, field="command.germinate.slot")
                parse_name("blueprints/{b}", command.germinate.blueprint, field="command.germinate.blueprint")
                if (size := command.germinate.size) == 0:
                    raise required("command.germinate.size")
                if size < 0:
                    raise invalid("command.germinate.size", f"{size} is no size", "give 1 or more")
            case "cull":
                _of_run(command.run, "runs/{r}/seeds/{s}", command.cull.seed, field="command.cull.seed")
            case _:
                raise required("command.action")
        return pb.ApplyAdaptationResponse(adaptation=self._gateway.apply(command))

    async def GetAdaptation(
        self,
        request: pb.GetAdaptationRequest,
        context: ServicerContext[pb.GetAdaptationRequest, pb.GetAdaptationResponse],
    ) -> pb.GetAdaptationResponse:
        """See the contract."""
        run, command_id = parse_name("runs/{r}/adaptations/{a}", request.name)
        return pb.GetAdaptationResponse(adaptation=self._gateway.adaptation(f"runs/{run}", command_id))

    async def CancelAdaptation(
        self,
        request: pb.CancelAdaptationRequest,
        context: ServicerContext[pb.CancelAdaptationRequest, pb.CancelAdaptationResponse],
    ) -> pb.CancelAdaptationResponse:
        """See the contract."""
        run, command_id = parse_name("runs/{r}/adaptations/{a}", request.name)
        return pb.CancelAdaptationResponse(adaptation=self._gateway.cancel(f"runs/{run}", command_id))

    async def PrefetchKernel(
        self,
        request: pb.PrefetchKernelRequest,
        context: ServicerContext[pb.PrefetchKernelRequest, pb.PrefetchKernelResponse],
    ) -> pb.PrefetchKernelResponse:
        """See the contract."""
        run = _run(request.run)
        parse_name("blueprints/{b}/kernels/{k}", request.kernel, field="kernel")
        if not request.request_id:
            raise required("request_id")
        # Not remembered: a kernel that was fetched is in the cache, so asking twice is asking once.
        return pb.PrefetchKernelResponse(accepted=self._gateway.prefetch(run, request.kernel))

    async def GetCacheStats(
        self,
        request: pb.GetCacheStatsRequest,
        context: ServicerContext[pb.GetCacheStatsRequest, pb.GetCacheStatsResponse],
    ) -> pb.GetCacheStatsResponse:
        """See the contract."""
        return pb.GetCacheStatsResponse(stats=self._gateway.picture(_run(request.run)).cache)

    async def GetHealthReport(
        self,
        request: pb.GetHealthReportRequest,
        context: ServicerContext[pb.GetHealthReportRequest, pb.GetHealthReportResponse],
    ) -> pb.GetHealthReportResponse:
        """See the contract."""
        return pb.GetHealthReportResponse(report=self._gateway.health(_run(request.run)))


class ExecutionLinkServicer(ExecutionLinkServiceServicer):
    """``esper.kasmina.v1.ExecutionLinkService``."""

    def __init__(self, gateway: KasminaGateway, *, draining: asyncio.Event) -> None:
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
        run = _run(first.hello.run, field="hello.run")
        if first.hello.incarnation < 1:
            raise required("hello.incarnation")
        link = self._gateway.attach(run, first.hello.incarnation)

        def take(message: AttachRequest) -> None:
            self._gateway.take(run, message)

        commands = serve_link(requests, link, self._gateway.links, take, self._draining)
        try:
            yield AttachResponse(accepted=AttachAccepted(gateway_id=self._gateway_id))
            async with contextlib.aclosing(commands):
                async for command in commands:
                    yield command
        finally:
            self._gateway.links.detach(link)


def _run(name: str, *, field: str = "run") -> str:
    parse_name("runs/{r}", name, field=field)
    return name


def _of_run(run: str, pattern: str, name: str, *, field: str) -> None:
    parse_name(pattern, name, field=field)
    if not name.startswith(f"{run}/"):
        raise invalid(field, f"{name!r} is of another run than {run!r}", "name one of the command's run")
