"""The report of a run: one small HTML file made from the run folder alone, for finished and for broken runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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
details { margin-top: 6px; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: 12.5px; }
"""


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
        _section("Seeds over time", _seed_timeline(events)),
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
    accuracy = summary.get("accuracy") or {}
    grown, host, bigger = (accuracy.get(arm) for arm in ("grown", "host", "bigger"))
    if grown is None:
        reason = summary.get("reason") or "the run did not come to its end"
        return f'<p class="verdict bad">No result</p><p>{escape(str(reason))}</p>'
    if host is None:
        verdict = f'<p class="verdict">{grown:.2f} % on the test set</p><p>Not compared: no control was trained.</p>'
    else:
        gain = grown - host
        words = f"Growth gained {gain:+.2f} points" if gain > 0 else f"No gain from growth ({gain:+.2f} points)"
        verdict = f'<p class="verdict {"good" if gain > 0 else "bad"}">{words} over the same host</p>'
        if bigger is not None:
            ahead = grown - bigger
            verdict += (
                f"<p>Against its own final shape trained from scratch: {ahead:+.2f} points. One run each: differences "
                "below 0.7 points are noise.</p>"
            )
    arms = summary.get("arms") or {}
    rows = [
        [
            name,
            _number(a.get("test_accuracy"), ".2f"),
            _number(a.get("validation_accuracy"), ".2f"),
            _number(a.get("parameters"), ",d"),
            _number(a.get("training_flops"), ".3g"),
            _number(a.get("growth_flops"), ".3g"),
            _number(a.get("seconds"), ".1f"),
        ]
        for name, a in arms.items()
    ]
    head = ["arm", "test %", "validation %", "parameters", "training FLOPs", "growth FLOPs", "seconds"]
    cost = summary.get("growth_seconds")
    spent = "" if cost is None else f"<p>Wall clock spent on growth itself: {cost:.1f} s.</p>"
    return verdict + _table(head, rows, numbers=range(1, 7)) + spent


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


def _seed_timeline(events: Sequence[Mapping[str, Any]]) -> str:
    transitions = [event for event in events if event["kind"] == "transition"]
    last = max((event["step"] for event in events if "step" in event), default=0)
    bars = []
    for seed in dict.fromkeys(event["seed"] for event in transitions):
        story = [event for event in transitions if event["seed"] == seed]
        ends = [event["step"] for event in story[1:]] + [last]
        for event, end in zip(story, ends, strict=True):
            label = f"{event['to_state']} from step {event['step']}: {event['reason']}"
            row = f"{seed} {str(event['slot']).rsplit('/', 1)[-1]}"
            bars.append(Bar(row[:22], event["step"], end, label, str(event["to_state"])))
    return timeline(bars, x_label="optimizer step (point at a bar for its reason)")


def _seeds(summary: Mapping[str, Any]) -> str:
    rows = []
    for seed in summary.get("seeds") or []:
        worth = seed.get("contribution")
        points = "not measured"
        if worth is not None:
            points = f"{worth['points']:+.2f} [{worth['low']:+.2f}, {worth['high']:+.2f}]"
        rows.append([seed.get("seed", ""), seed["slot"], seed["blueprint"], seed["state"], points])
    return _table(["seed", "slot", "blueprint", "state", "worth, points of validation accuracy [interval]"], rows)


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for decision in decisions:
        parts.append(
            f"<p><b>After epoch {decision['epoch']}</b> (step {decision['step']}): "
            f"{escape(str(decision['explanation']))}</p>"
        )
        rows = [
            [
                str(item["slot"]).rsplit("/", 1)[-1],
                str(item["width"]),
                str(item["planned_width"]),
                _number(item["need"], ".2f"),
                "yes" if item["chosen"] else "no",
                item["reason"],
            ]
            for item in decision.get("evidence") or []
        ]
        table = _table(["slot", "width", "planned", "need", "chosen", "why"], rows, numbers=range(1, 4))
        parts.append(f"<details><summary>evidence for {len(rows)} slots</summary>{table}</details>" if rows else "")
    return "".join(parts) or '<p class="none">Tamiyo was not asked</p>'


def _services(mesh: Mapping[str, Any]) -> str:
    rows = [
        [name, status["address"] or "-", status["state"], str(status["restarts"])]
        for name, status in (mesh.get("services") or {}).items()
    ]
    table = _table(["service", "address", "state", "restarts"], rows, numbers=[3])
    news = [e for e in mesh.get("events") or [] if e["kind"] in ("exited", "restarting", "gave_up")]
    lines = "".join(f"<li>{escape(e['name'])} {escape(e['kind'])}: {escape(e['detail'])}</li>" for e in news)
    return table + (f"<ul>{lines}</ul>" if lines else "<p>No service had to be restarted.</p>")


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


def _section(title: str, body: str, *, wide: bool = False) -> str:
    return f'<section class="{"wide" if wide else ""}"><h2>{escape(title)}</h2>{body}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Iterable[int] = ()) -> str:
    if not rows:
        return '<p class="none">none</p>'
    right = set(numbers)

    def cell(tag: str, index: int, value: Any) -> str:
        return f"<{tag}{' class=n' if index in right else ''}>{escape(str(value))}</{tag}>"

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
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
