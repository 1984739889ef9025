"""The page that reports are: one HTML file without scripts or resources from elsewhere, for light and dark screens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; --fg: #1c2330; --dim: #667085; --bg: #fbfbfa; --card: #ffffff; --rule: #e4e4e0;
  --c0: #0b7285; --c1: #c2410c; --c2: #6d28d9; --c3: #4d7c0f; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e8ec; --dim: #98a2b3; --bg: #14171c; --card: #1b2027;
  --rule: #2d333d; --c0: #3bc9db; --c1: #fb923c; --c2: #a78bfa; --c3: #a3e635; --good: #4ade80; --bad: #f87171; } }
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
td.n, td:first-child { white-space: nowrap; } p { margin: 6px 0; }
svg { width: 100%; height: auto; } .line { fill: none; stroke-width: 2; } .grid { stroke: var(--rule); }
.mark { stroke: var(--dim); stroke-dasharray: 3 4; } .tick, .label { fill: var(--dim); font-size: 11px; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.dot { fill: var(--card); stroke-width: 2.5; } svg.ranges { max-width: 620px; display: block; }
.note { color: var(--dim); margin: 6px 0 0; font-size: 13.5px; } small { color: var(--dim); }
.legend { margin: 4px 0 0; } .key { margin-right: 14px; font-size: 13px; color: var(--dim); }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; margin: 0 6px 3px 0;
  background: var(--c0); }
.key.s1::before { background: var(--c1); } .key.s2::before { background: var(--c2); }
.key.s3::before { background: var(--c3); }
.bar { fill: var(--dim); } .TRAINING { fill: #60a5fa; } .GRAFTING { fill: #f59e0b; } .STABILIZATION { fill: #a3a3a3; }
.bar.short { fill: var(--bad); } .bar.fits { fill: var(--good); } .bar.idle { fill: var(--c0); }
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


def document(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole page of ``sections`` (HTML)."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p>'
        f'<div class="cards">{"".join(sections)}</div></body></html>\n'
    )


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def section(title: str, body: str, *, wide: bool = False) -> str:
    """A card titled ``title`` around ``body`` (HTML); ``wide`` takes a whole row."""
    return f'<section class="{"wide" if wide else ""}"><h2>{escape(title)}</h2>{body}</section>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Iterable[int] = ()) -> str:
    """A table; cells are escaped unless they are :class:`Html`, columns in ``numbers`` are set flush right."""
    if not rows:
        return '<p class="none">none</p>'
    right = set(numbers)

    def cell(tag: str, index: int, value: Any) -> str:
        inner = value if isinstance(value, Html) else escape(str(value))
        return f"<{tag}{' class=n' if index in right else ''}>{inner}</{tag}>"

    top = "".join(cell("th", index, value) for index, value in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def number(value: Any, form: str) -> str:
    """A figure in ``form``; None was not measured and is said to be."""
    return "not measured" if value is None else format(value, form)
