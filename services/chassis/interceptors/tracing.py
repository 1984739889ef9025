"""Stage: one server span per call, by the OpenTelemetry semantic conventions for RPC (``rpc.*``, grpc).

Own code, because the contributed interceptors break health Watch and leave failed spans unset. A stream is one span,
however many messages it carries: an event marks the first, an attribute counts them at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import grpc
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from services.chassis import logs
from services.chassis.interceptors.calls import Call, Stage
from services.chassis.telemetry import Telemetry, context_from

#: Codes that are the server's fault; the convention leaves spans of the others unset.
_SERVER_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


def stage(telemetry: Telemetry) -> Stage:
    """The tracing stage of a server whose spans go to ``telemetry``."""

    @contextlib.asynccontextmanager
    async def traced(call: Call) -> AsyncIterator[None]:
        if call.infrastructure:
            yield
            return
        traceparent = call.metadata.get("traceparent")
        span = telemetry.start(
            call.method.lstrip("/"),
            {
                "rpc.system.name": "grpc",
                "rpc.method": call.method.lstrip("/"),
                "network.peer.address": call.context.peer(),
                "esper.request_id": logs.request_id.get(),
                "esper.run": logs.run_id.get(),
            },
            kind=SpanKind.SERVER,
            parent=context_from(traceparent if isinstance(traceparent, str) else None),
        )
        if call.streaming:
            call.on_first_response = lambda: span.add_event("first message sent")
        failure: BaseException | None = None
        try:
            with telemetry.activate(span):
                yield
        except BaseException as error:
            failure = error
            raise
        finally:
            _finish(span, call, call.final_code(failure))

    return traced


def _finish(span: Span, call: Call, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.response.status_code", code.name)
    if call.streaming:
        span.set_attribute("esper.rpc.responses", call.responses)
    if code is not grpc.StatusCode.OK:
        span.set_attribute("error.type", call.reason or code.name)
    if code in _SERVER_ERRORS:
        span.set_status(Status(StatusCode.ERROR, call.reason or code.name))
    span.end()
