"""The report of a run: whole, cut short, or hardly begun; and its charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.chassis.errors import EsperError
from services.tolaria.charts import Bar, Range, Series, line_chart, ranges, timeline
from services.tolaria.report import render, write_report


def lines(path: Path, *content: dict[str, Any], tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in content) + tail, encoding="utf-8")


def epoch(arm: str, number: int, accuracy: float | None = 50.0) -> dict[str, Any]:
    return {
        "arm": arm,
        "epoch": number,
        "step": number * 10,
        "train_loss": 1.0 / number,
        "validation_accuracy": accuracy,
        "parameters": 100 + number,
    }


def transition(state: str, step: int) -> dict[str, Any]:
    return {
        "arm": "grown",
        "kind": "transition",
        "seed": "seed-1",
        "slot": "runs/r/slots/conv<1>",
        "to_state": state,
        "step": step,
        "epoch": 1,
        "reason": "because",
    }


def arm(accuracy: float) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "test_interval": [accuracy - 3, accuracy + 3],
        "validation_accuracy": accuracy,
        "parameters": 1200,
        "flops": 3400,
        "steps": 50,
        "training_flops": 1e9,
        "growth_flops": 1e8,
        "seconds": 5.0,
        "growth_seconds": 1.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with everything in it."""
    (tmp_path / "config.yaml").write_text("training: <b>\n", encoding="utf-8")
    lines(tmp_path / "metrics.jsonl", epoch("grown", 1), epoch("grown", 2, None), epoch("host", 1), tail='{"cut\n7\n')
    states = ("GERMINATED", 10), ("GRAFTING", 12), ("GRAFTING", 12), ("FOSSILIZED", 20), ("DORMANT", 20)
    other = {**transition("GRAFTING", 12), "arm": "uniform"}
    lines(tmp_path / "events.jsonl", {"kind": "state"}, *(transition(*state) for state in states), other)
    evidence = [
        {"slot": "a/conv1", "width": 2, "planned_width": 4, "need": 0.5, "chosen": True, "reason": "x"},
        {"slot": "b"},
    ]
    lines(
        tmp_path / "decisions.jsonl",
        {"decision": "d-1", "epoch": 1, "step": 10, "explanation": "widen <it>", "evidence": evidence},
        {"arm": "uniform", "epoch": 1, "step": 10, "explanation": "every layer alike", "evidence": evidence},
        {"epoch": 2, "step": 20, "explanation": "Tamiyo did not answer in time"},
    )
    service = {"address": "127.0.0.1:1", "state": "stopped", "restarts": 1, "serving_after": 1.5}
    mesh = {
        "services": {"urza": service, "oona": {**service, "address": None, "serving_after": None}},
        "events": [
            {"name": "urza", "kind": "exited", "detail": "killed by SIGKILL"},
            {"name": "training", "kind": "exited", "detail": "exit code 0"},
            {"name": "urza", "kind": "serving", "detail": ""},
        ],
        "startup": {"torch": 2.5},
        "first_step_seconds": 6.0,
    }
    (tmp_path / "mesh.json").write_text(json.dumps(mesh), encoding="utf-8")
    worth = {"points": 1.5, "low": 0.5, "high": 2.5}
    plan = {"points": 4.5, "low": 2.5, "high": 6.5}
    seed = {
        "seed": "seed-1",
        "slot": "conv1",
        "blueprint": "abcdef0123",
        "state": "FOSSILIZED",
        "contribution": worth,
        "decision": "d-1",
        "plan_contribution": plan,
    }
    flops = ("training", "culled_seeds", "discarded", "growth", "health", "counterfactuals", "validation", "total")
    better = {"points": 10.0, "low": 6.0, "high": 14.0, "confidence": 0.95, "samples": 360}
    summary = {
        "status": "succeeded",
        "accuracy": {"grown": 90.0, "host": 80.0, "bigger": 91.0},
        "arms": {
            "grown": arm(90.0),
            "host": {**arm(80.0), "growth_seconds": None},
            "bigger": {**arm(91.0), "training_flops": 2e9},
        },
        "comparisons": {"host": better, "bigger": {**better, "points": -1.0, "low": -3.0, "high": 1.0}},
        "compare_at": "epochs",
        "export": {"folder": "export", "formats": {"onnx": {"files": [], "problem": "no <onnx> here"}}},
        "start_accuracy": None,
        "seeds": [seed, {**seed, "contribution": None, "state": "CULLED"}, {**seed, "decision": None}],
        "changes": [
            {"path": "conv1", "operation": "conv2d", "before_shape": [4, 1, 3, 3], "after_shape": [6, 1, 3, 3]},
            {"path": "conv<2>", "operation": "branch:attention", "before_shape": [], "after_shape": [6, 2, 6]},
        ],
        "flops": {**dict.fromkeys(flops, 2e8), "total": 1e9},
        "events": {"published": 7, "dropped": 0},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return tmp_path


def test_a_whole_run(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    assert (
        text.index("<h2>Verdict</h2>")
        < text.index("Use this static shape</p>")
        < text.index("<h2>Validation accuracy</h2>")
    )
    assert "better than the same host without growth: +10.00 [+6.00, +14.00] points, the host at equal FLOPs" in text
    assert "up to 3.00 points worse than its own final shape trained from scratch: -1.00 [-3.00, +1.00]" in text
    assert "that at 191% of its FLOPs" in text
    assert "over 360 test images, not over seeds" in text
    assert "90.00 [87.0, 93.0]" in text
    assert text.count("<td class=n>none<") == 1, "no time of growth where nothing could grow, and zero is none"
    assert "trained for as many epochs as the run" in text
    assert "conv1 4 to 6, attention at conv&lt;2&gt;" in text
    assert "<summary>2 layers</summary>" in text
    assert "4 x 1 x 3 x 3" in text
    assert "of it seeds that were not kept</td><td class=n>2e+08</td><td class=n>20.00%" in text
    assert "1 of its 2 seeds were kept; all of them together are worth +4.50 [+2.50, +6.50] points." in text
    assert "every layer alike" not in text, "the story of a control is not the run's"
    assert "<h2>Export</h2>" in text
    assert "not exported: no &lt;onnx&gt; here" in text
    assert "1,200" in text
    assert "not measured" in text
    assert "+1.50 [+0.50, +2.50]" in text
    assert "widen &lt;it&gt;" in text, "what people wrote is text, not HTML"
    assert "evidence for 2 slots" in text
    assert "Tamiyo did not answer in time" in text
    assert "urza exited: killed by SIGKILL" in text
    assert "exit code 0" not in text
    assert "conv&lt;1&gt;" in text
    assert "training: &lt;b&gt;" in text
    assert text.count('class="bar GRAFTING"') == 1, "what a resumed run tells again counts once"
    assert "<script" not in text
    assert "http" not in text, "nothing comes from elsewhere"


def test_the_growth_budget_and_the_kernel_cache(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["budget"] = {"kind": "flops", "limit": 4000.0, "host": 2000, "final": 3400.0}
    summary["kernel_cache"] = {
        "hits": 12,
        "misses": 4,
        "hit_ratio": 0.75,
        "evictions": 1,
        "entries": 3,
        "size_bytes": 16064,
        "limit_bytes": 67108864,
        "load_seconds": 4e-6,
        "verify_seconds": None,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    text = render(folder)
    assert "allowed</td><td class=n>4,000</td><td class=n>2.00<" in text
    assert "in the end</td><td class=n>3,400</td><td class=n>1.70<" in text
    assert "hits per lookup</td><td class=n>75.0%<" in text
    assert "16,064" in text
    assert "to load one that is at hand, median, µs</td><td class=n>4.0<" in text
    assert "to verify one, median, µs</td><td class=n>not measured<" in text


def test_without_growth_no_budget_is_shown(folder: Path) -> None:
    text = render(folder)
    assert "none: growth was off" in text
    assert "cost of the network" not in text


def test_a_control_that_trains_longer_does_not_stretch_the_time_of_the_seeds(tmp_path: Path) -> None:
    lines(tmp_path / "events.jsonl", transition("FOSSILIZED", 20))
    lines(tmp_path / "metrics.jsonl", epoch("grown", 3), epoch("host", 999))
    _, seeds = render(tmp_path).split("<h2>Seeds over time</h2>")
    assert ">20<" in seeds, "the axis ends with the run, at step 30"
    assert ">4000<" not in seeds


def test_a_run_that_extends_a_trained_host(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"start_accuracy": 75.25, "compare_at": "flops"}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = render(folder)
    assert "the trained host stood at 75.25 % on the validation split" in text
    assert "trained to the FLOPs of the run, growth included" in text
    assert "Rewound to the graft of a failed trial" not in text


def test_a_run_that_was_rewound(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"rewinds": 2}))
    assert "Rewound to the graft of a failed trial, and the steps since then made again without it: 2x." in render(
        folder
    )


def test_a_run_without_controls(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"arms": {"grown": arm(90.0)}, "comparisons": {}, "changes": [], "flops": {"total": None}}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = render(folder)
    assert "Not compared" in text
    assert "trained for as many" not in text
    assert '<p class="none">not measured</p>' in text
    assert "Nothing: no seed was kept." in text


@pytest.mark.parametrize("summary", [None, "[1]", "{", '{"reason": "the <disk> is full"}'])
def test_a_run_that_came_to_nothing(tmp_path: Path, summary: str | None) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    text = render(tmp_path)
    assert "No result" in text
    assert ("the &lt;disk&gt; is full" in text) == (summary is not None and "disk" in summary)
    assert "Tamiyo was not asked" in text
    assert "nothing happened" in text


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(EsperError, match=r"report\.html"):
        write_report(tmp_path)


# ---- charts ------------------------------------------------------------------------------------------------------


def test_lines_marks_and_stairs() -> None:
    flat = Series("flat", [(0, 5.0), (1, 5.0)])
    assert "NaN" not in line_chart([flat], x_label="x", y_label="y")
    chart = line_chart(
        [Series("a<b", [(0, 0.0), (10, 100.0)], step=True), Series("none", [])], x_label="x", y_label="y", marks=[5]
    )
    assert "a&lt;b" in chart
    assert "none" not in chart
    assert chart.count('class="mark"') == 1
    points = chart.split('points="')[1].split('"')[0].split(" ")
    assert len(points) == 3, "a stair has a corner"
    assert line_chart([], x_label="x", y_label="y") == '<p class="none">not measured</p>'


@pytest.mark.parametrize(("top", "tick"), [(50.0, ">20<"), (40_000.0, ">20k<"), (4e6, ">2M<"), (4e9, ">2G<")])
def test_ticks_are_round_and_short(top: float, tick: str) -> None:
    assert tick in line_chart([Series("s", [(0, 0.0), (1, top)])], x_label="x", y_label="y")


def test_ranges_show_value_and_interval() -> None:
    drawn = ranges([Range("a<b", 50.0, 40.0, 60.0), Range("c", 55.0, 45.0, 65.0)], x_label="percent")
    assert "a&lt;b: 50.00 [40.00, 60.00]" in drawn
    assert drawn.count("<circle") == 2
    first = drawn.split('class="line s0" x1="')[1].split('"')
    low, high = float(first[0]), float(first[2])
    middle = float(drawn.split('cx="')[1].split('"')[0])
    assert low < middle < high
    assert middle == pytest.approx((low + high) / 2, abs=0.2)


def test_a_timeline_begins_with_the_run() -> None:
    drawn = timeline(
        [Bar("row", 50, 100, "label <1>", "TRAINING"), Bar("row", 100, 100, "end", "FOSSILIZED")], x_label="step"
    )
    assert "label &lt;1&gt;" in drawn
    assert 'width="2.0"' in drawn, "what took no time is seen all the same"
    assert ">0<" in drawn
