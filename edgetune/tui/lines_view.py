"""A widget of lines that may grow at its end, where a new line costs what is new of it.

Textual lays out the whole screen when a scroll view becomes higher, and puts styles and borders around every line in
view when it scrolls. Here the height changes in place, and a line that was drawn is kept until it changes. What the
lines are is the subclass's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from edgetune.tui.strips import OwnLines

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_KEPT = 1000


class LinesView(ScrollView, OwnLines):
    """Shows `line(0)` to `line(height - 1)`; without border and padding."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._kept: dict[int, Strip] = {}
        """Lines as they were drawn last, by their row."""

    def line(self, row: int) -> Strip:
        """What stands on a row, in `self.size.width` cells."""
        raise NotImplementedError

    def is_passing(self, row: int) -> bool:
        """Whether a row will soon be another one: then the mouse cannot mark it, which costs something to prepare."""
        return False

    def texts(self) -> list[str]:
        """Every line's text: what can be marked by mouse."""
        raise NotImplementedError

    def set_height(self, height: int) -> None:
        """There are so many lines now."""
        before, size = self.virtual_size, Size(self.scrollable_content_region.width, height)
        if size == before:
            return
        room = self.size.height
        if size.width != before.width or (height > room) != (before.height > room):
            self.virtual_size = size
            return
        # Nothing on the screen but the scrollbar depends on it: no layout.
        self.set_reactive(ScrollView.virtual_size, size)
        if self.show_vertical_scrollbar:
            self.vertical_scrollbar.window_virtual_size = height

    @property
    def is_at_end(self) -> bool:
        """Whether the last line is in view."""
        return self.scroll_offset.y >= self.max_scroll_y - 1

    def scroll_to_end(self) -> None:
        """Bring the last line into view."""
        self.scroll_to(y=self.max_scroll_y, animate=False, force=True)

    def refresh_rows(self, first: int, end: int) -> None:
        """Draw rows `first` to `end - 1` anew."""
        for row in range(first, end):
            self._kept.pop(row, None)
        top = self.scroll_offset.y
        if visible := Region(0, first - top, self.outer_size.width, end - first).intersection(self.outer_size.region):
            super().refresh(visible)

    def refresh(self, *regions: Region, **wishes: Any) -> Self:
        """Draw anew, as any widget."""
        # Another dictionary: who scrolls puts the old one back.
        self._kept = {}
        return super().refresh(*regions, **wishes)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Lines move, and stay what they are."""
        kept = self._kept
        super().watch_scroll_y(old_value, new_value)
        self._kept = kept

    def render_lines(self, crop: Region) -> list[Strip]:
        """The lines in view."""
        top, whole = self.scroll_offset.y, (0, self.outer_size.width)
        rows = range(top + crop.y, top + crop.bottom)
        if len(self._kept) > _MOST_KEPT:
            self._kept = {}
        strips = [found if (found := self._kept.get(row)) is not None else self._draw_line(row) for row in rows]
        return strips if crop.column_span == whole else [strip.crop(*crop.column_span) for strip in strips]

    def _draw_line(self, row: int) -> Strip:
        strip = self._with_selection(self.line(row), row)
        if not self.is_passing(row):
            strip = strip.apply_offsets(0, row)
        strip = strip.crop_extend(0, self.outer_size.width, self.base)
        for one in self.get_line_filters():
            strip = strip.apply_filter(one, self.background)
        self._kept[row] = strip
        return strip

    def _with_selection(self, strip: Strip, row: int) -> Strip:
        selection = self.text_selection
        span = selection.get_span(row) if selection is not None else None
        if span is None:
            return strip
        start, end = span[0], span[1] if span[1] >= 0 else strip.cell_length
        before, inside, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end)
        style = self.screen.get_component_rich_style("screen--selection")
        marked = [Segment(part.text, (part.style or Style()) + style) for part in inside]
        return Strip([*before, *marked, *after])

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that the mouse has marked."""
        return selection.extract("\n".join(self.texts())), "\n"
