"""Small charts as inline SVG: no library, no script, no resource from elsewhere. Colors come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 240
#: As many as the page has styles s0, s1...
_COLORS = 4
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 34


@dataclass(frozen=True)
class Series:
    """A line of a chart: points in data units, drawn in their order; ``step`` draws stairs."""

    name: str
    points: Sequence[tuple[float, float]]
    step: bool = False


@dataclass(frozen=True)
class Bar:
    """A stretch of a timeline; ``style`` is a CSS class."""

    row: str
    start: float
    end: float
    label: str
    style: str


@dataclass(frozen=True)
class Share:
    """A bar from 0 to 100 % with a word to it, which is its CSS class too; ``value`` None was not measured."""

    row: str
    value: float | None
    style: str


@dataclass(frozen=True)
class Range:
    """A value with its interval, in data units."""

    name: str
    value: float
    low: float
    high: float


def ranges(rows: Sequence[Range], *, x_label: str) -> str:
    """Values with their intervals, one below the other, over a common axis. ``rows`` is not empty."""
    left, height = 90, 24
    total = _TOP + height * len(rows) + _BOTTOM
    axis = _Axis(min(row.low for row in rows), max(row.high for row in rows), left, _WIDTH - _RIGHT - 8)
    base = total - _BOTTOM
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 14}" text-anchor="middle">{tick:g}</text>')
    for index, row in enumerate(rows):
        y, style = _TOP + index * height + height // 2, f"s{index % _COLORS}"
        low, value, high = axis.at(row.low), axis.at(row.value), axis.at(row.high)
        label = f"{row.name}: {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<line class="line {style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<circle class="dot {style}" cx="{value:.1f}" cy="{y}" r="4.5"><title>{escape(label)}</title></circle>'
        )
    middle = (left + _WIDTH) / 2
    parts.append(f'<text class="label" x="{middle}" y="{total - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return f'<svg class="ranges" viewBox="0 0 {_WIDTH} {total}" role="img">{"".join(parts)}</svg>'


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, marks: Sequence[float] = ()) -> str:
    """Lines over a common pair of axes; ``marks`` are vertical lines. Empty series are left out."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return '<p class="none">not measured</p>'
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    x_axis, y_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT), _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for mark in marks:
        x = x_axis.at(mark)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    for index, one in reversed(list(enumerate(drawn))):  # the first lies on top
        points = _stairs(one.points) if one.step else one.points
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line s{index % _COLORS}" points="{path}"><title>{escape(one.name)}</title></polyline>'
        )
    legend = "".join(
        f'<span class="key s{index % _COLORS}">{escape(one.name)}</span>' for index, one in enumerate(drawn)
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg><p class="legend">{legend}</p>'


def timeline(bars: Sequence[Bar], *, x_label: str) -> str:
    """Stretches of time by row, with a hover text each."""
    if not bars:
        return '<p class="none">nothing happened</p>'
    rows = list(dict.fromkeys(bar.row for bar in bars))
    left, height = 150, 26
    total = _TOP + height * len(rows) + _BOTTOM
    axis = _Axis(0, max(bar.end for bar in bars), left, _WIDTH - _RIGHT)
    parts = []
    for index, row in enumerate(rows):
        y = _TOP + index * height + 17
        parts.append(f'<text class="tick" x="{left - 6}" y="{y}" text-anchor="end">{escape(row)}</text>')
    for bar in bars:
        x, y = axis.at(bar.start), _TOP + rows.index(bar.row) * height + 4
        width = max(axis.at(bar.end) - x, 2.0)
        box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height - 8}"'
        parts.append(f'<rect class="bar {escape(bar.style)}" {box} rx="2"><title>{escape(bar.label)}</title></rect>')
    base = total - _BOTTOM
    parts += [
        f'<text class="tick" x="{axis.at(tick):.1f}" y="{base + 14}" text-anchor="middle">{tick:g}</text>'
        for tick in axis.ticks
    ]
    parts.append(
        f'<text class="label" x="{(left + _WIDTH) / 2}" y="{total - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {total}" role="img">{"".join(parts)}</svg>'


def share_bars(shares: Sequence[Share], *, x_label: str) -> str:
    """One bar per row, in their order, with its figure beside it; what was not measured says so."""
    if not shares:
        return '<p class="none">not measured</p>'
    left, right, height = 150, _WIDTH - _RIGHT - 80, 26
    base = _TOP + height * len(shares)
    axis = _Axis(0, 1, left, right)
    parts = [
        f'<line class="grid" x1="{axis.at(tick):.1f}" x2="{axis.at(tick):.1f}" y1="{_TOP}" y2="{base}"/>'
        f'<text class="tick" x="{axis.at(tick):.1f}" y="{base + 14}" text-anchor="middle">{tick:.0%}</text>'
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for index, share in enumerate(shares):
        y = _TOP + index * height
        name = escape(share.row if len(share.row) <= 24 else f"...{share.row[-21:]}")
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 17}" text-anchor="end">{name}</text>')
        end, told = left + 6.0, "not measured"
        if share.value is not None:
            width = max(axis.at(share.value) - left, 1.0)
            box = f'x="{left}" y="{y + 4}" width="{width:.1f}" height="{height - 8}"'
            parts.append(f'<rect class="bar {escape(share.style)}" {box} rx="2"/>')
            end, told = left + width + 6.0, f"{share.value:.0%} {share.style}"
        parts.append(f'<text class="tick" x="{end:.1f}" y="{y + 17}">{escape(told)}</text>')
    parts.append(
        f'<text class="label" x="{(left + right) / 2}" y="{base + _BOTTOM - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return f'<svg viewBox="0 0 {_WIDTH} {base + _BOTTOM}" role="img">{"".join(parts)}</svg>'


class _Axis:
    """Data units to pixels, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high == low:
            low, high = low - 0.5, high + 0.5
        self._low, self._scale, self._start = low, (end - start) / (high - low), start
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
        first = math.ceil(low / step)
        self.ticks = [(first + index) * step for index in range(math.floor(high / step) - first + 1)]

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self._start + (value - self._low) * self._scale


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts += [
        f'<text class="tick" x="{x_axis.at(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>'
        for tick in x_axis.ticks
    ]
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{_LEFT}" y="{_TOP - 4}">{escape(y_label)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:g}"


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stairs = [points[0]]
    for x, y in points[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    return stairs
