"""Tezzeret as a client: of Urza's library and of Oona's topics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

import grpc.aio

from esper.common.v1.common_pb2 import Error
from esper.events.v1 import events_pb2
from esper.urza.v1 import blueprint_service_pb2 as urza
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from esper.urza.v1.kernel_pb2 import KERNEL_STATUS_VALIDATED
from services.blueprints.spec import Blueprint, SpecError
from services.blueprints.wire import blueprint_from_spec, digest_to_proto
from services.chassis.errors import EsperError, Reason, from_rpc_error
from services.chassis.events import EventPublisher
from services.tezzeret.compiler import SignedKernel
from services.tezzeret.jobs import Job, State

_CHUNK_BYTES: Final = 2**20
_SECONDS: Final = 10.0
"""Deadline of a call to Urza."""
_SECONDS_TO_LOOK: Final = 2.0
"""Deadline of a call that somebody waits for meanwhile."""
_LOG: Final = logging.getLogger(__name__)


class UrzaLibrary:
    """The library over Urza's contract."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = BlueprintServiceStub(channel)

    async def blueprint(self, name: str) -> Blueprint:
        """A blueprint by its name.

        Raises:
            EsperError: UNKNOWN_BLUEPRINT, BLUEPRINT_INVALID, or Urza cannot be reached.
        """
        try:
            answer = await self._stub.GetBlueprint(urza.GetBlueprintRequest(name=name), timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        try:
            return blueprint_from_spec(answer.blueprint.spec)
        except SpecError as error:  # of a newer version than this one
            raise EsperError(f"{name}: {error}", reason=Reason.BLUEPRINT_INVALID) from error

    async def holds(self, kernel: str) -> bool:
        """Whether the library has a kernel; yes where it cannot be asked: then nobody could fetch it either."""
        try:
            await self._stub.GetKernel(urza.GetKernelRequest(name=kernel), timeout=_SECONDS_TO_LOOK)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            _LOG.warning("cannot ask Urza for %s: %s %s", kernel, error.code().name, error.details())
        return True

    async def register(self, kernel: SignedKernel) -> str:
        """Upload a kernel, or find it there, and mark it as validated; returns its name.

        Raises:
            EsperError: what Urza says.
        """
        try:
            uploaded = await self._stub.UploadKernel(iter(_parts(kernel)), timeout=_SECONDS)
            name = uploaded.kernel.name
            if uploaded.kernel.status != KERNEL_STATUS_VALIDATED:
                await self._stub.SetKernelStatus(
                    urza.SetKernelStatusRequest(
                        name=name,
                        status=KERNEL_STATUS_VALIDATED,
                        reason="passed Tezzeret's validation",
                        attestation=kernel.attestation,
                        request_id=f"{kernel.job.name}/{kernel.digest.hex()}",
                    ),
                    timeout=_SECONDS,
                )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return name


def _parts(kernel: SignedKernel) -> Iterator[urza.UploadKernelRequest]:
    header = urza.UploadKernelHeader(
        blueprint=kernel.job.spec.blueprint,
        digest=digest_to_proto(kernel.digest),
        signature=kernel.signature,
        size_bytes=len(kernel.data),
        tags=[kernel.kernel.manifest.family],
    )
    yield urza.UploadKernelRequest(header=header)
    for start in range(0, len(kernel.data), _CHUNK_BYTES):
        yield urza.UploadKernelRequest(chunk=kernel.data[start : start + _CHUNK_BYTES])


class EventAnnouncer:
    """Tells Oona's topics; what does not fit into the publisher's queue is dropped and counted there."""

    def __init__(self, publisher: EventPublisher) -> None:
        self._publisher = publisher

    def submitted(self, job: Job) -> None:
        """A job was accepted."""
        event = events_pb2.BlueprintSubmitted(compile_job=job.name, blueprint=job.spec.blueprint)
        self._publisher.publish("compilation.blueprint.submitted", job.name, event)

    def ended(self, job: Job) -> None:
        """A job succeeded or failed."""
        if job.state is State.SUCCEEDED:
            digest = digest_to_proto(bytes.fromhex(job.digest))
            ready = events_pb2.KernelReady(compile_job=job.name, kernel=job.kernel, digest=digest)
            self._publisher.publish("compilation.kernel.ready", job.name, ready)
        else:
            error = Error(reason=job.error_reason, message=job.error_message)
            failed = events_pb2.CompileFailed(compile_job=job.name, blueprint=job.spec.blueprint, error=error)
            self._publisher.publish("compilation.kernel.ready", job.name, failed)

    def characterized(self, kernel: SignedKernel, name: str) -> None:
        """What was measured of a kernel."""
        cost = kernel.kernel.manifest.characterization
        event = events_pb2.KernelCharacterized(
            kernel=name,
            parameters=cost.parameters,
            flops=cost.flops,
            latency_ms=None if cost.latency_seconds is None else cost.latency_seconds * 1e3,
            memory_bytes=cost.memory_bytes,
        )
        self._publisher.publish("validation.kernel.characterized", name, event)
