"""The report of a run: one small HTML file made from the run folder alone, for finished and for broken runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from services.chassis.files import write_atomically
from services.tolaria.charts import Bar, Range, Series, line_chart, ranges, timeline
from services.tolaria.exported import exports_table
from services.tolaria.page import Html, document, number, section, table
from services.tolaria.progress import GROWN
from services.tolaria.verdict import CONFIDENCE, Difference, judge, shape, spent

_VERDICT_STYLES: Final = {"grow": "good", "static": "good", "not_compared": ""}
_ARMS: Final = {
    GROWN: "this run",
    "host": "without growth",
    "bigger": "the final shape from scratch",
    "uniform": "grown alike in all layers",
}
_LENGTHS: Final = {"epochs": "for as many epochs as the run", "flops": "to the FLOPs of the run, growth included"}
_COSTS: Final = {
    "training": "training",
    "culled_seeds": "of it seeds that were not kept",
    "discarded": "of it steps that were taken back",
    "health": "measuring how layers use their width",
    "counterfactuals": "counterfactuals: what seeds are worth",
    "validation": "validation",
    "total": "all",
}

_BUDGETS: Final = {
    "flops": ("FLOPs per image", ",.0f"),
    "parameters": ("parameters", ",.0f"),
    "latency": ("ms per step", ",.3g"),
}
_BUDGET_ROWS: Final = {"host": "the host", "limit": "allowed", "final": "in the end"}


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
    metrics = _lines(folder / "metrics.jsonl")
    # A control that grows has a story of its own, whose seeds have the same names.
    decisions, events = (
        [line for line in _lines(folder / name) if line.get("arm", GROWN) == GROWN]
        for name in ("decisions.jsonl", "events.jsonl")
    )
    title = f"Esper run {folder.name}"
    cards = [
        section("Verdict", _result(summary), wide=True),
        section("Validation accuracy", _curve(metrics, "validation_accuracy", "percent", events)),
        section("Training loss", _curve(metrics, "train_loss", "cross-entropy", events)),
        section("Parameters", _curve(metrics, "parameters", "parameters", events, step=True)),
        section("Seeds over time", _seed_timeline(events, metrics)),
        section("Where the FLOPs went", _costs(summary)),
        section("What became of the host", _shape(summary)),
        section("Growth budget", _budget(summary)),
        section("Kernel cache", _kernel_cache(summary)),
        section("Seeds", _seeds(summary), wide=True),
        section("Decisions", _decisions(decisions, summary), wide=True),
        section("Export", exports_table(summary), wide=True),
        section("Services", _services(mesh)),
        section("Start-up and events", _startup(summary, mesh)),
        section("Configuration", _config(folder / "config.yaml"), wide=True),
    ]
    return document(title, str(summary.get("status", "not finished")), cards)


def _result(summary: Mapping[str, Any]) -> str:
    """The verdict, its reasons and the arms."""
    found = judge(summary)
    style = _VERDICT_STYLES.get(found.choice, "bad")
    parts = [f'<p class="verdict {style}">{escape(found.title)}</p>']
    parts += [f"<p>{escape(reason)}</p>" for reason in found.reasons]
    arms: Mapping[str, Mapping[str, Any]] = summary.get("arms") or {}
    if not arms:
        return "".join(parts)
    points = [Range(name, arm["test_accuracy"], *arm["test_interval"]) for name, arm in arms.items()]
    parts.append(ranges(points, x_label=f"test accuracy, percent, with its {CONFIDENCE:.0%} interval over the images"))
    parts.append(_arms(arms, summary.get("comparisons") or {}))
    parts += [f'<p class="note">{escape(note)}</p>' for note in (*found.notes, *_circumstances(summary))]
    return "".join(parts)


def _arms(arms: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Any]) -> str:
    rows = [
        [
            Html(f"{escape(name)}<br><small>{_ARMS.get(name, '')}</small>"),
            f"{arm['test_accuracy']:.2f} [{arm['test_interval'][0]:.1f}, {arm['test_interval'][1]:.1f}]",
            str(Difference(**comparisons[name])) if name in comparisons else "",
            number(arm["validation_accuracy"], ".2f"),
            number(arm["parameters"], ",d"),
            number(arm["flops"], ",d"),
            number(spent(arm), ".3g"),
            number(arm["steps"], ",d"),
            number(arm["seconds"], ".1f"),
            "none" if arm["growth_seconds"] is None else f"{arm['growth_seconds']:.1f}",
        ]
        for name, arm in arms.items()
    ]
    head = [
        "arm",
        "test %",
        "grown is better by",
        "validation %",
        "parameters",
        "FLOPs per image",
        "FLOPs spent",
        "steps",
        "wall clock, s",
        "of it growth, s",
    ]
    return table(head, rows, numbers=range(1, len(head)))


def _circumstances(summary: Mapping[str, Any]) -> list[str]:
    told = []
    if summary.get("comparisons"):
        length = _LENGTHS.get(str(summary.get("compare_at")))
        told += [f"Host and bigger were trained {length}."] if length else []
    if (start := summary.get("start_accuracy")) is not None:
        told.append(f"Before the first step the trained host stood at {start:.2f} % on the validation split.")
    if rewinds := summary.get("rewinds"):
        told.append(
            f"Rewound to the graft of a failed trial, and the steps since then made again without it: {rewinds}x."
        )
    return told


def _costs(summary: Mapping[str, Any]) -> str:
    """Everything that the grown network cost, in FLOPs counted by formula."""
    flops = summary.get("flops") or {}
    total = flops.get("total")
    if not total:
        return '<p class="none">not measured</p>'
    rows = [[words, f"{flops[name]:.4g}", f"{flops[name] / total:.2%}"] for name, words in _COSTS.items()]
    return table(["of the grown network", "FLOPs", "share"], rows, numbers=[1, 2])


def _budget(summary: Mapping[str, Any]) -> str:
    """What growth was allowed to make of the host's cost, and what it made of it."""
    budget = summary.get("budget") or {}
    if budget.get("kind") is None:
        return '<p class="none">none: growth was off, or the run ended before it was known</p>'
    unit, form = _BUDGETS[budget["kind"]]
    host = budget["host"]
    rows = [[words, format(budget[name], form), f"{budget[name] / host:.2f}"] for name, words in _BUDGET_ROWS.items()]
    return table(["cost of the network", unit, "of the host's"], rows, numbers=[1, 2])


def _kernel_cache(summary: Mapping[str, Any]) -> str:
    """How kernels came to their seeds."""
    cache = summary.get("kernel_cache") or {}
    if cache.get("hits") is None:
        return '<p class="none">not measured</p>'
    rows = [
        ["lookups that hit", number(cache["hits"], ",d")],
        ["lookups that missed", number(cache["misses"], ",d")],
        ["hits per lookup", number(cache["hit_ratio"], ".1%")],
        ["kernels at hand", number(cache["entries"], ",d")],
        ["kernels unloaded to make room", number(cache["evictions"], ",d")],
        ["bytes at hand", number(cache["size_bytes"], ",d")],
        ["bytes allowed", number(cache["limit_bytes"], ",d")],
        ["to load one that is at hand, median, µs", _microseconds(cache["load_seconds"])],
        ["to verify one, median, µs", _microseconds(cache["verify_seconds"])],
    ]
    return table(["kernels", ""], rows, numbers=[1])


def _microseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e6, ",.1f")


def _shape(summary: Mapping[str, Any]) -> str:
    """The final shape, layer by layer."""
    rows = [
        [
            change["path"],
            change["operation"],
            _dimensions(change["before_shape"]) or "-",
            _dimensions(change["after_shape"]),
        ]
        for change in summary.get("changes") or []
    ]
    short = ", ".join(shape(summary))
    if not rows:
        return '<p class="none">Nothing: no seed was kept.</p>'
    layers = table(["layer", "operation", "before", "after"], rows)
    return f"<p>{escape(short)}</p><details><summary>{len(rows)} layers</summary>{layers}</details>"


def _dimensions(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


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
    own = (line for line in metrics if line["arm"] == GROWN)
    last = max((line["step"] for line in (*transitions, *own)), default=0)
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
        design = f"{seed.get('family', '')} +{seed.get('size', '')} ({str(seed['blueprint'])[:8]})"
        rows.append(
            [
                seed.get("seed", ""),
                _slot(seed),
                design,
                Html(_chip(seed["state"])),
                _points(worth),
                seed.get("reason", ""),
            ]
        )
    head = ["seed", "slot", "blueprint", "state", "worth, points of validation accuracy [interval]", "why"]
    return table(head, rows)


def _points(worth: Mapping[str, Any] | None) -> str:
    if worth is None:
        return "not measured"
    return f"{worth['points']:+.2f} [{worth['low']:+.2f}, {worth['high']:+.2f}]"


def _worth_of_plan(decision: object, summary: Mapping[str, Any]) -> str:
    """What became of the seeds of one decision, and what they are worth together."""
    seeds = [seed for seed in summary.get("seeds") or [] if decision and seed.get("decision") == decision]
    if not seeds:
        return ""
    kept = sum(seed["state"] == "FOSSILIZED" for seed in seeds)
    together = next((seed["plan_contribution"] for seed in seeds if seed.get("plan_contribution")), None)
    worth = f"; all of them together are worth {_points(together)} points" if together else ""
    return f"<p>{kept} of its {len(seeds)} seeds were kept{worth}.</p>"


def _decisions(decisions: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    parts = []
    for decision in decisions:
        parts.append(
            f"<p><b>After epoch {decision['epoch']}</b> (step {decision['step']}): "
            f"{escape(str(decision['explanation']))}</p>"
        )
        parts.append(_worth_of_plan(decision.get("decision"), summary))
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
