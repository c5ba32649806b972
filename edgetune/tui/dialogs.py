"""Small windows over a screen: a line to type, a text to edit, a question."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Paste
from textual.screen import ModalScreen
from textual.widgets import Input, Static, TextArea

from edgetune.tui.visible import typed, visible


class SafeInput(Input):
    """One line; what is pasted is made harmless."""

    def _on_paste(self, event: Paste) -> None:
        event.prevent_default()
        event.stop()
        self.replace(" ".join(typed(event.text).split("\n")), *self.selection)


class SafeTextArea(TextArea):
    """A text; what is pasted is made harmless."""

    async def _on_paste(self, event: Paste) -> None:
        event.prevent_default()
        event.stop()
        self._replace_via_keyboard(typed(event.text), *self.selection)


class LineDialog(ModalScreen[str]):
    """Asks for one line; empty when it was given up."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss('')", "Cancel")]

    def __init__(self, question: str, *, value: str = "", placeholder: str = "", goes_on: bool = False) -> None:
        """`goes_on`: what is typed first follows `value`, instead of replacing it."""
        super().__init__()
        self._question, self._value, self._placeholder = question, value, placeholder
        self._goes_on = goes_on

    def compose(self) -> ComposeResult:
        """The question over the line."""
        with Vertical(classes="dialog") as box:
            box.border_title = visible(self._question)
            box.border_subtitle = "Enter takes it, Esc cancels"
            yield SafeInput(
                typed(self._value),
                placeholder=self._placeholder,
                compact=True,
                select_on_focus=not self._goes_on,
            )

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Done."""
        self.dismiss(event.value.strip())


class TextDialog(ModalScreen["str | None"]):
    """Edits a text; None when it was given up."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel"),
        Binding("ctrl+s", "accept", "Take it"),
    ]

    def __init__(self, title: str, text: str, *, note: str = "") -> None:
        super().__init__()
        self._title, self._text, self._note = title, text, note

    def compose(self) -> ComposeResult:
        """The text under its title."""
        with Vertical(classes="dialog text-dialog") as box:
            box.border_title = visible(self._title)
            box.border_subtitle = "^S takes it, Esc cancels"
            if self._note:
                yield Static(visible(self._note), markup=False, classes="note")
            yield SafeTextArea(typed(self._text), soft_wrap=True, compact=True)

    def on_mount(self) -> None:
        """Begin at the end."""
        area = self.query_one(TextArea)
        area.cursor_blink = False
        area.move_cursor(area.document.end)

    def action_accept(self) -> None:
        """Done."""
        self.dismiss(self.query_one(TextArea).text)


class AskDialog(ModalScreen[bool]):
    """Asks whether to go on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "dismiss(True)", "Yes"),
        Binding("n,escape", "dismiss(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """The question."""
        with Vertical(classes="dialog") as box:
            box.border_subtitle = "y yes, n no"
            yield Static(visible(self._question), markup=False)
