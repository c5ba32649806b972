"""Curves and histograms as SVG, drawn by hand: no plotting library, readable on light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 32, 40
_MOST_POINTS = 600

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #555 }
.grid { stroke: #8884; stroke-width: 1 }
.train { stroke: #3b82f6; fill: none; stroke-width: 1.5 }
.raw { stroke: #3b82f655; fill: none; stroke-width: 1 }
.valid { stroke: #f97316; fill: none; stroke-width: 2 }
.dot { fill: #f97316 }
.bar { fill: #3b82f6 }
.bar.second { fill: #f97316 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }"""

Points = Sequence[tuple[float, float]]
_Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    points: Points
    """(step, value); values that are no numbers are left out."""
    measured: bool = False
    """Whether it was measured now and then (orange, with dots) and not at every step (blue)."""
    smooth: bool = False
    """Whether a running mean is drawn over the values."""


def loss_svg(train: Points, valid: Points, *, title: str) -> str:
    """An SVG document of (step, loss) `train` and `valid`; the training loss is shown raw and smoothed."""
    lines = [Line("training loss", train, smooth=True)]
    if valid:
        lines.append(Line("validation loss (orange)", valid, measured=True))
    return chart_svg(lines, title=title)


def chart_svg(lines: Sequence[Line], *, title: str, across: str = "step") -> str:
    """An SVG document of `lines` over steps. The scale holds 0, and what the values reach.

    Of lines that are smoothed, the scale holds the mean and 99 of 100 values: a single leap ends at the edge.
    """
    kept = [(line, [point for point in line.points if math.isfinite(point[1])]) for line in lines]
    values = [value for line, points in kept for value in _reached(points, smooth=line.smooth)]
    low, high = min([0.0, *values]) * 1.05, max([0.0, *values]) * 1.05
    if low == high:
        high = 1.0
    last = max([step for _, points in kept for step, _ in points], default=1.0) or 1.0

    def at(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + step / last * (_WIDTH - _LEFT - _RIGHT)
        share = (high - min(high, max(low, value))) / (high - low)
        return round(x, 1), round(_TOP + share * (_HEIGHT - _TOP - _BOTTOM), 1)

    body = [_grid(_ticks(low, high), at), *_below(last, at, across)]
    for line, points in kept:
        body += [_path(_thin(points), "raw", at)] if line.smooth else []
        body += [_path(_thin(_smooth(points) if line.smooth else points), "valid" if line.measured else "train", at)]
        body += [
            f'<circle class="dot" cx="{at(*p)[0]}" cy="{at(*p)[1]}" r="3"/>' for p in _thin(points) if line.measured
        ]
    legend = " · ".join(line.name for line in lines)
    body.append(f'<text x="{_WIDTH - _RIGHT}" y="20" text-anchor="end">{escape(legend)}</text>')
    return _document(body, title)


def histogram_svg(values: Sequence[float], others: Sequence[float] = (), *, title: str, across: str) -> str:
    """An SVG document: how many of `values` (blue), and of `others` (orange), are in each of up to 40 stretches."""
    top = max([*values, *others], default=0.0)
    step = _round_step(max(top, 1.0) / 20)
    count = int(top // step) + 1
    found = [[0] * count, [0] * count]
    for bars, numbers in zip(found, (values, others), strict=True):
        for number in numbers:
            bars[int(number // step)] += 1
    highest = max(map(max, found)) * 1.05 or 1.0

    def at(value: float, rows: float) -> tuple[float, float]:
        x = _LEFT + value / (count * step) * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_TOP + (1 - rows / highest) * (_HEIGHT - _TOP - _BOTTOM), 1)

    body = [_grid([tick for tick in _ticks(0.0, highest) if tick == int(tick)], at), *_below(count * step, at, across)]
    sets = [(name, bars) for name, bars in (("bar", found[0]), ("bar second", found[1])) if any(bars)]
    for place, (name, bars) in enumerate(sets):
        for index, rows in enumerate(bars):
            if rows:
                left, up = at((index + place / len(sets)) * step, rows)
                right, down = at((index + (place + 1) / len(sets)) * step, 0)
                size = f'width="{max(0.5, round(right - left - 1, 1))}" height="{round(down - up, 1)}"'
                tip = f"<title>{index * step:g} to {(index + 1) * step:g}: {rows}</title>"
                body.append(f'<rect class="{name}" x="{left}" y="{up}" {size}>{tip}</rect>')
    return _document(body, title)


def _document(body: Sequence[str], title: str) -> str:
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    label = f'role="img" aria-label="{escape(title)}"'
    head = f'<text x="{_LEFT}" y="20">{escape(title)}</text>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>'
    return "\n".join(part for part in (svg, f"<style>{_STYLE}</style>", *body, head, "</svg>") if part) + "\n"


def _grid(ticks: Sequence[float], at: _Place) -> str:
    lines = []
    for value in ticks:
        y = at(0, value)[1]
        lines.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    return "\n".join(lines)


def _below(last: float, at: _Place, name: str) -> list[str]:
    """What stands under the chart."""
    y = _HEIGHT - _BOTTOM + 20
    ticks = [f'<text x="{at(value, 0)[0]}" y="{y}" text-anchor="middle">{value:g}</text>' for value in _ticks(0, last)]
    return [*ticks, f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(name)}</text>']


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values from `low` to `high`, 0 among them where it lies between."""
    step = _round_step((high - low) / 9)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, … that is `least` or more."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _smooth(points: Points) -> list[tuple[float, float]]:
    """An exponential mean over about a twentieth of the points, started without bias."""
    keep = 1 - 1 / max(1.0, len(points) / 20)
    total = weight = 0.0
    smoothed = []
    for step, loss in points:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append((step, total / weight))
    return smoothed


def _reached(points: Points, *, smooth: bool) -> list[float]:
    values = sorted(value for _, value in points)
    odd = len(values) // 200 if smooth else 0
    return [*values[odd : len(values) - odd], *(value for _, value in _smooth(points) if smooth)]


def _thin(points: Points) -> Points:
    """At most `_MOST_POINTS` and the last: of each stretch the least and the greatest."""
    every = 2 * math.ceil(len(points) / _MOST_POINTS)
    if every <= 2:
        return points
    stretches = (points[first : first + every] for first in range(0, len(points), every))
    ends = [pick(stretch, key=lambda point: point[1]) for stretch in stretches for pick in (min, max)]
    return [*sorted(ends), *points[-1:]]


def _path(points: Points, name: str, at: _Place) -> str:
    if len(points) < 2:
        return ""
    path = "L".join("{} {}".format(*at(*point)) for point in points)
    return f'<path class="{name}" d="M{path}"/>'
