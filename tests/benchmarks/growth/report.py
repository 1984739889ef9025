"""``docs/benchmarks.md`` and its plots, from the committed JSON and nothing else. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from services.chassis.files import write_atomically
from tests.benchmarks.growth import arms, plots, upkeep
from tests.benchmarks.growth.analysis import compare, difference, differences, parts, spread, verdict
from tests.benchmarks.growth.protocol import FIXED_RULES, SIX
from tests.infrastructure.processes import ROOT

PAGE: Final = "docs/benchmarks.md"
FOLDER: Final = "docs/benchmarks"
#: Where results are quoted, each between :func:`_mark` of its JSON and :data:`_END`.
QUOTING: Final = ("README.md", "docs/user_guide.md")
_END: Final = "<!-- end -->"
_HEAD: Final = """# What growth is worth

This page is written by `python -m tests.benchmarks.growth --report` from the JSON files in `docs/benchmarks/`; a test
checks that it says what they say. Accuracies are in percent on the test set, mean ± standard deviation over seeds, read
once per finished run after the protocol was committed. Contrasts are paired by seed: all arms of a seed begin with the
same draws and train on the same batches. Intervals are 95 % (Student); secondary contrasts, and
primary ones where there are more than two, are corrected by Holm's method, and there is no verdict before all pairs are
there. FLOPs are counted by formula; those of growth (looking at layers, judging seeds) count as spent. CPU seconds are
of one core beside other work: they say which arm takes longer, not how long it takes on a free machine.
"""
IN_WORDS: Final[Mapping[str, str]] = {
    "host": "the host, not grown",
    "host_equal_flops": "the host, trained until it cost as much as the grown run",
    "final_equal_epochs": "the grown run's final shape from scratch, as many epochs",
    "final_equal_flops": "the grown run's final shape from scratch, as many FLOPs",
    "final_equal_time": "the grown run's final shape from scratch, as many CPU seconds",
    "tamiyo": "grown, Tamiyo chooses by what layers use of their width",
    "uniform": "grown, all layers alike",
    "random": "grown, by chance",
    "narrowest": "grown, the narrowest layers first",
    "permuted": "grown, by the measured needs of other layers",
    "transplant": "grown, by another seed's plan",
    "off": "the platform attached, its controller off",
    "sweep": "best by validation of several static shapes that cost together as much as the grown run",
    **{f"static_{index}": f"static shape {index + 1} of those that the protocol names" for index in range(4)},
    "grown": "the trained host, grown, Tamiyo chooses",
    "grown_uniform": "the trained host, grown, all layers alike",
    "trained_on": "the trained host, trained on",
    "from_scratch": "a network of the budget's size from scratch",
}
_COSTS: Final = {
    "flops": (("training_flops", "growth_flops"), "FLOPs of training and growth"),
    "seconds": (("cpu_seconds",), "CPU seconds of training and growth"),
    "latency": (("latency_ms",), "CPU time of one training step of the final network, ms"),
}


def write(root: Path = ROOT) -> Path:
    """Write the page, its plots, and what :data:`QUOTING` quotes; returns the page."""
    text, drawings = pages(root)
    for name, drawing in drawings.items():
        write_atomically(root / FOLDER / name, drawing)
    write_atomically(root / PAGE, text)
    for name in QUOTING:
        if (root / name).exists():
            write_atomically(root / name, quoting((root / name).read_text(encoding="utf-8"), root))
    return root / PAGE


def quoting(text: str, root: Path = ROOT) -> str:
    """``text`` with the tables of the results between their marks, where it has them, as the JSON has them now."""
    quotes = (("extend", "", _extend_in_short), ("growth", "", _growth_in_short), ("growth", "rules", _rules_in_short))
    for name, part, in_short in quotes:
        found, mark = _read(root / FOLDER / f"{name}.json"), _mark(name, part)
        if found is not None and mark in text:
            before, _, rest = text.partition(mark)
            _, _, after = rest.partition(_END)
            text = f"{before}{mark}\n{in_short(found)}\n{_END}{after}"
    return text


def _mark(name: str, part: str = "") -> str:
    where = f"{part} of docs/benchmarks/{name}.json" if part else f"docs/benchmarks/{name}.json"
    return f"<!-- from {where}, by python -m tests.benchmarks.growth --report -->"


def _extend_in_short(extend: Mapping[str, Any]) -> str:
    """Test accuracies and the two differences that matter, by budget."""
    head = "| extra budget, in epochs of the bigger network | grown | trained on | bigger, from scratch "
    rows = [f"{head}| grown over trained on | grown over from scratch |", "|---|---|---|---|---|---|"]
    by_pair = {(one["first"], one["second"][0], one["entries"][0]): one for one in extend["contrasts"]}
    for budget, table in extend["budgets"].items():
        others = ("trained_on", "from_scratch")
        means = [statistics.fmean(table["arms"][arm]["test_accuracy"]) for arm in ("grown", *others)]
        gains = [_in_table(by_pair["grown", other, budget]) for other in others]
        rows.append(f"| {' | '.join([budget, *(f'{mean:.1f}' for mean in means), *gains])} |")
    return "\n".join(rows)


def _growth_in_short(growth: Mapping[str, Any]) -> str:
    """The balanced host's arms against the grown one; those only whose seeds are all there."""
    described = growth["protocol"]["entries"]["balanced"]
    arms_of = growth["hosts"]["balanced"]["arms"]
    rows = ["| arm | test % | parameters | grown over it |", "|---|---|---|---|"]
    for arm in described["arms"]:
        table = arms_of.get(arm)
        if table is None or table["seed"] != described["seeds"]:
            continue
        gain = "-"
        if arm != "tamiyo":
            pairs = list(differences(growth["hosts"], "balanced", "tamiyo", arm).values())
            gain = _in_table(compare([pairs], margin=None, confidence=growth["protocol"]["confidence"]))
        test, parameters = (statistics.fmean(table[key]) for key in ("test_accuracy", "parameters"))
        rows.append(f"| {IN_WORDS[arm]} | {test:.1f} | {parameters:,.0f} | {gain} |")
    return "\n".join(rows)


def _rules_in_short(growth: Mapping[str, Any]) -> str:
    """Tamiyo against each fixed rule on the hosts whose seeds are all there, and over all of them once they all are."""
    rows = [f"| host | Tamiyo, test % | over {' | over '.join(FIXED_RULES)} |", "|---|---|" + "---|" * len(FIXED_RULES)]
    confidence, whole = growth["protocol"]["confidence"], []
    for host in SIX:
        arms_of, seeds = growth["hosts"][host]["arms"], growth["protocol"]["entries"][host]["seeds"]
        if all(arms_of.get(arm, {"seed": None})["seed"] == seeds for arm in ("tamiyo", *FIXED_RULES)):
            whole.append(host)
            test = statistics.fmean(arms_of["tamiyo"]["test_accuracy"])
            rows.append(f"| `{host}` | {test:.1f} | {_gains(growth['hosts'], [host], confidence)} |")
    if whole == list(SIX):
        rows.append(f"| **mean of the six** | | {_gains(growth['hosts'], SIX, confidence)} |")
    return "\n".join(rows)


def _gains(tables: Mapping[str, Any], hosts: Sequence[str], confidence: float) -> str:
    samples = ([list(differences(tables, host, "tamiyo", rule).values()) for host in hosts] for rule in FIXED_RULES)
    return " | ".join(_in_table(compare(each, margin=None, confidence=confidence)) for each in samples)


def _in_table(found: Mapping[str, Any]) -> str:
    return difference(found).replace(" points", "")


def pages(root: Path = ROOT) -> tuple[str, dict[str, str]]:
    """The page's text, and its plots by file name."""
    growth, extend = (_read(root / FOLDER / f"{name}.json") for name in ("growth", "extend"))
    drawings: dict[str, str] = {}
    sections = [_HEAD]
    if extend is not None:
        sections += ["## Extending a trained network", *_described(extend, extend["budgets"], _budget_title, drawings)]
    else:
        sections += ["## Extending a trained network", "The final run has not been made: nothing is claimed."]
    if growth is not None:
        sections += ["## Growing from scratch", *_described(growth, growth["hosts"], str, drawings)]
    else:
        sections += ["## Growing from scratch", "The final run has not been made: nothing is claimed."]
    if (costs := upkeep.section(root / FOLDER)) is not None:
        sections += ["## What the platform costs a run", costs]
    return "\n\n".join(section.strip() for section in sections) + "\n", drawings


def _read(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_bytes())) if path.exists() else None


def _budget_title(budget: str) -> str:
    return f"{budget} more epochs"


def _described(result: Mapping[str, Any], tables: Mapping[str, Any], title: Any, drawings: dict[str, str]) -> list[str]:
    protocol = result["protocol"]
    missing = _missing(result, tables)
    made = [f"Protocol `{protocol['hash'][:12]}`, commit `{(protocol['commit'] or 'none')[:12]}`."]
    if missing:
        made.append(f"**Not complete**: {missing} of the protocol's runs are missing; what follows may change.")
    if protocol["tuning"]:
        made.append(_tuned(protocol))
    made += ["### Contrasts", _contrasts(result["contrasts"])]
    together = "budgets" in result
    if together:
        # Its tables differ in nothing but the budget: one drawing of all says more.
        every = [table["arms"] for table in tables.values()]
        made += _drawn(every, protocol["name"], "All budgets", ("flops", "seconds"), drawings)
    for name, table in tables.items():
        if not table["arms"]:
            continue
        made += [f"### {title(name)}", protocol["entries"][name]["network"]["why"], _table(table["arms"])]
        if not together:
            made += _drawn([table["arms"]], f"{protocol['name']}-{name}", title(name), ("flops", "latency"), drawings)
    return made


def _drawn(
    tables: Sequence[Mapping[str, Any]], name: str, title: str, kinds: Sequence[str], drawings: dict[str, str]
) -> list[str]:
    """Adds the plots of ``tables``, and says what to write on the page for them."""
    made = []
    for kind in kinds:
        cost, label = _COSTS[kind]
        found = [point for table in tables for point in plots.points(table, cost)]
        if found:
            file = f"{name}-{kind}.svg"
            drawings[file] = plots.scatter(found, title=f"{title}: accuracy against {label}", x_label=label)
            made.append(f"![Accuracy against {label}](benchmarks/{file})")
    return made


def _tuned(protocol: Mapping[str, Any]) -> str:
    """What was tried to find the learning rates."""
    rows = ["| learning rate of | tried | on seeds | chosen |", "|---|---|---|---|"]
    for one in protocol["tuning"]:
        tried, seeds = (", ".join(f"{value:g}" for value in one[key]) for key in ("rates", "seeds"))
        named = ", ".join(f"`{arm}`" for arm in one["arms"])
        for entry in one["entries"]:
            chosen = protocol["entries"][entry]["rates"][arms.ARMS[one["arms"][0]].rate]
            edge = "" if min(one["rates"]) < chosen < max(one["rates"]) else ", the end of what was tried"
            rows.append(f"| {entry}: {named} | {tried} | {seeds} | {chosen:g}{edge} |")
    kept = "What was not tuned has the rate of its class in a table that was, of this experiment or of the other."
    return "\n".join(["Learning rates were chosen by validation accuracy, on seeds of their own. " + kept, "", *rows])


def _missing(result: Mapping[str, Any], tables: Mapping[str, Any]) -> int:
    found = 0
    for name, table in tables.items():
        entry = result["protocol"]["entries"][name]
        for arm in entry["arms"]:
            found += len(entry["seeds"]) - len(table["arms"].get(arm, {"seed": []})["seed"])
    return found


def _contrasts(contrasts: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| contrast | pairs | difference and verdict | aim |", "|---|---|---|---|"]
    for one in contrasts:
        name = f"**{one['name']}** (primary)" if one["primary"] else one["name"]
        second = one["second"][0] if len(one["second"]) == 1 else f"best of {', '.join(one['second'])}"
        aim = "" if one["aim"] is None else f"{one['aim']:+g}"
        rows.append(f"| {name}: {one['first']} minus {second} | {one['pairs']} | {verdict(one)} | {aim} |")
        rows += [f"| … minus {arm} | | {difference(found)} | |" for arm, found in parts(one).items()]
    return "\n".join(rows)


def _table(measured: Mapping[str, Any]) -> str:
    rows = [
        "| arm | seeds | test % | validation % | parameters | FLOPs | of them growth | CPU s | step, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in measured.items():
        flops = [one + other for one, other in zip(arm["training_flops"], arm["growth_flops"], strict=True)]
        cells = [
            f"`{name}`: {IN_WORDS[name]}",
            str(len(arm["seed"])),
            spread(arm["test_accuracy"]),
            spread(arm["validation_accuracy"]),
            f"{statistics.fmean(arm['parameters']):,.0f}",
            f"{statistics.fmean(flops):.3g}",
            f"{statistics.fmean(arm['growth_flops']) / statistics.fmean(flops):.1%}",
            f"{statistics.fmean(arm['cpu_seconds']):.0f}",
            f"{statistics.fmean(arm['latency_ms']):.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
