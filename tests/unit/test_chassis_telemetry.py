"""Tracing set-up, the OTLP/JSON exporter and the JSON log lines."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue

from services.chassis import logs, telemetry
from services.chassis.config.schema import TelemetryConfig


def test_spans_of_a_run_land_in_its_folder_with_parents_links_and_status(tmp_path: Path) -> None:
    tracer = telemetry.setup("tolaria", TelemetryConfig(), tmp_path, "run-1")
    with tracer.span("epoch", {"esper.epoch": 3}, parent=telemetry.ROOT) as epoch:
        traceparent = telemetry.current_traceparent()
        epoch.add_event("validated", {"accuracy": 91.5})
        with tracer.span("rpc", kind=SpanKind.CLIENT):
            pass
    with pytest.raises(RuntimeError), tracer.span("adapt", links=[telemetry.link_to(traceparent), None]):
        raise RuntimeError("no kernel")
    tracer.shutdown()

    spans = {span["name"]: span for span in telemetry.read_traces(tmp_path / "traces")}
    assert set(spans) == {"epoch", "rpc", "adapt"}
    assert spans["rpc"]["parentSpanId"] == spans["epoch"]["spanId"]
    assert spans["rpc"]["kind"] == 3
    assert "parentSpanId" not in spans["epoch"]
    assert spans["epoch"]["resource"]["service.name"] == "tolaria"
    assert spans["epoch"]["resource"]["esper.run_id"] == "run-1"
    assert telemetry.plain_attributes(spans["epoch"]["attributes"]) == {"esper.epoch": 3}
    assert traceparent is not None
    assert spans["epoch"]["traceId"] in traceparent
    assert spans["adapt"]["traceId"] != spans["epoch"]["traceId"]
    assert spans["adapt"]["links"] == [{"traceId": spans["epoch"]["traceId"], "spanId": spans["epoch"]["spanId"]}]
    assert spans["adapt"]["status"] == {"code": 2, "message": "no kernel"}
    assert tracer.counts() == telemetry.SpanCounts(exported=3, dropped=0, failed=0)


def _base64_ids(node: Any) -> None:
    """OTLP/JSON writes ids in hex where protobuf's own JSON has base64: the one rewrite a protobuf parser needs."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("traceId", "spanId", "parentSpanId"):
                node[key] = base64.b64encode(bytes.fromhex(value)).decode()
            else:
                _base64_ids(value)
    elif isinstance(node, list):
        for item in node:
            _base64_ids(item)


def test_a_line_parses_as_otlp_traces_data(tmp_path: Path) -> None:
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)
    attributes: dict[str, AttributeValue] = {
        "text": "a",
        "flag": True,
        "count": 2**40,
        "share": 0.5,
        "loss": float("nan"),
        "path": ("a", "b"),
    }
    with tracer.span("all kinds", attributes, kind=SpanKind.SERVER) as span:
        span.add_event("at", {"low": float("-inf")})
    tracer.shutdown()
    (file,) = (tmp_path / "traces").glob("urza-*.jsonl")
    data = json.loads(file.read_text())
    _base64_ids(data)

    parsed = json_format.ParseDict(data, TracesData()).resource_spans[0].scope_spans[0].spans[0]

    assert parsed.name == "all kinds"
    assert parsed.trace_id.hex() == f"{span.get_span_context().trace_id:032x}"
    values = {pair.key: pair.value for pair in parsed.attributes}
    assert values["flag"].bool_value is True
    assert values["count"].int_value == 2**40
    assert values["share"].double_value == 0.5
    assert values["loss"].double_value != values["loss"].double_value
    assert [item.string_value for item in values["path"].array_value.values] == ["a", "b"]
    assert parsed.start_time_unix_nano <= parsed.end_time_unix_nano
    read = telemetry.read_traces(tmp_path / "traces")[0]
    assert telemetry.plain_attributes(read["attributes"])["path"] == ["a", "b"]


def test_a_flush_writes_what_waits(tmp_path: Path) -> None:
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)
    tracer.start("waiting", {"measured": 1, "unmeasured": None}).end()
    tracer.flush()
    (span,) = telemetry.read_traces(tmp_path / "traces")
    assert telemetry.plain_attributes(span["attributes"]) == {"measured": 1}
    tracer.shutdown()


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)
    with tracer.span("whole"):
        pass
    tracer.shutdown()
    (file,) = (tmp_path / "traces").iterdir()
    file.write_text(file.read_text() + '{"resourceSpans": [{"reso')
    assert [span["name"] for span in telemetry.read_traces(tmp_path / "traces")] == ["whole"]


def test_context_goes_through_a_traceparent(tmp_path: Path) -> None:
    sender = telemetry.setup("a", TelemetryConfig(), tmp_path / "a", None)
    receiver = telemetry.setup("b", TelemetryConfig(), tmp_path / "b", None)
    assert telemetry.current_traceparent() is None
    outer = sender.start("publish", kind=SpanKind.PRODUCER)
    with sender.activate(outer):
        assert telemetry.current_traceparent() == telemetry.traceparent_of(outer)
    inner = receiver.start("consume", parent=telemetry.context_from(telemetry.traceparent_of(outer)))
    assert inner.get_span_context().trace_id == outer.get_span_context().trace_id
    for traceparent in (None, "", "nonsense"):
        assert telemetry.link_to(traceparent) is None
        fresh = receiver.start("consume", parent=telemetry.context_from(traceparent))
        assert fresh.get_span_context().trace_id != outer.get_span_context().trace_id
    assert telemetry.traceparent_of(trace.INVALID_SPAN) is None
    sender.shutdown()
    receiver.shutdown()


@pytest.mark.parametrize(("traces", "with_folder"), [("off", True), ("file", False)])
def test_without_a_place_to_write_nothing_is_recorded(tmp_path: Path, traces: Any, with_folder: bool) -> None:
    tracer = telemetry.setup("urza", TelemetryConfig(traces=traces), tmp_path if with_folder else None, None)
    with tracer.span("quiet") as span:
        assert not span.is_recording()
        assert telemetry.current_traceparent() is not None
    tracer.flush()
    assert tracer.counts() == telemetry.SpanCounts(0, 0, 0)
    tracer.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_spans_go_to_a_collector_where_one_is_configured(tmp_path: Path) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
            received.append(request)
            return ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Collector(), server)  # type: ignore[no-untyped-call]  # generated without types
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = TelemetryConfig(traces="otlp", otlp_endpoint=f"127.0.0.1:{port}")
    tracer = telemetry.setup("urza", config, tmp_path, "run-1")
    tracer.start("far").end()
    tracer.shutdown()
    server.stop(None).wait()
    (request,) = received
    (group,) = request.resource_spans
    assert group.scope_spans[0].spans[0].name == "far"
    assert {pair.key: pair.value.string_value for pair in group.resource.attributes}["esper.run_id"] == "run-1"
    assert list(tmp_path.iterdir()) == []


class _Held(SpanExporter):
    """An exporter that waits until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def export(self, spans: Any) -> SpanExportResult:
        self.entered.set()
        assert self.let_go.wait(10)
        return SpanExportResult.SUCCESS


def test_spans_beyond_the_queue_are_dropped_and_counted() -> None:
    exporter = _Held()
    queue = telemetry._BoundedProcessor(exporter, 4)
    with_queue = TracerProvider(shutdown_on_exit=False)
    with_queue.add_span_processor(queue)
    tracer = telemetry.Telemetry("x", None, with_queue, queue)
    for _ in range(4):
        tracer.start("kept").end()
    assert exporter.entered.wait(10)  # four waiting or being written: the queue is full
    for _ in range(3):
        tracer.start("too many").end()
    assert tracer.counts().dropped == 3
    exporter.let_go.set()
    tracer.shutdown()
    assert tracer.counts() == telemetry.SpanCounts(exported=4, dropped=3, failed=0)


class _Broken(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        raise RuntimeError("no")


def test_what_cannot_be_written_is_counted_as_failed(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)
    tracer.start("lost").end()
    tracer.shutdown()
    assert tracer.counts() == telemetry.SpanCounts(exported=0, dropped=0, failed=1)

    counting = telemetry._CountingExporter(_Broken())
    with pytest.raises(RuntimeError):
        counting.export([ReadableSpan("a")])
    assert (counting.exported, counting.failed) == (0, 1)


async def _cancelled(tracer: telemetry.Telemetry) -> None:
    with tracer.span("waits"):
        await asyncio.Event().wait()


def test_a_cancelled_span_does_not_look_fine(tmp_path: Path) -> None:
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)

    async def run() -> None:
        task = asyncio.create_task(_cancelled(tracer))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    tracer.shutdown()
    (span,) = telemetry.read_traces(tmp_path / "traces")
    assert span["status"] == {"code": 2, "message": "CancelledError"}
    assert telemetry.plain_attributes(span["attributes"])["error.type"] == "CancelledError"


def test_log_lines_are_json_with_the_ids_of_the_call(tmp_path: Path) -> None:
    stream = io.StringIO()
    before = logging.getLogger().handlers[:]
    tracer = telemetry.setup("urza", TelemetryConfig(), tmp_path, None)
    try:
        logs.setup("urza", "info", stream)
        logger = logging.getLogger("esper.test")
        logger.debug("hidden")
        logger.info("plain %s", "line", extra={"fields": {"path": Path("x")}})
        request, run = logs.request_id.set("req-1"), logs.run_id.set("run-1")
        with tracer.span("call") as span:
            try:
                int("why")
            except ValueError:
                logger.exception("failed")
        logs.request_id.reset(request)
        logs.run_id.reset(run)
    finally:
        logging.basicConfig(handlers=before, force=True, level=logging.WARNING)
        tracer.shutdown()
    plain, failed = (json.loads(line) for line in stream.getvalue().splitlines())
    assert plain["message"] == "plain line"
    assert plain["path"] == "x"
    assert plain["service"] == "urza"
    assert plain["time"].endswith("Z")
    assert "request_id" not in plain
    assert failed["request_id"] == "req-1"
    assert failed["run"] == "run-1"
    assert failed["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert "ValueError: invalid literal" in failed["exception"]
