"""The report of a run: one small HTML file made from the run folder alone, for finished and for broken runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from services.chassis.files import write_atomically
from services.tolaria.charts import Bar, Series, line_chart, timeline

_STYLE = """
:root { color-scheme: light dark; --fg: #1c2330; --dim: #667085; --bg: #fbfbfa; --card: #ffffff; --rule: #e4e4e0;
  --c0: #0b7285; --c1: #c2410c; --c2: #6d28d9; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e8ec; --dim: #98a2b3; --bg: #14171c; --card: #1b2027;
  --rule: #2d333d; --c0: #3bc9db; --c1: #fb923c; --c2: #a78bfa; --good: #4ade80; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1220px; padding: 28px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 0 0 8px; }
.sub { color: var(--dim); margin: 2px 0 18px; } .verdict { font-size: 19px; margin: 0 0 4px; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .none { color: var(--dim); font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 16px; min-width: 0; }
.wide { grid-column: 1 / -1; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: var(--dim); font-weight: 500; } th, td { padding: 4px 10px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); } .n { text-align: right; }
svg { width: 100%; height: auto; } .line { fill: none; stroke-width: 2; } .grid { stroke: var(--rule); }
.mark { stroke: var(--dim); stroke-dasharray: 3 4; } .tick, .label { fill: var(--dim); font-size: 11px; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.legend { margin: 4px 0 0; } .key { margin-right: 14px; font-size: 13px; color: var(--dim); }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; margin: 0 6px 3px 0;
  background: var(--c0); }
.key.s1::before { background: var(--c1); } .key.s2::before { background: var(--c2); }
.bar { fill: var(--dim); } .TRAINING { fill: #60a5fa; } .GRAFTING { fill: #f59e0b; } .STABILIZATION { fill: #a3a3a3; }
.EVALUATING { fill: #c084fc; } .FINE_TUNING { fill: #2dd4bf; } .FOSSILIZED { fill: #22c55e; } .CULLED { fill: #ef4444; }
.GERMINATED, .LOADING { fill: #cbd5e1; } .CANCELLED, .ROLLED_BACK { fill: #9f1239; }
.chip { color: #10141a; border-radius: 4px; padding: 1px 7px; font-size: 12px;
  white-space: nowrap; background: #a3a3a3; }
.chip.FOSSILIZED { background: #22c55e; } .chip.CULLED { background: #f87171; } .chip.CANCELLED { background: #fda4af; }
.chip.EVALUATING { background: #c084fc; } .chip.TRAINING { background: #60a5fa; }
.chip.GRAFTING { background: #f59e0b; }
.chip.FINE_TUNING { background: #2dd4bf; } .chip.ROLLED_BACK { background: #fb7185; }
.chip.GERMINATED, .chip.LOADING { background: #cbd5e1; } .chips { margin: 8px 0 0; } .chips .chip { margin-right: 6px; }
details { margin-top: 6px; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: 12.5px; }
"""


@dataclass(frozen=True)
class Verdict:
    """What a comparison says: whether growth gained, in which words, and how far to trust them."""

    gained: bool
    words: str
    caution: str


def verdict(summary: Mapping[str, Any]) -> Verdict | None:
    """The grown network against the controls, by test accuracy; None where the grown one or the host is missing."""
    accuracy = summary.get("accuracy") or {}
    grown, host, bigger = (accuracy.get(arm) for arm in ("grown", "host", "bigger"))
    if grown is None or host is None:
        return None
    gain = grown - host
    if gain > 0:
        words = f"Growth gained {gain:+.2f} points over the same host"
    else:
        words = f"No gain from growth: {gain:+.2f} points against the same host"
    if bigger is not None:
        words += f", {grown - bigger:+.2f} against its own final shape trained from scratch"
    caution = "One run of each: try other values of run.seed before you trust a small difference."
    return Verdict(gain > 0, words, caution)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from what lies in ``folder``; what is missing is said to be missing.

    Raises:
        EsperError: STORAGE_FULL, STORAGE_FAILED.
    """
    path = folder / "report.html"
    write_atomically(path, render(folder), fsync=False)
    return path


def render(folder: Path) -> str:
    """The report's HTML."""
    summary = _object(folder / "summary.json")
    mesh = _object(folder / "mesh.json")
    metrics, decisions = _lines(folder / "metrics.jsonl"), _lines(folder / "decisions.jsonl")
    events = _lines(folder / "events.jsonl")
    title = f"Esper run {folder.name}"
    sections = [
        _section("Result", _result(summary), wide=True),
        _section("Validation accuracy", _curve(metrics, "validation_accuracy", "percent", events)),
        _section("Training loss", _curve(metrics, "train_loss", "cross-entropy", events)),
        _section("Parameters", _curve(metrics, "parameters", "parameters", events, step=True)),
        _section("Seeds over time", _seed_timeline(events, metrics)),
        _section("Seeds", _seeds(summary), wide=True),
        _section("Decisions", _decisions(decisions), wide=True),
        _section("Services", _services(mesh)),
        _section("Start-up and events", _startup(summary, mesh)),
        _section("Configuration", _config(folder / "config.yaml"), wide=True),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="sub">{escape(str(summary.get("status", "not finished")))}</p>'
        f'<div class="cards">{"".join(sections)}</div></body></html>\n'
    )


def _result(summary: Mapping[str, Any]) -> str:
    grown = (summary.get("accuracy") or {}).get("grown")
    found = verdict(summary)
    if grown is None:
        reason = summary.get("reason") or "the run did not come to its end"
        told = f'<p class="verdict bad">No result</p><p>{escape(str(reason))}</p>'
    elif found is None:
        told = (
            f'<p class="verdict">{grown:.2f} % on the test set</p><p>Not compared: no host was trained beside it.</p>'
        )
    else:
        style = "good" if found.gained else "bad"
        told = f'<p class="verdict {style}">{escape(found.words)}</p><p>{escape(found.caution)}</p>'
    rows = [
        [
            name,
            _number(arm.get("test_accuracy"), ".2f"),
            _number(arm.get("validation_accuracy"), ".2f"),
            _number(arm.get("parameters"), ",d"),
            _number(arm.get("flops"), ",d"),
            _number(arm.get("training_flops"), ".3g"),
            _number(arm.get("growth_flops"), ".3g"),
            _number(arm.get("seconds"), ".1f"),
            _number(arm.get("growth_seconds"), ".1f"),
        ]
        for name, arm in (summary.get("arms") or {}).items()
    ]
    head = [
        "arm",
        "test %",
        "validation %",
        "parameters",
        "FLOPs per image",
        "training FLOPs",
        "growth FLOPs",
        "wall clock, s",
        "of it growth, s",
    ]
    return told + _table(head, rows, numbers=range(1, len(head)))


def _curve(
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    unit: str,
    events: Sequence[Mapping[str, Any]],
    *,
    step: bool = False,
) -> str:
    arms = list(dict.fromkeys(line["arm"] for line in metrics))
    series = [
        Series(arm, [(m["epoch"], m[key]) for m in metrics if m["arm"] == arm and m[key] is not None], step)
        for arm in arms
    ]
    grafts = [event["epoch"] for event in events if event["kind"] == "transition" and event["to_state"] == "GRAFTING"]
    return line_chart(series, x_label="epoch (dashed: a graft)", y_label=unit, marks=sorted(set(grafts)))


def _seed_timeline(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    # A resumed run tells what it went through again: each transition counts once.
    told = [event for event in events if event["kind"] == "transition"]
    transitions = list({(event["seed"], event["to_state"], event["step"]): event for event in told}.values())
    last = max((line["step"] for line in (*transitions, *metrics)), default=0)
    bars = []
    for seed in dict.fromkeys(event["seed"] for event in transitions):
        story = [event for event in transitions if event["seed"] == seed]
        ends = [event["step"] for event in story[1:]] + [last]
        for event, end in zip(story, ends, strict=True):
            if event["to_state"] != "DORMANT":
                label = f"{event['to_state']} from step {event['step']}: {event['reason']}"
                bars.append(Bar(f"{seed} {_slot(event)}"[:24], event["step"], end, label, str(event["to_state"])))
    states = "".join(_chip(state) for state in dict.fromkeys(bar.style for bar in bars))
    return timeline(bars, x_label="optimizer step (point at a bar for its reason)") + f'<p class="chips">{states}</p>'


def _seeds(summary: Mapping[str, Any]) -> str:
    rows = []
    for seed in summary.get("seeds") or []:
        worth = seed.get("contribution")
        points = "not measured"
        if worth is not None:
            points = f"{worth['points']:+.2f} [{worth['low']:+.2f}, {worth['high']:+.2f}]"
        design = f"{seed.get('family', '')} +{seed.get('size', '')} ({str(seed['blueprint'])[:8]})"
        rows.append(
            [seed.get("seed", ""), _slot(seed), design, _Html(_chip(seed["state"])), points, seed.get("reason", "")]
        )
    head = ["seed", "slot", "blueprint", "state", "worth, points of validation accuracy [interval]", "why"]
    return _table(head, rows)


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for decision in decisions:
        parts.append(
            f"<p><b>After epoch {decision['epoch']}</b> (step {decision['step']}): "
            f"{escape(str(decision['explanation']))}</p>"
        )
        rows = [
            [
                _slot(item),
                _number(item.get("width"), ",d"),
                _number(item.get("planned_width"), ",d"),
                _number(item.get("need"), ".2f"),
                "yes" if item.get("chosen") else "no",
                item.get("reason", ""),
            ]
            for item in decision.get("evidence") or []
        ]
        table = _table(["slot", "width", "planned", "use of planned width", "chosen", "why"], rows, numbers=range(1, 4))
        parts.append(f"<details><summary>evidence for {len(rows)} slots</summary>{table}</details>" if rows else "")
    return "".join(parts) or '<p class="none">Tamiyo was not asked</p>'


def _slot(item: Mapping[str, Any]) -> str:
    """A slot's name without its collection."""
    return str(item["slot"]).rsplit("/", 1)[-1]


def _chip(state: object) -> str:
    return f'<span class="chip {escape(str(state))}">{escape(str(state))}</span>'


def _services(mesh: Mapping[str, Any]) -> str:
    rows = [
        [name, status["address"] or "-", status["state"], str(status["restarts"])]
        for name, status in (mesh.get("services") or {}).items()
    ]
    table = _table(["service", "address", "state at the end", "restarts"], rows, numbers=[3])
    news = [
        f"<li>{escape(event['name'])} {escape(event['kind'].replace('_', ' '))}: {escape(event['detail'])}</li>"
        for event in mesh.get("events") or []
        if event["kind"] in ("exited", "restarting", "gave_up") and event["detail"] != "exit code 0"
    ]
    return table + (f"<ul>{''.join(news)}</ul>" if news else "<p>No process had to be restarted.</p>")


def _startup(summary: Mapping[str, Any], mesh: Mapping[str, Any]) -> str:
    rows = [[name, _number(status["serving_after"], ".2f")] for name, status in (mesh.get("services") or {}).items()]
    rows += [[f"training: {name}", _number(value, ".2f")] for name, value in (mesh.get("startup") or {}).items()]
    rows.append(["first training step", _number(mesh.get("first_step_seconds"), ".2f")])
    events = summary.get("events") or {}
    told = (
        f"<p>Events published: {_number(events.get('published'), ',d')}, "
        f"dropped: {_number(events.get('dropped'), ',d')}.</p>"
    )
    return _table(["ready after", "seconds"], rows, numbers=[1]) + told


def _config(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else "not there"
    return f"<details><summary>effective configuration</summary><pre>{escape(text)}</pre></details>"


class _Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def _section(title: str, body: str, *, wide: bool = False) -> str:
    return f'<section class="{"wide" if wide else ""}"><h2>{escape(title)}</h2>{body}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Iterable[int] = ()) -> str:
    if not rows:
        return '<p class="none">none</p>'
    right = set(numbers)

    def cell(tag: str, index: int, value: Any) -> str:
        inner = value if isinstance(value, _Html) else escape(str(value))
        return f"<{tag}{' class=n' if index in right else ''}>{inner}</{tag}>"

    top = "".join(cell("th", index, value) for index, value in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _number(value: Any, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _object(path: Path) -> dict[str, Any]:
    """A file of one JSON object; empty where it is missing or was cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
