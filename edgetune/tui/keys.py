"""What every key does, as a list; taken from the bindings themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

KeyRows = Sequence[tuple[str, str]]
_NAMES = {
    "escape": "Esc", "enter": "Enter", "question_mark": "?", "up": "↑", "down": "↓", "left": "←", "right": "→",
    "pageup": "PgUp", "pagedown": "PgDn", "space": "Space", "plus": "+", "minus": "-", "tab": "Tab", "slash": "/",
    "backspace": "Backspace", "delete": "Del", "home": "Home", "end": "End", "full_stop": ".", "comma": ",",
    "left_square_bracket": "[", "right_square_bracket": "]",
}  # fmt: skip


def key_name(key: str) -> str:
    """A key as people write it: `ctrl+t` is ^T."""
    shown = []
    for one in key.split(","):
        *modifiers, last = one.strip().split("+")
        name = _NAMES.get(last, last.upper() if last[:1] == "f" and last[1:].isdigit() else last)
        if modifiers == ["ctrl"] and len(last) == 1:
            shown.append(f"^{last.upper()}")
        else:
            shown.append("-".join([*(modifier.capitalize() for modifier in modifiers), name]))
    return " ".join(shown)


def key_rows(bindings: Iterable[BindingType]) -> list[tuple[str, str]]:
    """(keys, what they do) for those bindings that have a description; keys for the same thing stand together."""
    rows: dict[str, list[str]] = {}
    for binding in bindings:
        if isinstance(binding, Binding) and (binding.tooltip or binding.description):
            rows.setdefault(binding.tooltip or binding.description, []).append(key_name(binding.key))
    return [(" ".join(dict.fromkeys(" ".join(keys).split(" "))), text) for text, keys in rows.items()]


class KeysScreen(ModalScreen[None]):
    """The list, over the screen it is about."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Close"),
        Binding("question_mark", "dismiss", "Close", show=False),
        Binding("f1", "dismiss", "Close", show=False, priority=True),
        Binding("q", "dismiss", "Close", show=False),
    ]

    def __init__(self, about: Screen[Any]) -> None:
        super().__init__()
        self._about = about

    def compose(self) -> ComposeResult:
        """One table a group."""
        groups: list[tuple[str, KeyRows]] = (
            self._about.key_help() if hasattr(self._about, "key_help") else [("Keys", key_rows(self._about.BINDINGS))]
        )
        with VerticalScroll(classes="dialog", id="keys") as scroll:
            scroll.border_title = "Keys"
            scroll.border_subtitle = "Esc closes"
            for title, rows in groups:
                yield Static(Text(title), classes="keys-title")
                table = Table.grid(padding=(0, 2))
                table.add_column(no_wrap=True, min_width=16)
                table.add_column()
                for key, text in rows:
                    table.add_row(Text(key, style="bold"), Text(text))
                yield Static(table, classes="keys-table")
