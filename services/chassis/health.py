"""``grpc.health.v1`` for grpc.aio servers: Check and Watch.

The servicer that ships with grpcio-health-checking cannot be used: the first of two watchers of a service that leaves
takes the other's notifications with it, a slow watcher blocks whoever sets a status, and a Watch never ends, so that a
draining server would wait its whole grace for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking ships no types for it
    """Status by full service name; ``""`` is the server as a whole. Belongs to one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, service: str, *, serving: bool) -> None:
        """Set the status of ``service``; without effect once the server drains."""
        if not self._closed:
            self._statuses[service] = SERVING if serving else NOT_SERVING
            self._notify()

    def close(self) -> None:
        """Everything NOT_SERVING, for good. Watchers are told and their streams end."""
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._closed = True
        self._notify()

    def _notify(self) -> None:
        # Watchers hold the event they wait on: a fresh one each time, so none can miss a change.
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802  # the contract's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Current status; NOT_FOUND for a service this server does not have."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802  # the contract's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Current status, then every change (the latest, where several came at once), until the server drains."""
        sent: int | None = None
        while True:
            changed = self._changed
            closed = self._closed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            if closed:
                return
            await changed.wait()
