"""Rich text → what a widget's line is made of."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.strip import Strip

from edgetune.tui.markdown import CONSOLE


def strip_of(text: Text, base: Style, *, width: int | None = None) -> Strip:
    """One line of text on `base`, in exactly `width` cells when that is given."""
    style = CONSOLE.get_style(text.style) if isinstance(text.style, str) else text.style
    # Text without spans renders without its own style.
    segments = list(text.render(CONSOLE)) if text.spans else [Segment(text.plain, style)]
    strip = Strip(segments, cell_len(text.plain)).apply_style(base)
    return strip if width is None else strip.crop_extend(0, width, base)
