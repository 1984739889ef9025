"""Accuracy against cost as SVG files: a point with its spread for each arm. No library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 170, 20, 50
#: Of the axis of costs, to both sides of its middle, as a share of the highest cost.
_LEAST_REACH: Final = 0.1
_COLORS: Final = ("#1f6f8b", "#c8553d", "#588157", "#7d5ba6", "#b08900", "#444444")


@dataclass(frozen=True, slots=True)
class Point:
    """One arm: mean cost, mean accuracy and its standard deviation over seeds (0 for one seed)."""

    name: str
    x: float
    y: float
    spread: float


def points(arms: Mapping[str, Any], cost: Sequence[str]) -> list[Point]:
    """The arms whose test accuracy and ``cost`` (the sum of these figures) are measured."""
    found = []
    for name, arm in arms.items():
        costs = list(zip(*(arm[key] for key in cost), strict=True))
        rows = [
            (sum(own), y)
            for own, y in zip(costs, arm["test_accuracy"], strict=True)
            if y is not None and not any(value is None for value in own)
        ]
        if rows:
            ys = [y for _, y in rows]
            spread = statistics.stdev(ys) if len(ys) > 1 else 0.0
            found.append(Point(name, statistics.fmean(x for x, _ in rows), statistics.fmean(ys), spread))
    return found


def scatter(found: Sequence[Point], *, title: str, x_label: str) -> str:
    """An SVG document; needs one point or more. Points of one name have one color, and a line joins them."""
    xs = [point.x for point in found]
    ys = [y for point in found for y in (point.y - point.spread, point.y + point.spread)]
    # Costs that are equal up to a step are drawn so.
    middle, reach = (min(xs) + max(xs)) / 2, max((max(xs) - min(xs)) / 2, _LEAST_REACH * max(xs))
    x_axis = _axis(middle - reach, middle + reach, _LEFT, _WIDTH - _RIGHT)
    y_axis = _axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f'<title>{escape(title)}</title><g font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts += [
        f'<text x="{x_axis.at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.3g}</text>'
        for tick in x_axis.ticks
    ]
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 6}">test accuracy, % (bars: standard deviation over seeds)</text>')
    for index, name in enumerate(dict.fromkeys(point.name for point in found)):
        color = _COLORS[index % len(_COLORS)]
        hollow = "#ffffff" if index >= len(_COLORS) else color
        legend = _TOP + 14 + 20 * index
        own = sorted((point for point in found if point.name == name), key=lambda point: point.x)
        way = " ".join(f"{x_axis.at(point.x):.1f},{y_axis.at(point.y):.1f}" for point in own)
        if len(own) > 1:
            parts.append(f'<polyline points="{way}" fill="none" stroke="{color}" stroke-opacity="0.5"/>')
        for point in own:
            x, y = x_axis.at(point.x), y_axis.at(point.y)
            low, high = y_axis.at(point.y - point.spread), y_axis.at(point.y + point.spread)
            parts += [
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}"/>',
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{hollow}" stroke="{color}"/>',
            ]
        parts += [
            f'<circle cx="{right + 16}" cy="{legend - 4}" r="4" fill="{hollow}" stroke="{color}"/>',
            f'<text x="{right + 26}" y="{legend}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</g></svg>", ""])


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    scale: float
    start: float
    ticks: Sequence[float]

    def at(self, value: float) -> float:
        return self.start + (value - self.low) * self.scale


def _axis(low: float, high: float, start: float, end: float) -> _Axis:
    margin = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    ticks = [(first + index) * step for index in range(math.floor(high / step) - first + 1)]
    return _Axis(low, (end - start) / (high - low), start, ticks)
