"""The trace of a real run: each edge that must be there, and none that leads nowhere."""

from __future__ import annotations

from typing import Any, Final

import pytest

from services.chassis.telemetry import read_traces
from tests.infrastructure.short_run import ShortRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

_INTERNAL, _SERVER, _CLIENT, _PRODUCER, _CONSUMER = 1, 2, 3, 4, 5
_Node = tuple[str, str, int]
_Edge = tuple[_Node, _Node]

_DECIDE: Final = "esper.tamiyo.v1.PolicyService/Decide"
_OUTCOME: Final = "esper.tamiyo.v1.PolicyService/ReportOutcome"
_CREATE_JOB: Final = "esper.tezzeret.v1.CompileService/CreateCompileJob"
_GET_JOB: Final = "esper.tezzeret.v1.CompileService/GetCompileJob"
_PUBLISH: Final = "esper.oona.v1.EventService/Publish"


def _urza(rpc: str) -> str:
    return f"esper.urza.v1.BlueprintService/{rpc}"


def _training(name: str, kind: int = _INTERNAL) -> _Node:
    return ("training", name, kind)


def _call(caller: str, rpc: str, callee: str) -> _Edge:
    """The client's span and, below it, the server's in another process."""
    return ((caller, rpc, _CLIENT), (callee, rpc, _SERVER))


#: Every parent and child that a run with one adaptation must show, by (service, span, kind).
PARENTS: Final[frozenset[_Edge]] = frozenset(
    {
        # An epoch.
        (_training("epoch"), _training("validate")),
        (_training("epoch"), _training("measure health")),
        (_training("epoch"), _training("measure contribution")),
        (_training("epoch"), _training("decide")),
        (_training("epoch"), _training("publish system.events.epoch", _PRODUCER)),
        (_training("epoch"), _training("publish telemetry.seed.health", _PRODUCER)),
        (_training("publish system.events.epoch", _PRODUCER), _training(_PUBLISH, _CLIENT)),
        _call("training", _PUBLISH, "oona"),
        # The decision.
        (_training("decide"), _training("list blueprints")),
        (_training("list blueprints"), _training(_urza("ListBlueprints"), _CLIENT)),
        _call("training", _urza("ListBlueprints"), "urza"),
        (_training("decide"), _training("ask Tamiyo")),
        (_training("ask Tamiyo"), _training(_DECIDE, _CLIENT)),
        _call("training", _DECIDE, "tamiyo"),
        # The adaptation: its kernels ...
        (_training("adaptation"), _training("publish telemetry.seed.transitions", _PRODUCER)),
        (_training("adaptation"), _training("request kernel")),
        (_training("request kernel"), _training("obtain kernel")),
        (_training("obtain kernel"), _training(_urza("ResolveKernel"), _CLIENT)),
        _call("training", _urza("ResolveKernel"), "urza"),
        (_training("obtain kernel"), _training(_CREATE_JOB, _CLIENT)),
        _call("training", _CREATE_JOB, "tezzeret"),
        (_training("obtain kernel"), _training(_GET_JOB, _CLIENT)),
        _call("training", _GET_JOB, "tezzeret"),
        (_training("obtain kernel"), _training(_urza("DownloadKernel"), _CLIENT)),
        _call("training", _urza("DownloadKernel"), "urza"),
        # ... the compile job ...
        (("tezzeret", _CREATE_JOB, _SERVER), ("tezzeret", "publish compilation.blueprint.submitted", _PRODUCER)),
        (("tezzeret", _CREATE_JOB, _SERVER), ("tezzeret", "compile", _INTERNAL)),
        (("tezzeret", "compile", _INTERNAL), ("tezzeret", _urza("GetBlueprint"), _CLIENT)),
        (("tezzeret", "compile", _INTERNAL), ("tezzeret", _urza("UploadKernel"), _CLIENT)),
        (("tezzeret", "compile", _INTERNAL), ("tezzeret", _urza("SetKernelStatus"), _CLIENT)),
        _call("tezzeret", _urza("GetBlueprint"), "urza"),
        _call("tezzeret", _urza("UploadKernel"), "urza"),
        _call("tezzeret", _urza("SetKernelStatus"), "urza"),
        # ... its end, over the bus ...
        (("tezzeret", "compile", _INTERNAL), ("tezzeret", "publish validation.kernel.characterized", _PRODUCER)),
        (("tezzeret", "compile", _INTERNAL), ("tezzeret", "publish compilation.kernel.ready", _PRODUCER)),
        (
            ("tezzeret", "publish compilation.kernel.ready", _PRODUCER),
            _training("process compilation.kernel.ready", _CONSUMER),
        ),
        _call("tezzeret", _PUBLISH, "oona"),
        # ... the graft, and what became of it.
        (_training("adaptation"), _training("graft")),
        (_training("adaptation"), _training("transition")),
        (_training("transition"), _training("publish telemetry.seed.transitions", _PRODUCER)),
        (_training("transition"), _training("publish innovation.field_reports", _PRODUCER)),
        (_training("transition"), _training("report outcome")),
        (_training("report outcome"), _training(_OUTCOME, _CLIENT)),
        _call("training", _OUTCOME, "tamiyo"),
        (_training("report outcome"), _training(_urza("RecordKernelOutcome"), _CLIENT)),
        _call("training", _urza("RecordKernelOutcome"), "urza"),
        # The streams that last as long as the run.
        _call("training", "esper.kasmina.v1.ExecutionLinkService/Attach", "kasmina"),
        _call("training", "esper.tolaria.v1.TrainingLinkService/Attach", "tolaria"),
        _call("training", "esper.oona.v1.EventService/Subscribe", "oona"),
    }
)

#: The traces of a run, and where each must lead: a root span as long as the run would be lost in a crash.
LINKS: Final[frozenset[_Edge]] = frozenset(
    {
        (_training("epoch"), _training("run")),
        (_training("finish"), _training("run")),
        (_training("adaptation"), _training("decide")),
        (_training("request kernel"), _training("epoch")),
        (_training("graft"), _training("epoch")),
        (_training("transition"), _training("epoch")),
    }
)

#: Spans that begin a trace.
ROOTS: Final[frozenset[_Node]] = frozenset(
    {
        _training("run"),
        _training("epoch"),
        _training("adaptation"),
        _training("finish"),
        _training("publish system.events.epoch", _PRODUCER),  # the run's last word, when all spans are closed
        _training("esper.kasmina.v1.ExecutionLinkService/Attach", _CLIENT),
        _training("esper.tolaria.v1.TrainingLinkService/Attach", _CLIENT),
        _training("esper.oona.v1.EventService/Subscribe", _CLIENT),
    }
)


class Trace:
    """The spans of a run by id, without those that a stranger on the bus caused."""

    def __init__(self, run: ShortRun) -> None:
        spans = read_traces(run.folder / "traces")
        self.spans = {span["spanId"]: span for span in spans if not span["name"].endswith("EventService/Tail")}

    def node(self, span: dict[str, Any]) -> _Node:
        """Which kind of span it is."""
        return (span["resource"]["service.name"], span["name"], span["kind"])

    def edges(self) -> set[_Edge]:
        """All parents with their children."""
        return {
            (self.node(self.spans[span["parentSpanId"]]), self.node(span))
            for span in self.spans.values()
            if "parentSpanId" in span
        }


@pytest.fixture(scope="module")
def trace(short_run: ShortRun) -> Trace:
    assert short_run.ended.code == 0, short_run.ended.err
    return Trace(short_run)


def test_no_parent_and_no_link_leads_nowhere(trace: Trace) -> None:
    for span in trace.spans.values():
        for other in (span.get("parentSpanId"), *(link["spanId"] for link in span.get("links", []))):
            assert other is None or other in trace.spans, f"{trace.node(span)} refers to a span that nobody wrote"
        parent = trace.spans.get(span.get("parentSpanId", ""))
        assert parent is None or parent["traceId"] == span["traceId"]


def test_every_expected_parent_has_its_child(trace: Trace) -> None:
    missing = PARENTS - trace.edges()
    assert not missing, "\n".join(f"{parent} -> {child}" for parent, child in sorted(missing))


def test_every_trace_begins_where_one_may(trace: Trace) -> None:
    assert {trace.node(span) for span in trace.spans.values() if "parentSpanId" not in span} == ROOTS


def test_the_traces_of_a_run_are_linked(trace: Trace) -> None:
    found = {
        (trace.node(span), trace.node(trace.spans[link["spanId"]]))
        for span in trace.spans.values()
        for link in span.get("links", [])
    }
    assert found >= LINKS, "\n".join(map(str, sorted(LINKS - found)))
    for name in ("epoch", "finish", "adaptation", "graft", "transition"):
        for span in trace.spans.values():
            assert span["name"] != name or span.get("links"), f"a span {name!r} is linked to nothing"


def test_one_adaptation_is_one_trace_from_its_plan_to_its_outcome(trace: Trace) -> None:
    (adaptation,) = (span for span in trace.spans.values() if span["name"] == "adaptation")
    names = {trace.node(span) for span in trace.spans.values() if span["traceId"] == adaptation["traceId"]}
    assert names >= {
        ("tezzeret", "compile", _INTERNAL),
        ("urza", _urza("UploadKernel"), _SERVER),
        ("urza", _urza("DownloadKernel"), _SERVER),
        _training("process compilation.kernel.ready", _CONSUMER),
        _training("graft"),
        ("tamiyo", _OUTCOME, _SERVER),
    }


def test_one_query_by_run_id_shows_all(trace: Trace, short_run: ShortRun) -> None:
    assert {span["resource"].get("esper.run_id") for span in trace.spans.values()} == {short_run.folder.name}
    assert {span["resource"]["service.name"] for span in trace.spans.values()} == {
        *("urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria", "training"),
    }


def test_every_epoch_has_a_span(trace: Trace, short_run: ShortRun) -> None:
    epochs = [span for span in trace.spans.values() if span["name"] == "epoch"]
    assert len(epochs) == len(short_run.lines("metrics.jsonl")), "the epochs of the controls are traced too"
