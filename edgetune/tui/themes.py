"""The looks: two themes of our own beside Textual's, which one fits the terminal, and the one chosen last."""

from __future__ import annotations

import json
import os

from textual.theme import Theme

from edgetune.paths import home_dir, write_json

DARK = Theme(
    name="edgetune-dark",
    primary="#7aa2f7",
    secondary="#9d8cff",
    accent="#4fd6be",
    foreground="#d5d9e6",
    background="#12141b",
    surface="#191c26",
    panel="#222634",
    boost="#2a2f40",
    success="#7fd88f",
    warning="#f0b866",
    error="#f2777a",
    dark=True,
    variables={
        "footer-key-foreground": "#4fd6be",
        "input-selection-background": "#7aa2f7 35%",
        "block-cursor-background": "#2d3a5c",
        "block-cursor-foreground": "#eef1fb",
        "block-cursor-text-style": "bold",
        "block-cursor-blurred-background": "#222634",
    },
)
LIGHT = Theme(
    name="edgetune-light",
    primary="#2f5fd0",
    secondary="#6a4fd0",
    accent="#00796b",
    foreground="#23262f",
    background="#fbfaf7",
    surface="#f2f0ea",
    panel="#e7e4db",
    boost="#dedad0",
    success="#2e7d32",
    warning="#a15c00",
    error="#c62828",
    dark=False,
    variables={
        "footer-key-foreground": "#00796b",
        "input-selection-background": "#2f5fd0 25%",
        "block-cursor-background": "#cdd8f4",
        "block-cursor-foreground": "#161a24",
        "block-cursor-text-style": "bold",
        "block-cursor-blurred-background": "#e7e4db",
    },
)
_LIGHT_BACKGROUNDS = ("7", "9", "10", "11", "12", "13", "14", "15")


def first_theme() -> str:
    """The theme to begin with: the one chosen last, else what suits the terminal's background."""
    if "NO_COLOR" in os.environ:
        return "ansi-dark"
    return _read().get("theme") or (LIGHT.name if _is_light(os.environ.get("COLORFGBG", "")) else DARK.name)


def remember_theme(name: str) -> None:
    """Begin with this theme the next time, where that can be written down."""
    try:
        write_json(home_dir() / "screen.json", {**_read(), "theme": name})
    except OSError:
        return


def _is_light(colours: str) -> bool:
    """Whether `COLORFGBG`, which several terminals set, names a light background."""
    return colours.rpartition(";")[2] in _LIGHT_BACKGROUNDS


def _read() -> dict[str, str]:
    try:
        values = json.loads((home_dir() / "screen.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
