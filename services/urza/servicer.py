"""gRPC face of Urza: translates, checks what a request must hold, and hands over to the library."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from esper.common.v1.common_pb2 import CHANGE_TYPE_ADDED, CHANGE_TYPE_MODIFIED
from esper.urza.v1 import blueprint_service_pb2 as pb
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceServicer
from services.blueprints.signature import interface_signature
from services.chassis.errors import EsperError, Reason, invalid, required
from services.chassis.idempotency import RequestCache
from services.chassis.ids import parse_name
from services.chassis.pagination import decode_token, encode_token, page_size_of
from services.chassis.watch import WatchHub
from services.urza import wire
from services.urza.library import CHUNK_BYTES, Library, UploadHeader
from services.urza.metadata import BlueprintQuery, Cursor, KernelQuery
from services.urza.records import BlueprintRecord, KernelRecord, KernelStatus

_T = TypeVar("_T")
_RecordT = TypeVar("_RecordT", BlueprintRecord, KernelRecord)
_SNAPSHOT_PAGE = 1000
_BLUEPRINT = "blueprints/{b}"
_KERNEL = "blueprints/{b}/kernels/{k}"


class BlueprintServicer(BlueprintServiceServicer):
    """``esper.urza.v1.BlueprintService``. The library blocks, so its calls run in ``pool``, off the loop."""

    def __init__(self, library: Library, pool: ThreadPoolExecutor, *, draining: asyncio.Event) -> None:
        self._library = library
        self._pool = pool
        self._draining = draining
        self._hub: WatchHub[BlueprintRecord] = WatchHub()
        self._requests = RequestCache()

    async def _run(self, work: Callable[..., _T], *arguments: Any, **keywords: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*arguments, **keywords))

    async def CreateBlueprint(  # the contract's name
        self,
        request: pb.CreateBlueprintRequest,
        context: ServicerContext[pb.CreateBlueprintRequest, pb.CreateBlueprintResponse],
    ) -> pb.CreateBlueprintResponse:
        """See the contract."""
        if not request.HasField("spec"):
            raise required("spec")
        blueprint = wire.read_blueprint(request.spec)
        parent = parse_name(_BLUEPRINT, request.parent, field="parent")[0] if request.parent else ""

        async def create() -> pb.CreateBlueprintResponse:
            record, created = await self._run(
                self._library.create_blueprint,
                blueprint,
                display_name=request.display_name,
                description=request.description,
                tags=request.tags,
                parent=parent,
            )
            if created:
                self._hub.publish(record, CHANGE_TYPE_ADDED)
            return pb.CreateBlueprintResponse(blueprint=wire.write_blueprint(record), created=created)

        return await self._requests.once("CreateBlueprint", request, create)

    async def GetBlueprint(  # the contract's name
        self, request: pb.GetBlueprintRequest, context: ServicerContext[pb.GetBlueprintRequest, pb.GetBlueprintResponse]
    ) -> pb.GetBlueprintResponse:
        """See the contract."""
        (blueprint,) = parse_name(_BLUEPRINT, request.name)
        record = await self._run(self._library.blueprint, blueprint)
        return pb.GetBlueprintResponse(blueprint=wire.write_blueprint(record))

    async def ListBlueprints(  # the contract's name
        self,
        request: pb.ListBlueprintsRequest,
        context: ServicerContext[pb.ListBlueprintsRequest, pb.ListBlueprintsResponse],
    ) -> pb.ListBlueprintsResponse:
        """See the contract."""
        query = BlueprintQuery(
            family=request.family, tags=tuple(request.tags), include_archived=request.include_archived
        )
        page, token = await self._page(
            request, lambda after, limit: self._library.blueprints(query, after=after, limit=limit)
        )
        return pb.ListBlueprintsResponse(blueprints=map(wire.write_blueprint, page), next_page_token=token)

    async def ArchiveBlueprint(  # the contract's name
        self,
        request: pb.ArchiveBlueprintRequest,
        context: ServicerContext[pb.ArchiveBlueprintRequest, pb.ArchiveBlueprintResponse],
    ) -> pb.ArchiveBlueprintResponse:
        """See the contract."""
        (blueprint,) = parse_name(_BLUEPRINT, request.name)

        async def archive() -> pb.ArchiveBlueprintResponse:
            record, changed = await self._run(
                self._library.archive_blueprint, blueprint, revision=wire.read_etag(request.etag)
            )
            if changed:
                self._hub.publish(record, CHANGE_TYPE_MODIFIED)
            return pb.ArchiveBlueprintResponse(blueprint=wire.write_blueprint(record))

        return await self._requests.once("ArchiveBlueprint", request, archive)

    async def WatchBlueprints(  # the contract's name
        self,
        request: pb.WatchBlueprintsRequest,
        context: ServicerContext[pb.WatchBlueprintsRequest, pb.WatchBlueprintsResponse],
    ) -> AsyncIterator[pb.WatchBlueprintsResponse]:
        """See the contract."""
        tags = set(request.tags)

        def match(record: BlueprintRecord) -> bool:
            return tags.issubset(record.tags) and request.family in {"", record.blueprint.family}

        existing = [] if request.resume_token else await self._snapshot()
        items = self._hub.watch(
            snapshot=lambda: existing,
            draining=self._draining,
            match=match,
            resume_token=request.resume_token or None,
        )
        async with contextlib.aclosing(items):
            async for item in items:
                yield pb.WatchBlueprintsResponse(
                    change=item.change,
                    blueprint=None if item.item is None else wire.write_blueprint(item.item),
                    revision=item.revision,
                    resume_token=item.token,
                )

    async def GetLineage(  # the contract's name
        self, request: pb.GetLineageRequest, context: ServicerContext[pb.GetLineageRequest, pb.GetLineageResponse]
    ) -> pb.GetLineageResponse:
        """See the contract."""
        (blueprint,) = parse_name(_BLUEPRINT, request.name)
        lineage = await self._run(self._library.lineage, blueprint)
        return pb.GetLineageResponse(
            ancestors=map(wire.write_blueprint, lineage.ancestors),
            blueprint=wire.write_blueprint(lineage.blueprint),
            descendants=map(wire.write_blueprint, lineage.descendants),
            truncated=lineage.truncated,
        )

    async def GetKernel(  # the contract's name
        self, request: pb.GetKernelRequest, context: ServicerContext[pb.GetKernelRequest, pb.GetKernelResponse]
    ) -> pb.GetKernelResponse:
        """See the contract."""
        return pb.GetKernelResponse(kernel=wire.write_kernel(await self._kernel(request.name)))

    async def ListKernels(  # the contract's name
        self, request: pb.ListKernelsRequest, context: ServicerContext[pb.ListKernelsRequest, pb.ListKernelsResponse]
    ) -> pb.ListKernelsResponse:
        """See the contract."""
        (blueprint,) = parse_name(_BLUEPRINT, request.parent, field="parent")
        if blueprint == "-":
            blueprint = ""
        else:
            await self._run(self._library.blueprint, blueprint)
        query = KernelQuery(blueprint=blueprint)
        page, token = await self._page(
            request, lambda after, limit: self._library.kernels(query, after=after, limit=limit)
        )
        return pb.ListKernelsResponse(kernels=map(wire.write_kernel, page), next_page_token=token)

    async def QueryKernels(  # the contract's name
        self, request: pb.QueryKernelsRequest, context: ServicerContext[pb.QueryKernelsRequest, pb.QueryKernelsResponse]
    ) -> pb.QueryKernelsResponse:
        """See the contract."""
        query = KernelQuery(
            blueprint=parse_name(_BLUEPRINT, request.blueprint, field="blueprint")[0] if request.blueprint else "",
            family=request.family,
            interface_signature=request.interface_signature,
            target=request.target,
            tags=tuple(request.tags),
            statuses=wire.read_statuses(request.statuses),
            max_latency_seconds=wire.read_seconds(request.max_latency) if request.HasField("max_latency") else None,
            max_memory_bytes=_limit(request, "max_memory_bytes"),
            max_parameters=_limit(request, "max_parameters"),
            max_flops=_limit(request, "max_flops"),
        )
        page, token = await self._page(
            request, lambda after, limit: self._library.kernels(query, after=after, limit=limit)
        )
        return pb.QueryKernelsResponse(kernels=map(wire.write_kernel, page), next_page_token=token)

    async def ResolveKernel(  # the contract's name
        self,
        request: pb.ResolveKernelRequest,
        context: ServicerContext[pb.ResolveKernelRequest, pb.ResolveKernelResponse],
    ) -> pb.ResolveKernelResponse:
        """See the contract."""
        (blueprint,) = parse_name(_BLUEPRINT, request.blueprint, field="blueprint")
        place = request.interface_signature
        if request.HasField("interface"):
            place = interface_signature(wire.read_interface(request.interface))
        for field, value in (("place", place), ("size", request.size), ("target", request.target)):
            if not value:
                raise required(field)
        record = await self._run(
            self._library.resolve,
            blueprint,
            place,
            size=request.size,
            target=request.target,
            init_seed=_limit(request, "init_seed"),
        )
        return pb.ResolveKernelResponse(kernel=wire.write_kernel(record))

    async def UploadKernel(  # the contract's name
        self,
        request_iterator: AsyncIterator[pb.UploadKernelRequest],
        context: ServicerContext[pb.UploadKernelRequest, pb.UploadKernelResponse],
    ) -> pb.UploadKernelResponse:
        """See the contract."""
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("header"):
            raise required("header")
        header = _read_header(first.header)
        upload = await self._run(self._library.begin_upload, header)
        if isinstance(upload, KernelRecord):
            return pb.UploadKernelResponse(kernel=wire.write_kernel(upload))
        try:
            async for message in request_iterator:
                if not 1 <= len(message.chunk) <= CHUNK_BYTES:
                    raise invalid("chunk", f"has {len(message.chunk)} bytes", f"send 1 to {CHUNK_BYTES}")
                await self._run(upload.append, message.chunk)
            record = await self._run(self._library.commit_upload, header, upload)
        finally:
            upload.close()
        return pb.UploadKernelResponse(kernel=wire.write_kernel(record))

    async def GetUpload(  # the contract's name
        self, request: pb.GetUploadRequest, context: ServicerContext[pb.GetUploadRequest, pb.GetUploadResponse]
    ) -> pb.GetUploadResponse:
        """See the contract."""
        digest = wire.read_digest(request.digest, "digest")
        committed, record = await self._run(self._library.upload_progress, digest)
        return pb.GetUploadResponse(
            committed_bytes=committed, kernel=None if record is None else wire.write_kernel(record)
        )

    async def DownloadKernel(  # the contract's name
        self,
        request: pb.DownloadKernelRequest,
        context: ServicerContext[pb.DownloadKernelRequest, pb.DownloadKernelResponse],
    ) -> AsyncIterator[pb.DownloadKernelResponse]:
        """See the contract."""
        record = await self._kernel(request.name)
        chunks = self._library.download(record, request.offset_bytes)
        chunk = await self._run(next, chunks, None)  # what is wrong is said before anything is sent
        yield pb.DownloadKernelResponse(header=wire.write_kernel(record))
        while chunk is not None:
            yield pb.DownloadKernelResponse(chunk=chunk)
            chunk = await self._run(next, chunks, None)

    async def SetKernelStatus(  # the contract's name
        self,
        request: pb.SetKernelStatusRequest,
        context: ServicerContext[pb.SetKernelStatusRequest, pb.SetKernelStatusResponse],
    ) -> pb.SetKernelStatusResponse:
        """See the contract."""
        blueprint, kernel = parse_name(_KERNEL, request.name)
        status = wire.read_status(request.status, "status")
        if status is KernelStatus.REJECTED and not request.reason:
            raise required("reason")
        if not request.attestation:
            raise required("attestation")

        async def set_status() -> pb.SetKernelStatusResponse:
            record = await self._run(
                self._library.set_status,
                kernel,
                status,
                blueprint=blueprint,
                reason=request.reason,
                attestation=request.attestation,
                revision=wire.read_etag(request.etag),
            )
            return pb.SetKernelStatusResponse(kernel=wire.write_kernel(record))

        return await self._requests.once("SetKernelStatus", request, set_status)

    async def RecordKernelOutcome(  # the contract's name
        self,
        request: pb.RecordKernelOutcomeRequest,
        context: ServicerContext[pb.RecordKernelOutcomeRequest, pb.RecordKernelOutcomeResponse],
    ) -> pb.RecordKernelOutcomeResponse:
        """See the contract."""
        blueprint, kernel = parse_name(_KERNEL, request.name)
        outcome = wire.read_outcome(request.outcome)

        async def record_outcome() -> pb.RecordKernelOutcomeResponse:
            record = await self._run(self._library.record_outcome, kernel, outcome, blueprint=blueprint)
            return pb.RecordKernelOutcomeResponse(kernel=wire.write_kernel(record))

        return await self._requests.once("RecordKernelOutcome", request, record_outcome)

    async def _kernel(self, name: str) -> KernelRecord:
        blueprint, kernel = parse_name(_KERNEL, name)
        return await self._run(self._library.kernel, kernel, blueprint=blueprint)

    async def _page(
        self, request: Any, read: Callable[[Cursor | None, int], list[_RecordT]]
    ) -> tuple[Sequence[_RecordT], str]:
        """One page of a list, and the token of the next."""
        size = page_size_of(request.page_size)
        filters = _filters(request)
        after = None
        if request.page_token:
            cursor = decode_token(filters, request.page_token)
            try:
                after = wire.read_cursor(cursor)
            except ValueError:
                raise EsperError("page_token: it is none that a list gave", reason=Reason.INVALID_PAGE_TOKEN) from None
        found = await self._run(read, after, size + 1)
        page = found[:size]
        return page, encode_token(filters, wire.write_cursor(page[-1])) if len(found) > size else ""

    async def _snapshot(self) -> list[BlueprintRecord]:
        """All blueprints, read while no change was published: none can fall between the snapshot and the watch."""
        query = BlueprintQuery(include_archived=True)
        while True:
            before, records, after = self._hub.revision, list[BlueprintRecord](), None
            while True:
                page = await self._run(self._library.blueprints, query, after=after, limit=_SNAPSHOT_PAGE)
                records += page
                if len(page) < _SNAPSHOT_PAGE:
                    break
                after = Cursor(page[-1].create_time, page[-1].id)
            if self._hub.revision == before:
                return records


def _read_header(message: pb.UploadKernelHeader) -> UploadHeader:
    if not message.HasField("digest"):
        raise required("header.digest")
    if not message.signature:
        raise required("header.signature")
    (blueprint,) = parse_name(_BLUEPRINT, message.blueprint, field="header.blueprint")
    return UploadHeader(
        blueprint=blueprint,
        digest=wire.read_digest(message.digest, "header.digest"),
        signature=message.signature,
        size_bytes=message.size_bytes,
        offset_bytes=message.offset_bytes,
        tags=tuple(message.tags),
    )


def _limit(request: Any, field: str) -> int | None:
    """An optional number of a request, 0 or more; ``None`` if it is absent."""
    if not request.HasField(field):
        return None
    value: int = getattr(request, field)
    if value < 0:
        raise invalid(field, f"{value} is negative", "give 0 or more, or leave it out")
    return value


def _filters(request: Message) -> Mapping[str, object]:
    """All of a list's request but the page, so that a token is bound to its filter."""
    bare = type(request)()
    bare.CopyFrom(request)
    for field in ("page_size", "page_token"):
        bare.ClearField(field)
    return {"request": type(request).__name__, "content": bare.SerializeToString(deterministic=True).hex()}
