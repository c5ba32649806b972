"""A distribution as bars: what the model holds likely, and what the sampling parameters leave of it.

One line a token: its text, a bar whose full part is the share after sampling over the one before it, both numbers. What
is cut off is crossed out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.message import Message
from textual.strip import Strip

from edgetune.engine.protocol import Candidate
from edgetune.tui.palette import Palette
from edgetune.tui.strips import OwnLines, strip_of
from edgetune.tui.visible import token_text

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NARROW = 46
"""From here on, both numbers have room."""


def bar(share: float, width: int) -> str:
    """A bar of up to `width` cells for a share of 1."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def percent(share: float) -> str:
    """A share in five cells."""
    if share >= 0.9995:
        return " 100%"
    if share >= 0.0995:
        return f"{share * 100:4.1f}%"
    return f"{share * 100:4.2f}%" if share >= 0.0001 else "   0%" if not share else "<.01%"


class CandidateBars(OwnLines, can_focus=False):
    """The bars; with a cursor where one may be chosen."""

    DEFAULT_CSS = "CandidateBars { height: auto; }"

    class Clicked(Message):
        """A candidate was clicked."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, *, rows: int, id: str | None = None) -> None:
        """At most `rows` lines, the summary below them among those."""
        super().__init__(id=id)
        self.rows = rows
        self.candidates: Sequence[Candidate] = ()
        self.chosen: int | None = None
        """Id of the token that was taken."""
        self.cursor: int | None = None
        """Index of the candidate the keys act on."""
        self.names: dict[int, str] = {}
        """What tokens without a text are called, by id."""
        self.empty = ""
        """What stands here while there is nothing to show."""
        self._palette: Palette | None = None

    def show(self, candidates: Sequence[Candidate], *, chosen: int | None = None, cursor: int | None = None) -> None:
        """Draw these."""
        if (candidates, chosen, cursor) == (self.candidates, self.chosen, self.cursor):
            return
        self.candidates, self.chosen, self.cursor = candidates, chosen, cursor
        self.refresh()

    def on_mount(self) -> None:
        """Take up the theme's colours."""
        self._palette = Palette.of(self.app)
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._retheme())

    def on_click(self, event: events.Click) -> None:
        """Choose by mouse."""
        row = event.y + self._first
        if row < len(self.candidates):
            self.post_message(self.Clicked(row))

    def render_line(self, y: int) -> Strip:
        """One candidate; the last line sums up."""
        base, palette = self.base, self._palette or Palette.of(self.app)
        width, height = self.size
        if not self.candidates:
            text = Text(self.empty if y == 0 else "", palette.muted)
        elif y == height - 1:
            text = self._summary(palette)
        elif y + self._first < len(self.candidates):
            text = self._row(y + self._first, width, palette)
        else:
            text = Text()
        return strip_of(text, base, width=width)

    @property
    def _first(self) -> int:
        """The candidate on the first line: the cursor stays in view."""
        shown = max(self.size.height - 1, 1)
        return max(0, (self.cursor or 0) - shown + 1)

    def _row(self, index: int, width: int, palette: Palette) -> Text:
        candidate = self.candidates[index]
        has_both = width >= _NARROW
        numbers = (
            f"{percent(candidate.probability)} → {percent(candidate.sampled)}"
            if has_both
            else percent(candidate.sampled if candidate.sampled else candidate.probability)
        )
        mark = "▸" if index == self.cursor else "●" if candidate.id == self.chosen else " "
        label = _fit(token_text(candidate.text or self.names.get(candidate.id, "")), max(min(width // 4, 16), 6))
        is_cut = candidate.sampled <= 0
        name = palette.cursor if index == self.cursor else palette.muted if is_cut else palette.ink("foreground")
        text = Text(f"{mark} ", palette.ink("accent", bold=True)).append(label, name).append(" ")
        room = max(width - cell_len(text.plain) - len(numbers) - 1, 1)
        if is_cut:
            drawn = "╌" * max(round(candidate.probability * room), 1)
            text.append(drawn, palette.faint).append(" " * (room - len(drawn)))
        else:
            full = bar(candidate.sampled, room)
            text.append(full, palette.ink("accent"))
            before = max(round(candidate.probability * room) - len(full), 0)
            text.append("╌" * before, palette.muted).append(" " * (room - len(full) - before))
        text.append(" ")
        return text.append(numbers, palette.muted if is_cut else palette.ink("foreground"))

    def _summary(self, palette: Palette) -> Text:
        kept = sum(candidate.sampled > 0 for candidate in self.candidates)
        cut = sum(candidate.probability for candidate in self.candidates if not candidate.sampled)
        return Text(f"  {kept} of these {len(self.candidates)} stay, {cut * 100:.1f}% cut off", palette.muted)

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        """As many lines as were asked for."""
        return self.rows

    def _retheme(self) -> None:
        self._palette = Palette.of(self.app)
        self.refresh()


def _fit(text: str, width: int) -> str:
    """`text` in exactly `width` cells."""
    while cell_len(text) > width:
        text = text[:-2] + "…" if len(text) > 1 else ""
    return text + " " * (width - cell_len(text))
