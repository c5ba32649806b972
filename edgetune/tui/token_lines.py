"""A reply token by token on lines of a given width, each shaded by how likely the model held it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from edgetune.engine.protocol import TokenChoice
from edgetune.tui.palette import Palette
from edgetune.tui.visible import visible

_INSIDE = "·"
"""Stands for a token that is but a part of a character."""


@dataclass
class TokenLines:
    """Lines that only grow; a token that is laid out stays where it is."""

    palette: Palette
    width: int
    places: list[int] = field(default_factory=list)
    """Line on which each token begins."""
    _lines: list[list[Segment]] = field(default_factory=lambda: [[]])
    _at: int = 0
    """Cells taken on the last line."""

    def extend(self, text: str, choices: Sequence[TokenChoice]) -> None:
        """Lay out the tokens that are new; `text` is the reply's as it was generated."""
        for number in range(len(self.places), len(choices)):
            choice = choices[number]
            piece = visible(text[choice.start : choice.end])
            self._put(piece or _INSIDE, number, self.palette.shade(choice.probability))

    def strips(self, start: int = 0, *, cursor: int | None = None) -> list[Strip]:
        """The lines from `start` on; the token at `cursor` stands out."""
        return [self._strip(line, cursor) for line in self._lines[start:]]

    @property
    def count(self) -> int:
        """How many lines there are."""
        return len(self._lines)

    def _put(self, piece: str, number: int, shade: Style) -> None:
        style = shade + Style(meta={"token": number})
        if self._at and self._at + cell_len(piece.split("\n", 1)[0]) > self.width:
            self._break()
        self.places.append(len(self._lines) - 1)
        first, *others = piece.split("\n")
        self._write(first, style)
        for part in others:
            self._write("↵", style + self.palette.muted)
            self._break()
            self._write(part, style)

    def _write(self, text: str, style: Style) -> None:
        while text:
            fitting = _fitting(text, self.width - self._at)
            if not fitting:
                self._break()
                fitting = max(_fitting(text, self.width), 1)
            self._lines[-1].append(Segment(text[:fitting], style))
            self._at += cell_len(text[:fitting])
            text = text[fitting:]

    def _break(self) -> None:
        self._lines.append([])
        self._at = 0

    def _strip(self, line: list[Segment], cursor: int | None) -> Strip:
        if cursor is None:
            return Strip(line)
        shown = [
            Segment(segment.text, segment.style + self.palette.cursor)
            if segment.style and segment.style.meta.get("token") == cursor
            else segment
            for segment in line
        ]
        return Strip(shown)


def _fitting(text: str, room: int) -> int:
    """How many characters of `text` fit into `room` cells."""
    if cell_len(text) <= room:
        return len(text)
    taken = 0
    for number, char in enumerate(text):
        taken += cell_len(char)
        if taken > room:
            return number
    return len(text)
