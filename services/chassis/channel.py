"""Channels to other services: deadlines, retries, keepalive, health checking, TLS and trace context on every call.

* **Deadlines.** A call that names none gets ``services.rpc_timeout_seconds``. Streams of answers that live as long as
  both ends do get none: the methods whose name begins as in :data:`LONG_LIVED`. ``timeout=NO_DEADLINE`` asks for none.
* **Retries** follow from the contracts: a method declared ``NO_SIDE_EFFECTS`` or ``IDEMPOTENT``, or whose request
  carries a ``request_id``, is tried up to five times on UNAVAILABLE (gRFC A6, done by the gRPC core); others never.
* **Client spans** are made here and not in interceptors of grpc.aio, which cost two more tasks per call.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import math
import pkgutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from services.chassis import logs, tls
from services.chassis.config.schema import ServicesConfig, TlsConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.interceptors.ids import REQUEST_ID, RUN_ID
from services.chassis.server import MAX_MESSAGE_BYTES
from services.chassis.telemetry import Telemetry, traceparent_of

#: Pass as ``timeout`` to make a call that waits for ever.
NO_DEADLINE: Final = math.inf

#: Streaming methods that begin so have no deadline by default: they live as long as both ends do.
LONG_LIVED: Final = ("Watch", "Subscribe", "Attach", "Tail", "PublishStream")

#: Tries of a retryable call, the first included (the gRPC core allows no more than five).
MAX_ATTEMPTS: Final = 5

#: Folder of a run with one file per live service, named like it, holding ``host:port``.
ADDRESSES_DIR: Final = "addresses"

_RETRY_POLICY: Final[Mapping[str, Any]] = {
    "maxAttempts": MAX_ATTEMPTS,
    "initialBackoff": "0.05s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A server that vanished without a word is noticed within 15 s; the server permits pings this often.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The default grows to two minutes: a service restarted in a second would be missing for that long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 1),
    # Channels of one process share connections by default, also those of two factories with different owners.
    ("grpc.use_local_subchannel_pool", 1),
)


def contract_services(component: str) -> list[ServiceDescriptor]:
    """The services in the contracts of ``component`` (``esper.<component>.v1``), in name order.

    Raises ModuleNotFoundError where there are no such contracts.
    """
    package = importlib.import_module(f"esper.{component}.v1")
    found: list[ServiceDescriptor] = []
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        if module.endswith("_service_pb2"):
            descriptor = importlib.import_module(f"{package.__name__}.{module}").DESCRIPTOR
            found += descriptor.services_by_name.values()
    return found


def is_retryable(method: MethodDescriptor) -> bool:
    """Whether trying ``method`` twice does no more than trying it once, by its contract."""
    level = method.GetOptions().idempotency_level
    return level != MethodOptions.IDEMPOTENCY_UNKNOWN or "request_id" in method.input_type.fields_by_name


def service_config(services: Iterable[ServiceDescriptor]) -> dict[str, Any]:
    """The gRPC service config for ``services``: round robin, health checking, retries (gRFCs A2, A6, A17)."""
    retried = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if is_retryable(method)
    ]
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
    }
    if retried:
        config["methodConfig"] = [{"name": retried, "retryPolicy": dict(_RETRY_POLICY)}]
    return config


#: Between two looks at a run folder for an address that is not there yet.
_LOOK_SECONDS: Final = 0.02


class ChannelFactory:
    """Makes and keeps one channel per service. Belongs to one event loop; :meth:`close` it there."""

    def __init__(
        self, config: ServicesConfig, telemetry: Telemetry, *, run_dir: Path | None = None, run_id: str | None = None
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._run_dir = run_dir
        self._run_id = run_id
        self._channels: dict[str, Channel] = {}

    def address(self, service: str) -> str:
        """Where ``service`` is: as configured, else as the run folder has it.

        Raises EsperError (ADDRESS_UNKNOWN).
        """
        configured: str | None = getattr(self._config, service).address
        if configured is not None:
            return configured
        if self._run_dir is not None:
            try:
                return (self._run_dir / ADDRESSES_DIR / service).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                pass  # not started yet, or not by this run: said below
        raise EsperError(
            f"no address of {service}: set services.{service}.address, or --run-dir to the folder of a live run",
            reason=Reason.ADDRESS_UNKNOWN,
            metadata={"service": service},
        )

    def channel(self, service: str) -> Channel:
        """The channel to ``service`` ("urza", ...), the same each time. Connects with the first call.

        Raises EsperError (ADDRESS_UNKNOWN, BAD_TLS_FILES).
        """
        if service not in self._channels:
            self._channels[service] = Channel(
                self.address(service),
                self._telemetry,
                tls_config=self._config.tls,
                services=contract_services(service),
                timeout=self._config.rpc_timeout_seconds,
                run_id=self._run_id,
            )
        return self._channels[service]

    async def until_known(self, service: str, *, timeout: float) -> str:
        """The address of ``service`` once the run folder has it, which it does when that service is serving.

        Raises EsperError (ADDRESS_UNKNOWN) after ``timeout`` seconds, at once where no run folder could ever have it.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            try:
                return self.address(service)
            except EsperError:
                if self._run_dir is None or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    async def close(self) -> None:
        """Close every channel; calls under way are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))


class Channel(grpc.aio.Channel):
    """A grpc.aio channel whose calls carry deadline, ids and trace context; give it to any generated stub."""

    def __init__(
        self,
        address: str,
        telemetry: Telemetry,
        *,
        tls_config: TlsConfig,
        services: Sequence[ServiceDescriptor],
        timeout: float,
        run_id: str | None = None,
    ) -> None:
        options = [*_OPTIONS, ("grpc.service_config", json.dumps(service_config(services)))]
        credentials = tls.channel_credentials(tls_config)
        self.address: Final = address
        self.telemetry: Final = telemetry
        self.timeout: Final = timeout
        self.run_id: Final = run_id
        #: Spans being ended; kept here because the loop holds tasks only weakly.
        self.finishing: Final[set[asyncio.Task[None]]] = set()
        self._inner: grpc.aio.Channel = (
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
        )

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`grpc.aio.Channel.unary_unary`."""
        return _Method(self, method, self._inner.unary_unary(method, *args, **kwargs), streaming=False)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`grpc.aio.Channel.stream_unary`."""
        return _Method(self, method, self._inner.stream_unary(method, *args, **kwargs), streaming=False)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`grpc.aio.Channel.unary_stream`."""
        return _Method(self, method, self._inner.unary_stream(method, *args, **kwargs), streaming=True)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`grpc.aio.Channel.stream_stream`."""
        return _Method(self, method, self._inner.stream_stream(method, *args, **kwargs), streaming=True)

    async def close(self, grace: float | None = None) -> None:
        """Close; calls under way are cancelled after ``grace`` seconds."""
        await self._inner.close(grace)
        await asyncio.gather(*self.finishing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002, RUF100  # grpc's signature
        """See :meth:`grpc.aio.Channel.get_state`."""
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See :meth:`grpc.aio.Channel.wait_for_state_change`."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See :meth:`grpc.aio.Channel.channel_ready`."""
        await self._inner.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class _Method:
    """One method of a stub: calls it with what the chassis adds."""

    def __init__(self, channel: Channel, method: str, call: Any, *, streaming: bool) -> None:
        self._channel = channel
        self._name = method.lstrip("/")
        self._call = call
        long_lived = streaming and method.rpartition("/")[2].startswith(LONG_LIVED)
        self._timeout = None if long_lived else channel.timeout

    def __call__(
        self,
        *request: Any,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        **options: Any,
    ) -> Any:
        span = self._channel.telemetry.start(
            self._name,
            {"rpc.system.name": "grpc", "rpc.method": self._name, "server.address": self._channel.address},
            kind=SpanKind.CLIENT,
        )
        call = self._call(
            *request,
            timeout=self._deadline(timeout),
            metadata=(*(metadata or ()), *self._context(span)),
            **options,
        )
        if span.is_recording():
            call.add_done_callback(functools.partial(self._done, span))
        return call

    def _deadline(self, timeout: float | None) -> float | None:
        if timeout is None:
            return self._timeout
        return None if timeout == NO_DEADLINE else timeout

    def _context(self, span: Span) -> list[tuple[str, str]]:
        found = (
            ("traceparent", traceparent_of(span)),
            (REQUEST_ID, logs.request_id.get()),
            (RUN_ID, logs.run_id.get() or self._channel.run_id),
        )
        return [(key, value) for key, value in found if value is not None]

    def _done(self, span: Span, call: grpc.aio.Call) -> None:
        # The status of a finished call is there, but behind a coroutine.
        task = asyncio.get_running_loop().create_task(_end(span, call, time.time_ns()))
        self._channel.finishing.add(task)
        task.add_done_callback(self._channel.finishing.discard)


async def _end(span: Span, call: grpc.aio.Call, moment: int) -> None:
    code = await call.code()
    span.set_attribute("rpc.response.status_code", code.name)
    if code is not grpc.StatusCode.OK:
        span.set_attribute("error.type", code.name)
        span.set_status(Status(StatusCode.ERROR, await call.details()))
    span.end(end_time=moment)


async def wait_until_serving(service: str, address: str, *, tls_config: TlsConfig, timeout: float) -> None:
    """Return once the server at ``address`` says SERVING (``grpc.health.v1`` Watch).

    Raises EsperError (SERVICE_UNREACHABLE), naming ``service`` and ``address``, after ``timeout`` seconds.
    """
    credentials = tls.channel_credentials(tls_config)
    channel = (
        grpc.aio.insecure_channel(address, options=_OPTIONS)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
    )
    last = "no answer"
    try:
        async with asyncio.timeout(timeout), channel:
            while True:
                try:
                    async for answer in health_pb2_grpc.HealthStub(channel).Watch(
                        health_pb2.HealthCheckRequest(), wait_for_ready=True
                    ):
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                        last = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                except grpc.aio.AioRpcError as error:
                    last = f"{error.code().name}: {error.details()}"
                # The server went away while it was watched: it may be starting anew.
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise EsperError(
            f"{service} at {address} is not serving after {timeout:g} s (last: {last})",
            reason=Reason.SERVICE_UNREACHABLE,
            metadata={"service": service, "address": address},
        ) from error
