"""How a kernel comes to a run: resolved at Urza, else compiled by Tezzeret, downloaded, verified, put on the shelf.

The end of a compile job arrives as an event; because events may be late when Oona restarts, the job is looked at now
and then as well. A service that is away is waited for: the coordinator gives up by the epoch, not we.
For one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final, Protocol, cast

import grpc
import grpc.aio

from esper.events.v1 import events_pb2
from esper.tezzeret.v1 import compile_job_pb2, compile_service_pb2
from esper.tezzeret.v1.compile_service_pb2_grpc import CompileServiceStub
from esper.urza.v1 import blueprint_pb2, blueprint_service_pb2, kernel_pb2
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from services.blueprints.spec import Blueprint
from services.blueprints.wire import blueprint_from_spec, interface_to_proto
from services.chassis.errors import EsperError, Reason, from_rpc_error
from services.chassis.events import EventSubscriber
from services.chassis.idempotency import digest_of
from services.tolaria.ports import KernelFile, KernelTarget, KernelUnavailableError

_LOG: Final = logging.getLogger(__name__)
TARGET: Final = "cpu"
TOPICS: Final = ("compilation.kernel.ready",)
_LOOK_SECONDS: Final = 1.0
_AWAY_SECONDS: Final = 0.5
_CALL_SECONDS: Final = 5.0
_PAGE: Final = 1000
_NOT_COMPILED: Final = frozenset({Reason.NO_KERNEL, Reason.NO_VALIDATED_KERNEL})
_ENDED: Final = frozenset(
    {
        compile_job_pb2.COMPILE_STATE_SUCCEEDED,
        compile_job_pb2.COMPILE_STATE_FAILED,
        compile_job_pb2.COMPILE_STATE_CANCELLED,
    }
)
#: What a service that restarts or is overloaded says: worth waiting for.
_AWAY: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    }
)


class Shelf(Protocol):
    """Where kernels go."""

    def admit(self, file: KernelFile) -> str:
        """Verify ``file`` and keep it; returns its digest. Raises KernelUnavailableError."""
        ...


class KernelSource:
    """Blueprints and kernels for one run."""

    def __init__(
        self,
        run: str,
        urza: grpc.aio.Channel,
        tezzeret: grpc.aio.Channel,
        shelf: Shelf,
        wanted: Sequence[str] | None,
    ) -> None:
        self._run = run
        self._urza = BlueprintServiceStub(urza)
        self._tezzeret = CompileServiceStub(tezzeret)
        self._shelf = shelf
        #: Ids or tags of the blueprints that the configuration allows; None: all.
        self._wanted = wanted
        self._ended: dict[str, asyncio.Event] = {}

    async def blueprints(self, timeout: float) -> list[Blueprint]:
        """Active blueprints that the configuration allows. Raises grpc.aio.AioRpcError."""
        answer = await self._urza.ListBlueprints(
            blueprint_service_pb2.ListBlueprintsRequest(page_size=_PAGE), timeout=timeout
        )
        return [blueprint_from_spec(found.spec) for found in answer.blueprints if self._allows(found)]

    def _allows(self, blueprint: blueprint_pb2.Blueprint) -> bool:
        if self._wanted is None:
            return True
        names = {blueprint.name, blueprint.name.rpartition("/")[2], blueprint.display_name, blueprint.spec.family}
        return not names.union(blueprint.tags).isdisjoint(self._wanted)

    async def obtain(self, target: KernelTarget) -> str:
        """Digest (hex) of a kernel for ``target``, verified and on the shelf.

        Raises KernelUnavailableError when there will be none; waits as long as the services are merely away.
        """
        while True:
            try:
                kernel = await self._resolve(target)
                if kernel is None:
                    await self._compile(target)
                    kernel = await self._resolve(target)
                if kernel is None:
                    raise KernelUnavailableError("Urza has no validated kernel although its compile job succeeded")
                return await self.download(kernel.name)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AWAY:
                    raise KernelUnavailableError(str(from_rpc_error(error))) from error
                _LOG.info("a kernel waits: %s %s", error.code().name, error.details())
                await asyncio.sleep(_AWAY_SECONDS)

    async def _resolve(self, target: KernelTarget) -> kernel_pb2.Kernel | None:
        request = blueprint_service_pb2.ResolveKernelRequest(
            blueprint=f"blueprints/{target.blueprint.id}",
            interface=interface_to_proto(target.interface),
            size=target.size,
            target=TARGET,
            init_seed=target.init_seed,
        )
        try:
            return (await self._urza.ResolveKernel(request, timeout=_CALL_SECONDS)).kernel
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason in _NOT_COMPILED:
                return None
            raise

    async def _compile(self, target: KernelTarget) -> None:
        """Have it compiled and wait for the end. Raises KernelUnavailableError when the job fails."""
        spec = compile_job_pb2.CompileSpec(
            blueprint=f"blueprints/{target.blueprint.id}",
            interface=interface_to_proto(target.interface),
            size=target.size,
            init_seed=target.init_seed,
            target=TARGET,
        )
        # Content decides which job it is; the id only has to be ours and the same for the same wish.
        request = compile_service_pb2.CreateCompileJobRequest(spec=spec, request_id=f"{self._run}/{digest_of(spec)}")
        job = (await self._tezzeret.CreateCompileJob(request, timeout=_CALL_SECONDS)).job
        ended = self._ended.setdefault(job.name, asyncio.Event())
        try:
            while job.state not in _ENDED:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _LOOK_SECONDS)
                job = (
                    await self._tezzeret.GetCompileJob(
                        compile_service_pb2.GetCompileJobRequest(name=job.name), timeout=_CALL_SECONDS
                    )
                ).job
        finally:
            self._ended.pop(job.name, None)
        if job.state != compile_job_pb2.COMPILE_STATE_SUCCEEDED:
            raise KernelUnavailableError(f"{job.name} ended without a kernel: {job.error.message or 'cancelled'}")

    async def download(self, name: str) -> str:
        """Fetch the kernel ``name`` and put it on the shelf; returns its digest.

        Raises grpc.aio.AioRpcError, or KernelUnavailableError for one that is not genuine.
        """
        request = blueprint_service_pb2.DownloadKernelRequest(name=name)
        kernel, chunks = kernel_pb2.Kernel(), []
        async for part in self._urza.DownloadKernel(request, timeout=_CALL_SECONDS):
            if part.WhichOneof("part") == "header":
                kernel = part.header
            else:
                chunks.append(part.chunk)
        file = KernelFile(name, kernel.digest.value.hex(), kernel.signature, b"".join(chunks))
        return self._shelf.admit(file)

    async def listen(self, subscriber: EventSubscriber) -> None:
        """Hear the ends of compile jobs until the subscriber is stopped; without the bus we look now and then."""
        try:
            async for received in subscriber:
                with received.handling():
                    # The topic has two types of payload; both name the job. Most jobs are other runs'.
                    job = cast("events_pb2.KernelReady | events_pb2.CompileFailed", received.payload).compile_job
                    self._ended.get(job, asyncio.Event()).set()
        except EsperError as error:
            _LOG.warning("no events of compile jobs: %s", error)
