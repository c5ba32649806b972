"""Rich text → what a widget's line is made of, on the style that the widget has."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.color import Color
from textual.strip import Strip
from textual.widget import Widget

from edgetune.tui.markdown import CONSOLE


class OwnLines(Widget):
    """A widget that draws its lines itself, and works out the style below them once instead of with every line."""

    _base: Style | None = None
    _background: Color | None = None

    @property
    def base(self) -> Style:
        """The style below everything drawn here."""
        if self._base is None:
            self._base = self.rich_style
        return self._base

    @property
    def background(self) -> Color:
        """The colour of the base, which filters want to know."""
        if self._background is None:
            self._background = self.background_colors[1]
        return self._background

    def notify_style_update(self) -> None:
        """Other styles, another base."""
        self._base = self._background = None
        super().notify_style_update()


def strip_of(text: Text, base: Style, *, width: int | None = None) -> Strip:
    """One line of text on `base`, in exactly `width` cells when that is given."""
    style = CONSOLE.get_style(text.style) if isinstance(text.style, str) else text.style
    # Text without spans renders without its own style.
    segments = list(text.render(CONSOLE)) if text.spans else [Segment(text.plain, style)]
    strip = Strip(segments, cell_len(text.plain)).apply_style(base)
    return strip if width is None else strip.crop_extend(0, width, base)
