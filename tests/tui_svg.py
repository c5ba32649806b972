"""A screen as SVG, to be compared and looked at: row by row, one element a line, every colour, nothing fetched.

Rich's own export numbers its styles and gives every piece of a line its clip path, so that one more colour changes
every line of the file; here a change stands where it is on the screen.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from itertools import groupby
from typing import NamedTuple

from rich.cells import cell_len
from rich.color import blend_rgb
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME

from edgetune.tui.app import EdgetuneApp

_WIDTH, _HEIGHT, _BASELINE = 12, 24, 18
"""Of a character, in pixels; the font's own is 20 high and as wide."""
_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>text {{ font: 20px monospace; white-space: pre }}</style>
<rect width="{width}" height="{height}" fill="{background}"/>
"""


class Cell(NamedTuple):
    """A character as it is seen."""

    x: int
    text: str
    background: str
    ink: str
    """Colour, weight, slant and lines, as attributes of SVG."""


def screen_svg(app: EdgetuneApp) -> str:
    """What the terminal shows, with the screens behind a dialog."""
    rows = screen_cells(app)
    background = Counter(cell.background for row in rows for cell in row).most_common(1)[0][0]
    lines = [_HEAD.format(width=app.size.width * _WIDTH, height=len(rows) * _HEIGHT, background=background).rstrip()]
    for number, row in enumerate(rows):
        top = number * _HEIGHT
        for colour, run in groupby(row, key=lambda cell: cell.background):
            cells = list(run)
            if colour != background:
                width = sum(cell_len(cell.text) for cell in cells) * _WIDTH
                lines.append(
                    f'<rect x="{cells[0].x * _WIDTH}" y="{top}" width="{width}" height="{_HEIGHT}" fill="{colour}"/>'
                )
        for ink, run in groupby(row, key=lambda cell: cell.ink):
            cells = list(run)
            said = "".join(cell.text for cell in cells)
            if "decoration" not in ink:
                cells = cells[len(said) - len(said.lstrip(" ")) :]
                said = said.strip(" ")
            if said:
                x, y = cells[0].x * _WIDTH, top + _BASELINE
                lines.append(f'<text x="{x}" y="{y}" {ink}>{escape(said, quote=False)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def screen_cells(app: EdgetuneApp) -> list[list[Cell]]:
    """The characters of each row, as the terminal would get them."""
    update = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    rows: list[list[Cell]] = [[]]
    for text, style, control in app.console.render(update):  # type: ignore[arg-type]
        if text == "\n":
            rows.append([])
        elif not control:
            background, ink = look(style or Style())
            for char in text:
                x = rows[-1][-1].x + cell_len(rows[-1][-1].text) if rows[-1] else 0
                rows[-1].append(Cell(x, char, background, ink))
    return rows


def look(style: Style) -> tuple[str, str]:
    """Background, and ink as attributes; links and meta data are not seen."""
    theme = SVG_EXPORT_THEME
    front = style.color.get_truecolor(theme) if style.color else theme.foreground_color
    back = style.bgcolor.get_truecolor(theme, foreground=False) if style.bgcolor else theme.background_color
    if style.reverse:
        front, back = back, front
    if style.dim:
        front = blend_rgb(front, back, 0.4)
    ink = [f'fill="{front.hex}"']
    ink += ['font-weight="bold"'] if style.bold else []
    ink += ['font-style="italic"'] if style.italic else []
    lines = [name for name, is_on in (("underline", style.underline), ("line-through", style.strike)) if is_on]
    ink += [f'text-decoration="{" ".join(lines)}"'] if lines else []
    return back.hex, " ".join(ink)
