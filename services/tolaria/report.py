"""The report of a run: one small HTML file made from the run folder alone, for finished and for broken runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from services.chassis.files import write_atomically
from services.tolaria.charts import Bar, Series, line_chart, timeline
from services.tolaria.page import Html, document, number, section, table


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
    cards = [
        section("Result", _result(summary), wide=True),
        section("Validation accuracy", _curve(metrics, "validation_accuracy", "percent", events)),
        section("Training loss", _curve(metrics, "train_loss", "cross-entropy", events)),
        section("Parameters", _curve(metrics, "parameters", "parameters", events, step=True)),
        section("Seeds over time", _seed_timeline(events, metrics)),
        section("Seeds", _seeds(summary), wide=True),
        section("Decisions", _decisions(decisions), wide=True),
        section("Services", _services(mesh)),
        section("Start-up and events", _startup(summary, mesh)),
        section("Configuration", _config(folder / "config.yaml"), wide=True),
    ]
    return document(title, str(summary.get("status", "not finished")), cards)


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
            number(arm.get("test_accuracy"), ".2f"),
            number(arm.get("validation_accuracy"), ".2f"),
            number(arm.get("parameters"), ",d"),
            number(arm.get("flops"), ",d"),
            number(arm.get("training_flops"), ".3g"),
            number(arm.get("growth_flops"), ".3g"),
            number(arm.get("seconds"), ".1f"),
            number(arm.get("growth_seconds"), ".1f"),
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
    return told + table(head, rows, numbers=range(1, len(head)))


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
            [seed.get("seed", ""), _slot(seed), design, Html(_chip(seed["state"])), points, seed.get("reason", "")]
        )
    head = ["seed", "slot", "blueprint", "state", "worth, points of validation accuracy [interval]", "why"]
    return table(head, rows)


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
                number(item.get("width"), ",d"),
                number(item.get("planned_width"), ",d"),
                number(item.get("need"), ".2f"),
                "yes" if item.get("chosen") else "no",
                item.get("reason", ""),
            ]
            for item in decision.get("evidence") or []
        ]
        evidence = table(
            ["slot", "width", "planned", "use of planned width", "chosen", "why"], rows, numbers=range(1, 4)
        )
        parts.append(f"<details><summary>evidence for {len(rows)} slots</summary>{evidence}</details>" if rows else "")
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
    servers = table(["service", "address", "state at the end", "restarts"], rows, numbers=[3])
    news = [
        f"<li>{escape(event['name'])} {escape(event['kind'].replace('_', ' '))}: {escape(event['detail'])}</li>"
        for event in mesh.get("events") or []
        if event["kind"] in ("exited", "restarting", "gave_up") and event["detail"] != "exit code 0"
    ]
    return servers + (f"<ul>{''.join(news)}</ul>" if news else "<p>No process had to be restarted.</p>")


def _startup(summary: Mapping[str, Any], mesh: Mapping[str, Any]) -> str:
    rows = [[name, number(status["serving_after"], ".2f")] for name, status in (mesh.get("services") or {}).items()]
    rows += [[f"training: {name}", number(value, ".2f")] for name, value in (mesh.get("startup") or {}).items()]
    rows.append(["first training step", number(mesh.get("first_step_seconds"), ".2f")])
    events = summary.get("events") or {}
    told = (
        f"<p>Events published: {number(events.get('published'), ',d')}, "
        f"dropped: {number(events.get('dropped'), ',d')}.</p>"
    )
    return table(["ready after", "seconds"], rows, numbers=[1]) + told


def _config(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else "not there"
    return f"<details><summary>effective configuration</summary><pre>{escape(text)}</pre></details>"


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
