"""The gRPC server every service of Esper runs: health, reflection, interceptors, limits, graceful drain."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.chassis import tls
from services.chassis.config.schema import ServicesConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.health import SERVICE_NAME as HEALTH
from services.chassis.health import HealthServicer
from services.chassis.interceptors import standard_interceptor
from services.chassis.telemetry import Telemetry

#: Messages above this are refused in both directions, bytes.
MAX_MESSAGE_BYTES: Final = 4 * 2**20

#: Clients may ping this often without being sent away with GOAWAY too_many_pings (the default is 5 minutes), ms.
MIN_PING_INTERVAL_MS: Final = 5_000

_Servicer = TypeVar("_Servicer")

_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    # On a busy machine pings bunch up: a client that keeps to its interval must not lose its streams for that.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A dead peer (power, network) is noticed although it never said good-bye.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # With port sharing on, a second server on the same port would start and steal half of the calls.
    ("grpc.so_reuseport", 0),
)


class ServiceServer:
    """One server. Make and use it inside one running event loop.

    Handlers of streams must end by themselves once :attr:`draining` is set; :meth:`stop` waits for them only as long
    as ``services.drain_seconds``.
    """

    def __init__(self, config: ServicesConfig, telemetry: Telemetry, *, port: int = 0) -> None:
        self.draining: Final = asyncio.Event()
        self.health: Final = HealthServicer()
        self._config = config
        self._port = port
        self._address: str | None = None
        self._services: list[str] = []
        self._server = grpc.aio.server(interceptors=[standard_interceptor(config, telemetry)], options=_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)

    def add(
        self, add_servicer: Callable[[_Servicer, grpc.aio.Server], None], servicer: _Servicer, service: str
    ) -> None:
        """Serve ``servicer`` as ``service`` (full name), with ``add_XxxServicer_to_server``; before :meth:`start`."""
        add_servicer(servicer, self._server)
        self._services.append(service)

    @property
    def address(self) -> str:
        """``host:port`` the server listens on; only after :meth:`start`."""
        assert self._address is not None, "the server has no address before it has started"
        return self._address

    async def start(self) -> str:
        """Bind and accept calls; every service is NOT_SERVING until :meth:`ready`. Returns ``host:port``.

        The configuration has refused an interface beyond loopback without TLS already. Raises EsperError: PORT_IN_USE,
        BAD_TLS_FILES.
        """
        host = self._config.host
        credentials = tls.server_credentials(self._config.tls)
        reflection.enable_server_reflection([*self._services, HEALTH, reflection.SERVICE_NAME], self._server)
        target = f"{_bracketed(host)}:{self._port}"
        _require_free(host, self._port, target)
        if credentials is None:
            port = self._server.add_insecure_port(target)
        else:
            port = self._server.add_secure_port(target, credentials)
        await self._server.start()
        self._address = f"{_bracketed(host)}:{port}"
        return self._address

    def ready(self) -> None:
        """Say SERVING, for the server and for each of its services."""
        for service in ("", *self._services):
            self.health.set(service, serving=True)

    async def stop(self) -> None:
        """Drain: NOT_SERVING, no new calls, streams asked to end, calls under way get ``drain_seconds``. Idempotent."""
        self.draining.set()
        self.health.close()
        await self._server.stop(self._config.drain_seconds)


def _require_free(host: str, port: int, target: str) -> None:
    """Bind once to learn why one cannot: grpc says it on standard error in words of its own, and no reason."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As grpc does: connections that a killed predecessor left behind do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise EsperError(
            f"cannot listen on {target}: {error.strerror}", reason=Reason.PORT_IN_USE, metadata={"address": target}
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
