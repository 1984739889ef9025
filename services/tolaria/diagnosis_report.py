"""A diagnosis for people: a table on a terminal, plain lines elsewhere, and one small HTML file. Torch-free."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.chassis.files import write_atomically
from services.tolaria.charts import Series, Share, line_chart, share_bars
from services.tolaria.diagnosis import LEGEND, TRUST, suggestion, verdict
from services.tolaria.page import document, number, section, table

_HEAD: Final = (
    "layer",
    "width",
    "in use",
    "effective rank",
    "participation ratio",
    "dead",
    "samples",
    "judgment",
    "suggested",
)
_NUMBERS: Final = (1, 2, 3, 4, 5, 6, 8)
_STYLES: Final = {"short": "bold red", "idle": "blue", "fits": "green", "unmeasured": "dim"}
_BAR: Final = 10


def cells(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """A layer's row of the table; what was not measured is a dash."""

    def show(key: str, form: str) -> str:
        return "-" if layer[key] is None else format(layer[key], form)

    change = layer["suggested_width"] - layer["width"]
    return (
        str(layer["layer"]),
        str(layer["width"]),
        show("utilization", ".0%"),
        show("effective_rank", ".1f"),
        show("participation_ratio", ".1f"),
        show("dead_units", "d"),
        str(layer["samples"]),
        judgment(layer),
        f"{layer['suggested_width']} ({change:+d})" if change else str(layer["suggested_width"]),
    )


def judgment(layer: Mapping[str, Any]) -> str:
    """One of short, fits, idle and unmeasured."""
    return str(layer["judgment"] or "unmeasured")


def headline(diagnosis: Mapping[str, Any]) -> str:
    """What was looked at, in a line."""
    epochs = diagnosis["epochs"]
    trained = "as it was given" if epochs == 0 else f"after {epochs} epoch{'s' if epochs > 1 else ''} without growth"
    return (
        f"{trained}: {diagnosis['validation_accuracy']:.2f} % on the validation split; "
        f"layers looked at on {diagnosis['samples']:,} training samples"
    )


def notes(diagnosis: Mapping[str, Any]) -> list[str]:
    """What is said below the table."""
    layers = diagnosis["layers"]
    measured = any(layer["utilization"] is not None for layer in layers)
    found = [verdict(diagnosis), *([suggestion(diagnosis)] if measured else [])]
    found += [f"Careful: {caution}" for caution in diagnosis["cautions"]]
    found += [
        f"{layer['layer']} was not measured: {layer['unmeasured_reason']}"
        for layer in layers
        if layer["utilization"] is None
    ]
    found += [
        f"{item['layer']} has no width that could change: {item['reason']}"
        for item in diagnosis["refused"]
        if item["layer"]  # why the whole network has none is the verdict
    ]
    return [*found, LEGEND, *TRUST] if measured else found


def show(diagnosis: Mapping[str, Any], out: TextIO) -> None:
    """Print the diagnosis: drawn on a terminal, as plain lines elsewhere."""
    if out.isatty():
        _draw(diagnosis, Console(file=out))
        return
    lines = [headline(diagnosis), *plain_table(diagnosis), *notes(diagnosis)]
    out.write("".join(f"{line}\n" for line in lines))
    out.flush()


def plain_table(diagnosis: Mapping[str, Any]) -> list[str]:
    """The table in columns of text."""
    rows = [_HEAD, *(cells(layer) for layer in diagnosis["layers"])]
    if len(rows) == 1:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(_HEAD))]
    return [
        "  ".join(
            value.rjust(widths[index]) if index in _NUMBERS else value.ljust(widths[index])
            for index, value in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def _draw(diagnosis: Mapping[str, Any], console: Console) -> None:
    console.print(Text(headline(diagnosis), style="dim"))
    if diagnosis["layers"]:
        drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for index, title in enumerate(_HEAD):
            drawn.add_column(title, justify="right" if index in _NUMBERS else "left", overflow="fold")
        drawn.add_column("")
        for layer in diagnosis["layers"]:
            style = _STYLES[judgment(layer)]
            row = [Text(value) for value in cells(layer)]
            row[0].stylize("bold" if layer["layer"] == diagnosis["tightest"] else "")
            row[_HEAD.index("judgment")].stylize(style)
            drawn.add_row(*row, Text("█" * round(_BAR * (layer["utilization"] or 0.0)), style=style))
        console.print(drawn)
    first, *rest = notes(diagnosis)
    console.print(Text(f"\n{first}", style="bold"))
    for line in rest:
        console.print(Text(line, style="dim" if line in (LEGEND, *TRUST) else ""))


def write_report(folder: Path, diagnosis: Mapping[str, Any]) -> Path:
    """Write ``report.html`` beside what else lies in ``folder``. Raises EsperError (STORAGE_FULL, STORAGE_FAILED)."""
    path = folder / "report.html"
    write_atomically(path, render(folder, diagnosis), fsync=False)
    return path


def render(folder: Path, diagnosis: Mapping[str, Any]) -> str:
    """The report's HTML."""
    if diagnosis["status"] != "succeeded":
        told = f'<p class="verdict bad">No diagnosis</p><p>{escape(str(diagnosis["reason"]))}</p>'
        return document(
            f"Esper diagnosis {folder.name}", str(diagnosis["status"]), [section("Result", told, wide=True)]
        )
    layers = diagnosis["layers"]
    cards = [
        section("What it is short of", _result(diagnosis), wide=True),
        section("Width in use", _bars(diagnosis)),
        section("Training before it", _curve(folder / "metrics.jsonl")),
        section(
            "Layers",
            table(_HEAD, [cells(layer) for layer in layers], numbers=_NUMBERS) + f"<p>{LEGEND}</p>" + _together(layers),
            wide=True,
        ),
        section("Suggested widths at equal FLOPs", _suggestion(diagnosis)),
        section("How far to trust this", "".join(f"<p>{escape(line)}</p>" for line in TRUST)),
        section(
            "Layers without a width that could change",
            table(
                ["layer", "why"], [[item["layer"] or "the network", item["reason"]] for item in diagnosis["refused"]]
            ),
            wide=True,
        ),
        section("Configuration", _config(folder / "config.yaml"), wide=True),
    ]
    return document(f"Esper diagnosis {folder.name}", headline(diagnosis), cards)


def _result(diagnosis: Mapping[str, Any]) -> str:
    careful = "".join(f'<p class="bad">{escape(caution)}</p>' for caution in diagnosis["cautions"])
    return f'<p class="verdict">{escape(verdict(diagnosis))}</p>{careful}'


def _bars(diagnosis: Mapping[str, Any]) -> str:
    shares = [Share(layer["layer"], layer["utilization"], judgment(layer)) for layer in diagnosis["layers"]]
    return share_bars(shares, x_label="effective rank / width")


def _together(layers: list[Mapping[str, Any]]) -> str:
    rows = [
        [layer["layer"], ", ".join(layer["changes_with"]) or "nothing else", ", ".join(layer["read_by"])]
        for layer in layers
    ]
    head = ["layer", "its channels are also those of", "and are read by"]
    return f"<details><summary>what changes with each width</summary>{table(head, rows)}</details>"


def _suggestion(diagnosis: Mapping[str, Any]) -> str:
    rows = [
        [label, number(diagnosis[key]["present"], ",d"), number(diagnosis[key]["suggested"], ",d")]
        for key, label in (("flops", "FLOPs per sample, forward"), ("parameters", "parameters"))
    ]
    return f"<p>{escape(suggestion(diagnosis))}</p>" + table(["", "now", "suggested"], rows, numbers=[1, 2])


def _curve(path: Path) -> str:
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError):  # a line that was cut short
            epoch = json.loads(line)
            points.append((epoch["epoch"], epoch["validation_accuracy"]))
    return line_chart([Series("host", points)], x_label="epoch", y_label="validation, percent")


def _config(path: Path) -> str:
    return f"<details><summary>effective configuration</summary><pre>{escape(path.read_text('utf-8'))}</pre></details>"
