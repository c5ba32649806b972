"""What rich draws, as text."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from edgetune.tui.palette import Palette

PLAIN = Palette("plain", True, "none", {})


def text_of(value: Any, *, width: int = 100) -> str:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(value)
    return capture.get()
