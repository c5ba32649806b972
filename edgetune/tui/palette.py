"""The theme's colours as Rich styles, for widgets that draw their own lines.

Three kinds of theme: full colours, the terminal's sixteen, and none at all (`NO_COLOR`), where weight, underline and
reversal say what colour says elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rich.color import Color as RichColor
from rich.style import Style
from textual.color import Color

if TYPE_CHECKING:
    from textual.app import App

_SURE, _UNSURE = 0.95, 0.02
"""Probabilities at the two ends of the shading."""


@dataclass(frozen=True)
class Palette:
    """Styles by meaning."""

    name: str
    """Tells palettes apart: strips drawn with one are not those of another."""
    is_dark: bool
    kind: str
    """"full", "ansi" or "none"."""
    colors: dict[str, Color]

    @classmethod
    def of(cls, app: App[object]) -> Palette:
        """The palette of the app's theme."""
        theme = app.current_theme
        kind = "none" if app.no_color else "ansi" if theme.ansi else "full"
        names = (
            "foreground",
            "background",
            "surface",
            "panel",
            "primary",
            "secondary",
            "accent",
            "success",
            "warning",
            "error",
        )
        colors = {}
        for name in names:
            value = app.theme_variables.get(name, "")
            try:
                colors[name] = Color.parse(value)
            except ValueError:
                colors[name] = Color(128, 128, 128)
        return _known.setdefault((theme.name, kind), cls(f"{theme.name}/{kind}", theme.dark, kind, colors))

    def ink(self, name: str, *, bold: bool = False) -> Style:
        """Text in a colour of the theme."""
        if self.kind == "none":
            return Style(bold=bold or name in ("primary", "accent", "warning", "error"))
        return Style(color=self._rich(self.colors[name]), bold=bold or None)

    def on(self, name: str) -> Style:
        """A background of the theme."""
        return Style(bgcolor=self._rich(self.colors[name])) if self.kind == "full" else Style()

    @cached_property
    def muted(self) -> Style:
        """What is beside the point."""
        if self.kind != "full":
            return Style(dim=True)
        return Style(color=self._rich(self.colors["foreground"].blend(self.colors["background"], 0.42)))

    @cached_property
    def faint(self) -> Style:
        """Lines and empty bars."""
        if self.kind != "full":
            return Style(dim=True)
        return Style(color=self._rich(self.colors["foreground"].blend(self.colors["background"], 0.75)))

    @cached_property
    def code(self) -> Style:
        """Behind code."""
        if self.kind != "full":
            return Style(bold=True)
        return Style(bgcolor=self._rich(self.colors["panel"].blend(self.colors["background"], 0.35)))

    @cached_property
    def cursor(self) -> Style:
        """What the keys act on."""
        if self.kind != "full":
            return Style(reverse=True)
        return Style(color=self._rich(self.colors["background"]), bgcolor=self._rich(self.colors["accent"]), bold=True)

    @property
    def code_theme(self) -> str:
        """For Pygments."""
        if self.kind != "full":
            return "ansi_dark" if self.is_dark else "ansi_light"
        return "one-dark" if self.is_dark else "xcode"

    def shade(self, probability: float) -> Style:
        """A token's shading: quiet where the model was sure, from amber to red where it was not."""
        return self._shades[self._level(probability)]

    @cached_property
    def _shades(self) -> list[Style]:
        return [self._shade(level) for level in range(_LEVELS)]

    def _shade(self, level: int) -> Style:
        if level == 0:
            return Style()
        share = level / (_LEVELS - 1)
        if self.kind == "none":
            return Style(underline=True, bold=share > 0.4, reverse=share > 0.8)
        if self.kind == "ansi":
            return Style(color="yellow" if share < 0.5 else "red", underline=share > 0.75)
        warm = self.colors["warning"].blend(self.colors["error"], max(0.0, share * 2 - 1))
        strength = 0.10 + 0.50 * share
        return Style(bgcolor=self._rich(self.colors["background"].blend(warm, strength)))

    def _level(self, probability: float) -> int:
        low, high = math.log(_SURE), math.log(_UNSURE)
        share = (math.log(max(probability, 1e-9)) - low) / (high - low)
        return min(_LEVELS - 1, max(0, round(share * (_LEVELS - 1))))

    @staticmethod
    def _rich(color: Color) -> RichColor:
        return color.rich_color


_LEVELS = 9
"""How many shades there are."""
_known: dict[tuple[str, str], Palette] = {}
"""By theme and kind; asked for with every line."""
