"""Tracing of a process: the OpenTelemetry SDK set up in one place.

Every process of Esper (services, gateways, training process, launcher) calls :func:`setup` once and passes the
:class:`Telemetry` it gets to whoever makes spans. Nothing is registered globally: two set-ups in one process (tests) do
not disturb each other. Context travels between processes as a W3C ``traceparent`` string: in gRPC metadata (see
``interceptors`` and ``channel``) and in the headers of events.

The default exporter appends OTLP/JSON to ``<run_dir>/traces/<service>-<pid>.jsonl``, one ``TracesData`` object a line
(OpenTelemetry Protocol, "JSON Protobuf Encoding": hex ids, enums as numbers, 64-bit integers as strings).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes, AttributeValue

from services.chassis.config.schema import TelemetryConfig

#: The context without a parent: ``telemetry.span(name, parent=ROOT)`` starts a new trace.
ROOT: Final = Context()

#: Longest time a finished span waits in memory before it is written, milliseconds.
EXPORT_INTERVAL_MS: Final = 500
_BATCH: Final = 512
_SCOPE: Final = "esper"
_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_PROPAGATOR: Final = TraceContextTextMapPropagator()
# OTLP numbers the kinds from 1 (SPAN_KIND_INTERNAL); the API numbers them from 0.
_OTLP_KIND: Final = {
    SpanKind.INTERNAL: 1,
    SpanKind.SERVER: 2,
    SpanKind.CLIENT: 3,
    SpanKind.PRODUCER: 4,
    SpanKind.CONSUMER: 5,
}


def current_traceparent() -> str | None:
    """The W3C ``traceparent`` of the current span, or None outside any span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def traceparent_of(span: Span) -> str | None:
    """The W3C ``traceparent`` of ``span``, or None for a span without identity."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, ROOT))
    return carrier.get("traceparent")


def context_from(traceparent: str | None) -> Context:
    """The context that ``traceparent`` names; :data:`ROOT` for None or text that is no traceparent (W3C: ignore it)."""
    if not traceparent:
        return ROOT
    return _PROPAGATOR.extract({"traceparent": traceparent}, ROOT)


def link_to(traceparent: str | None) -> SpanContext | None:
    """The span context in ``traceparent`` to link to, or None where there is none."""
    context = trace.get_current_span(context_from(traceparent)).get_span_context()
    return context if context.is_valid else None


@dataclass(frozen=True, slots=True)
class SpanCounts:
    """What became of finished spans: all counts rise only."""

    #: Written by the exporter.
    exported: int
    #: Refused because ``telemetry.queue_size`` spans were already waiting.
    dropped: int
    #: Handed to an exporter that could not write them (disk full, collector away).
    failed: int


class Telemetry:
    """The tracer of one process. Thread-safe; make it with :func:`setup`."""

    def __init__(self, service: str, run_id: str | None, provider: TracerProvider, queue: _BoundedProcessor | None):
        self.service = service
        self.run_id = run_id
        self._provider = provider
        self._queue = queue
        self._tracer = provider.get_tracer(_SCOPE)

    def start(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
        links: Iterable[SpanContext | None] = (),
    ) -> Span:
        """Start a span that the caller ends. ``parent=None`` is the current span; ``ROOT`` begins a trace.

        Attributes and links that are None are left out: what is unmeasured is absent, and ``links=[link_to(maybe)]``
        needs no test.
        """
        return self._tracer.start_span(
            name,
            context=parent,
            kind=kind,
            attributes={key: value for key, value in (attributes or {}).items() if value is not None},
            links=[Link(context) for context in links if context is not None],
        )

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
        links: Iterable[SpanContext | None] = (),
    ) -> Iterator[Span]:
        """A span around a block; it is the current span inside. An exception marks it ERROR and goes on."""
        span = self.start(name, attributes, kind=kind, parent=parent, links=links)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield span
        except BaseException as error:  # cancellation and Ctrl-C too: a span must not look fine after either
            mark_failed(span, error)
            raise
        finally:
            span.end()

    @staticmethod
    @contextlib.contextmanager
    def activate(span: Span) -> Iterator[Span]:
        """Make ``span`` the current one inside the block, without ending or judging it."""
        with trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield span

    def counts(self) -> SpanCounts:
        """What became of the finished spans so far; all zero when traces are off."""
        return self._queue.counts() if self._queue is not None else SpanCounts(0, 0, 0)

    def flush(self) -> None:
        """Write what waits, now. Blocks for the write."""
        self._provider.force_flush()

    def shutdown(self) -> None:
        """Write what waits and stop the exporter's thread. Idempotent; spans finished later are lost."""
        self._provider.shutdown()


def mark_failed(span: Span, error: BaseException) -> None:
    """Status ERROR, the error's type as ``error.type`` and the exception as an event."""
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, str(error) or type(error).__qualname__))
    span.record_exception(error)


def setup(service: str, config: TelemetryConfig, run_dir: Path | None, run_id: str | None) -> Telemetry:
    """Set up tracing for this process.

    ``traces: file`` without a run folder records nothing but still passes context on. The OTLP exporter is imported
    only when asked for.
    """
    attributes: dict[str, AttributeValue] = {"service.name": service, "process.pid": os.getpid()}
    if run_id is not None:
        attributes["esper.run_id"] = run_id
    exporter: SpanExporter | None = None
    if config.traces == "otlp":
        exporter = _otlp_exporter(config.otlp_endpoint)
    elif config.traces == "file" and run_dir is not None:
        exporter = JsonLinesExporter(run_dir / "traces" / f"{service}-{os.getpid()}.jsonl")
    provider = TracerProvider(
        resource=Resource(attributes),
        # Explicit, so that OTEL_TRACES_SAMPLER in somebody's environment cannot blind a run.
        sampler=ParentBased(ALWAYS_ON if exporter is not None else ALWAYS_OFF),
        # The owner calls shutdown(); an atexit hook would hold every provider of a test session.
        shutdown_on_exit=False,
    )
    queue: _BoundedProcessor | None = None
    if exporter is not None:
        queue = _BoundedProcessor(exporter, config.queue_size)
        provider.add_span_processor(queue)
    return Telemetry(service, run_id, provider, queue)


def _otlp_exporter(endpoint: str | None) -> SpanExporter:
    assert endpoint is not None, "the configuration has refused traces: otlp without an endpoint"
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=True)


class _CountingExporter(SpanExporter):
    """Counts what the inner exporter wrote and what it could not."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        # Written by the one exporting thread (the batch processor holds a lock around export).
        self.exported = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                self.exported += len(spans)
            else:
                self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


class _BoundedProcessor(SpanProcessor):
    """A batch processor that refuses, and counts, what it cannot hold.

    The SDK's own drops its oldest span and says so only in a log line.
    """

    def __init__(self, exporter: SpanExporter, limit: int) -> None:
        self._exporter = _CountingExporter(exporter)
        self._batches = BatchSpanProcessor(
            self._exporter,
            max_queue_size=limit,
            schedule_delay_millis=EXPORT_INTERVAL_MS,
            max_export_batch_size=min(_BATCH, limit),
        )
        self._limit = limit
        self._lock = threading.Lock()
        self._accepted = 0
        self._dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            if self._accepted - self._exporter.exported - self._exporter.failed >= self._limit:
                self._dropped += 1
                return
            self._accepted += 1
        self._batches.on_end(span)

    def counts(self) -> SpanCounts:
        return SpanCounts(self._exporter.exported, self._dropped, self._exporter.failed)

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]  # the SDK forgot the annotation

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._batches.force_flush(timeout_millis)


class JsonLinesExporter(SpanExporter):
    """Appends each batch as one OTLP/JSON line to ``path``; folder and file appear with the first batch.

    Encoded by hand: the generic protobuf-to-JSON route costs several times more under the training process's GIL.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append ``spans``; FAILURE where the file cannot be written."""
        line = json.dumps(otlp_json(spans), separators=(",", ":")) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            # Disk full or a removed run folder must not disturb the run: the caller counts the batch as failed.
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def otlp_json(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """``spans`` (of one provider, at least one) as an OTLP ``TracesData`` object ready for ``json.dumps``."""
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(spans[0].resource.attributes)},
                "scopeSpans": [{"scope": {"name": _SCOPE}, "spans": [_span(span) for span in spans]}],
            }
        ]
    }


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """All spans of the ``*.jsonl`` files in ``folder`` as OTLP/JSON span objects, each with its flattened ``resource``.

    A last line cut short by a crash is left out.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                batch = json.loads(line)
            except json.JSONDecodeError:
                continue
            for group in batch["resourceSpans"]:
                resource = plain_attributes(group["resource"]["attributes"])
                found += [{**span, "resource": resource} for scope in group["scopeSpans"] for span in scope["spans"]]
    return found


def plain_attributes(attributes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """OTLP/JSON key-value pairs as a plain dictionary."""
    return {pair["key"]: _plain(pair["value"]) for pair in attributes}


def _plain(value: Mapping[str, Any]) -> Any:
    ((kind, content),) = value.items()
    if kind == "intValue":
        return int(content)
    if kind == "arrayValue":
        return [_plain(item) for item in content["values"]]
    return content


def _span(span: ReadableSpan) -> dict[str, Any]:
    identity = span.get_span_context()
    assert identity is not None, "a finished span has a context"
    encoded: dict[str, Any] = {
        "traceId": f"{identity.trace_id:032x}",
        "spanId": f"{identity.span_id:016x}",
        "name": span.name,
        "kind": _OTLP_KIND[span.kind],
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes),
        "status": {"code": span.status.status_code.value},
    }
    if span.parent is not None:
        encoded["parentSpanId"] = f"{span.parent.span_id:016x}"
    if span.status.description:
        encoded["status"]["message"] = span.status.description
    if span.events:
        encoded["events"] = [
            {"timeUnixNano": str(event.timestamp), "name": event.name, "attributes": _attributes(event.attributes)}
            for event in span.events
        ]
    if span.links:
        encoded["links"] = [
            {"traceId": f"{link.context.trace_id:032x}", "spanId": f"{link.context.span_id:016x}"}
            for link in span.links
        ]
    return encoded


def _attributes(attributes: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in (attributes or {}).items()]


def _value(value: AttributeValue) -> dict[str, Any]:
    if isinstance(value, bool):  # before int: a bool is one
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        # The JSON encoding of protobuf spells what JSON cannot: a loss may well be NaN.
        return {"doubleValue": value if math.isfinite(value) else _NOT_FINITE[str(value)]}
    if isinstance(value, str):
        return {"stringValue": value}
    assert isinstance(value, Sequence), "Esper's attributes are scalars and sequences of them"
    return {"arrayValue": {"values": [_value(item) for item in value]}}
