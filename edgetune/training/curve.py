"""The loss curve as an SVG, drawn by hand: no plotting library, readable on light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 36, 40
_MOST_POINTS = 600

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #555 }
.grid { stroke: #8884; stroke-width: 1 }
.train { stroke: #3b82f6; fill: none; stroke-width: 1.5 }
.raw { stroke: #3b82f655; fill: none; stroke-width: 1 }
.valid { stroke: #f97316; fill: none; stroke-width: 2 }
.dot { fill: #f97316 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }"""

Points = Sequence[tuple[float, float]]
_Place = Callable[[float, float], tuple[float, float]]


def loss_svg(train: Points, valid: Points, *, title: str) -> str:
    """An SVG document of (step, loss) `train` and `valid`; the training loss is shown raw and smoothed."""
    values = [loss for _, loss in (*train, *valid)]
    top = max(values, default=1.0) * 1.05 or 1.0
    last = max([step for step, _ in (*train, *valid)], default=1.0) or 1.0

    def at(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + step / last * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_TOP + (1 - loss / top) * (_HEIGHT - _TOP - _BOTTOM), 1)

    body = [_grid(top, last, at)]
    body += [_line(_thin(train), "raw", at), _line(_thin(_smooth(train)), "train", at), _line(valid, "valid", at)]
    body += [f'<circle class="dot" cx="{at(*point)[0]}" cy="{at(*point)[1]}" r="3"/>' for point in valid]
    legend = "training loss" + (" · validation loss (orange)" if valid else "")
    body += [f'<text x="{_LEFT}" y="20">{_escape(title)}</text>']
    body += [f'<text x="{_WIDTH - _RIGHT}" y="20" text-anchor="end">{legend}</text>']
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    label = f'role="img" aria-label="{_escape(title)}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>', f"<style>{_STYLE}</style>", *body, "</svg>"]
    return "\n".join(part for part in parts if part) + "\n"


def _grid(top: float, last: float, at: _Place) -> str:
    lines = []
    for value in _ticks(top):
        y = at(0, value)[1]
        lines.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in _ticks(last):
        x = at(value, 0)[0]
        lines.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{value:g}</text>')
    lines.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    return "\n".join(lines)


def _ticks(top: float) -> list[float]:
    """Four to nine round values from 0 to `top`."""
    step = 10.0 ** math.floor(math.log10(top))
    while top / step < 4:
        step /= 2 if f"{step:e}"[0] in "15" else 2.5 if f"{step:e}"[0] == "2" else 2
    return [round(index * step, 10) for index in range(int(top / step) + 1)]


def _smooth(points: Points) -> list[tuple[float, float]]:
    """An exponential mean over about a twentieth of the points, started without bias."""
    keep = 1 - 1 / max(1.0, len(points) / 20)
    total = weight = 0.0
    smoothed = []
    for step, loss in points:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append((step, total / weight))
    return smoothed


def _thin(points: Points) -> Points:
    every = math.ceil(len(points) / _MOST_POINTS) or 1
    return [*points[::every], *points[-1:]]


def _line(points: Points, name: str, at: _Place) -> str:
    if len(points) < 2:
        return ""
    path = "L".join("{} {}".format(*at(*point)) for point in points)
    return f'<path class="{name}" d="M{path}"/>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
