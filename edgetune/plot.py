"""Curves out of characters, for any front end that draws text."""

from __future__ import annotations

from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a Braille character (U+2800 up), from the top row, left and right."""


def braille_plot(values: Sequence[float], *, columns: int, rows: int) -> list[str]:
    """`values` from left to right as lines of Braille characters, two by four dots each; means where they are many."""
    across, down = columns * 2, rows * 4
    count = min(across, len(values))
    means = []
    for index in range(count):
        stretch = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means), max(means)
    cells = [[0] * columns for _ in range(rows)]
    before: int | None = None
    for index, value in enumerate(means):
        y = round((high - value) / ((high - low) or 1) * (down - 1))
        # A vertical stroke joins neighbours that lie far apart.
        for dot in range(min(y, y if before is None else before), max(y, y if before is None else before) + 1):
            cells[dot // 4][index // 2] |= _DOTS[dot % 4][index % 2]
        before = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
