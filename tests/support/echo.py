"""The test service of ``echo.proto``, generated when first imported, and a server that runs it.

Handlers behave as the text of the request says; see :class:`EchoServicer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_tools import protoc

from services.chassis import telemetry
from services.chassis.channel import Channel
from services.chassis.config.schema import ServicesConfig, TelemetryConfig, TlsConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.server import ServiceServer
from services.chassis.telemetry import Telemetry


def _generate() -> tuple[Any, Any]:
    folder = tempfile.mkdtemp(prefix="esper-echo-")
    here = Path(__file__).parent
    done = protoc.main(
        ["protoc", f"-I{here}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(here / "echo.proto")]
    )
    assert done == 0, "protoc could not generate the test service"
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("echo_pb2"), importlib.import_module("echo_pb2_grpc")
    finally:
        sys.path.remove(folder)


pb, pb_grpc = _generate()
SERVICE: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["EchoService"]
NAME: str = SERVICE.full_name


class EchoServicer(pb_grpc.EchoServiceServicer):  # type: ignore[name-defined,misc]  # made at test time, untyped
    """Text "esper", "bug", "abort", "own-timeout" raises; "wait" waits for ever; anything else is answered."""

    def __init__(self, draining: asyncio.Event) -> None:
        self.draining = draining
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()
        self.calls = 0
        self.seen: list[grpc.aio.ServicerContext[Any, Any]] = []

    async def _do(self, text: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.calls += 1
        self.seen.append(context)
        if text == "esper":
            raise EsperError("no such thing", reason=Reason.NOT_FOUND, metadata={"resource": "things/1"})
        if text == "bug":
            raise KeyError("secret")
        if text == "abort":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
        if text == "own-timeout":
            raise TimeoutError("of a handler")
        if text == "wait":
            self.started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return pb.EchoResponse(text=text)

    async def Echo(self, request: Any, context: Any) -> Any:  # the contract's name
        return await self._do(request.text, context)

    async def Change(self, request: Any, context: Any) -> Any:
        return await self._do(request.text, context)

    async def Create(self, request: Any, context: Any) -> Any:
        self.calls += 1
        return pb.CreateResponse()

    async def Collect(self, request_iterator: Any, context: Any) -> Any:
        texts = [request.text async for request in request_iterator]
        return await self._do(texts[0] if len(texts) == 1 else ",".join(texts), context)

    async def Repeat(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Answers ``times`` times, then does as the text says."""
        try:
            for _ in range(request.times):
                yield pb.EchoResponse(text=request.text)
            yield await self._do(request.text, context)
        finally:
            self.closed.set()

    async def Converse(self, request_iterator: Any, context: Any) -> None:
        """In the other spelling of a streaming handler: a coroutine that writes."""
        async for request in request_iterator:
            await context.write(await self._do(request.text, context))

    async def WatchEcho(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.EchoResponse(text="first")
        self.seen.append(context)
        self.started.set()
        await self.draining.wait()
        yield pb.EchoResponse(text="last")


class Running:
    """A server with the test service, its servicer and a way to it."""

    def __init__(self, server: ServiceServer, servicer: EchoServicer, address: str, tracer: Telemetry) -> None:
        self.server = server
        self.servicer = servicer
        self.address = address
        self.telemetry = tracer

    def channel(self, *, timeout: float = 10.0, tls: TlsConfig | None = None, run_id: str | None = None) -> Channel:
        return Channel(
            self.address,
            self.telemetry,
            tls_config=tls or TlsConfig(),
            services=[SERVICE],
            timeout=timeout,
            run_id=run_id,
        )


@contextlib.asynccontextmanager
async def running(
    config: ServicesConfig | None = None, *, run_dir: Path | None = None, make: Callable[..., Any] = EchoServicer
) -> AsyncIterator[Running]:
    """A serving server on a free port; stopped at the end."""
    tracer = telemetry.setup("echo", TelemetryConfig(), run_dir, "run-1")
    server = ServiceServer(config or ServicesConfig(), tracer)
    servicer = make(server.draining)
    server.add(pb_grpc.add_EchoServiceServicer_to_server, servicer, NAME)
    address = await server.start()
    server.ready()
    try:
        yield Running(server, servicer, address, tracer)
    finally:
        await server.stop()
        tracer.shutdown()


def stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.EchoServiceStub(channel)
