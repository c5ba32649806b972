"""A confusion matrix as an SVG picture, drawn by hand: rows are what is true, columns what was said."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST_LABELS = 40
"""A larger matrix would not be readable."""

_CELL, _MARGIN, _LETTERS = 44, 16, 18

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #555 }
.cell { stroke: #8884; fill: #3b82f6 }
.on { fill: #fff }
.off { fill: #555 }
@media (prefers-color-scheme: dark) { text, .off { fill: #bbb } .on { fill: #fff } }"""


def confusion_svg(counts: Sequence[Sequence[int]], labels: Sequence[str], *, title: str) -> str:
    """An SVG document of `counts` (true, said), each row shaded by its share of the row."""
    left = _MARGIN + 8 * min(_LETTERS, max(map(len, labels))) + 24
    top = 64 + 6 * min(_LETTERS, max(map(len, labels)))
    width, height = left + _CELL * len(labels) + _MARGIN + 60, top + _CELL * len(labels) + _MARGIN
    body = [f'<text x="{_MARGIN}" y="20">{escape(title)}</text>']
    body.append(f'<text x="{left}" y="40">said →   true ↓</text>')
    for index, label in enumerate(labels):
        across, down = left + _CELL * (index + 0.5), top + _CELL * (index + 0.5)
        name, whole = escape(_short(label)), f"<title>{escape(label)}</title>"
        turn = f'transform="rotate(-35 {across} {top - 8})"'
        body.append(f'<text x="{across}" y="{top - 8}" {turn}>{whole}{name}</text>')
        body.append(f'<text x="{left - 8}" y="{down + 4}" text-anchor="end">{whole}{name}</text>')
    for row, found in enumerate(counts):
        whole_row = sum(found) or 1
        for column, count in enumerate(found):
            body.append(_cell(left + _CELL * column, top + _CELL * row, count, count / whole_row))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    label = f'role="img" aria-label="{escape(title)}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>', f"<style>{_STYLE}</style>", *body, "</svg>"]
    return "\n".join(parts) + "\n"


def _cell(x: float, y: float, count: int, share: float) -> str:
    shade = f'<rect class="cell" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill-opacity="{share:.3f}"/>'
    ink = "on" if share > 0.5 else "off"
    return f'{shade}<text class="{ink}" x="{x + _CELL / 2}" y="{y + _CELL / 2 + 4}" text-anchor="middle">{count}</text>'


def _short(label: str) -> str:
    return label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…"
