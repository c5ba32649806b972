"""The last line: model, adapters, how full the context is, speed, time to the first token, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len
from rich.text import Text
from textual.strip import Strip

from edgetune.tui.palette import Palette
from edgetune.tui.strips import OwnLines, strip_of
from edgetune.tui.visible import one_line

_FULL = 0.9
"""From here on the context's fill is a warning."""


@dataclass(frozen=True)
class Status:
    """What the line says."""

    model: str = ""
    adapters: str = ""
    note: str = ""
    """Whatever else there is to say of the model."""
    tokens: int = 0
    """In the context."""
    size: int = 0
    warning: str = ""
    """What is about to happen, or is wrong."""
    speed: float = 0.0
    first_token: float = 0.0
    memory: int = 0
    """Bytes."""
    is_busy: bool = False


class StatusLine(OwnLines):
    """Draws a `Status`; what has no room is left out, the least telling first."""

    DEFAULT_CSS = "StatusLine { height: 1; dock: bottom; background: $panel; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.status = Status()

    def change(self, **values: Any) -> None:
        """Draw these values instead, where they are others."""
        changed = replace(self.status, **values)
        if changed != self.status:
            self.status = changed
            self.refresh()

    def on_mount(self) -> None:
        """Follow the theme."""
        self.app.theme_changed_signal.subscribe(self, lambda theme: self.refresh())

    def render_line(self, y: int) -> Strip:
        """The one line there is."""
        base, width = self.base, self.size.width
        text = self._text(Palette.of(self.app), width)
        return strip_of(text, base, width=width)

    def _text(self, palette: Palette, width: int) -> Text:
        status = self.status
        parts = [(0, Text(one_line(status.model, length=24), palette.ink("primary", bold=True)))]
        if status.adapters:
            parts.append((2, Text(f"+ {one_line(status.adapters, length=28)}", palette.ink("secondary"))))
        if status.note:
            parts.append((2, Text(one_line(status.note, length=28), palette.ink("secondary"))))
        if status.warning:
            parts.append(
                (
                    1,
                    Text(
                        f"! {one_line(status.warning, length=max(width - 30, 20))}", palette.ink("warning", bold=True)
                    ),
                )
            )
        if status.size:
            parts.append((3, self._fill(palette)))
        if status.speed:
            parts.append(
                (4, Text(f"{status.speed:.1f} tok/s", palette.ink("success" if status.is_busy else "foreground")))
            )
        if status.first_token:
            parts.append((5, Text(f"first {status.first_token:.2f} s", palette.muted)))
        if status.memory:
            parts.append((6, Text(_bytes(status.memory), palette.muted)))
        parts.append((7, Text("? keys", palette.muted)))
        while len(parts) > 1 and sum(cell_len(part.plain) + 3 for _, part in parts) > width:
            parts.remove(max(parts, key=lambda part: part[0]))
        text = Text(" ")
        for number, (_, part) in enumerate(parts):
            text.append(" · " if number else "", palette.faint).append_text(part)
        return text

    def _fill(self, palette: Palette) -> Text:
        status = self.status
        share = min(status.tokens / status.size, 1.0)
        full = round(share * 6)
        style = palette.ink("warning" if share >= _FULL else "accent")
        text = Text("▰" * full, style).append("▱" * (6 - full), palette.faint)
        return text.append(f" {status.tokens}/{status.size}", palette.muted)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
