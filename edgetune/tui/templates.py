"""Prompt templates: choose one for the input, write, change or delete one."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgetune.chat.templates import PLACE, delete_template, load_template, save_template, template_names
from edgetune.errors import EdgetuneError
from edgetune.tui.dialogs import AskDialog, LineDialog, TextDialog
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.visible import one_line, visible


class TemplatesScreen(EndsWorkers, ModalScreen["str | None"]):
    """Returns the text of the one that was chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("n", "write", "New"),
        Binding("e", "edit", "Edit"),
        Binding("d,delete", "remove", "Delete"),
    ]

    def compose(self) -> ComposeResult:
        """A list in a window."""
        with Vertical(classes="dialog") as box:
            box.border_title = "Prompt templates"
            box.border_subtitle = "Enter uses, n new, e edit, d delete, Esc closes"
            yield OptionList(markup=False, compact=True)

    def key_help(self) -> list[tuple[str, KeyRows]]:
        """What the keys do here."""
        return [("Prompt templates", [("Enter", "Put it into the input"), *key_rows(self.BINDINGS)])]

    def on_mount(self) -> None:
        """Fill it."""
        self._fill()

    def _fill(self) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        self._names = template_names()
        for name in self._names:
            try:
                text = one_line(load_template(name), length=56)
            except EdgetuneError as error:
                text = error.message
            options.add_option(Option(f"{visible(name):<16} {visible(text)}"))
        if not self._names:
            options.add_option(Option(f"None yet. n writes one; {PLACE} marks where the message goes.", disabled=True))
        options.highlighted = 0 if self._names else None
        options.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Use it."""
        try:
            self.dismiss(load_template(self._names[event.option_index]).replace(PLACE, ""))
        except EdgetuneError as error:
            self.app.say_error(error)  # type: ignore[attr-defined]

    @work
    async def action_write(self) -> None:
        """A new one."""
        name = await self.app.push_screen_wait(LineDialog("Name of the template"))
        if name:
            await self._write(name, PLACE)

    @work
    async def action_edit(self) -> None:
        """The one under the cursor."""
        if (name := self._current()) is not None:
            try:
                text = load_template(name)
            except EdgetuneError as error:
                self.app.say_error(error)  # type: ignore[attr-defined]
                return
            await self._write(name, text)

    @work
    async def action_remove(self) -> None:
        """Delete the one under the cursor."""
        name = self._current()
        if name is not None and await self.app.push_screen_wait(AskDialog(f"Delete the template {name}?")):
            delete_template(name)
            self._fill()

    async def _write(self, name: str, text: str) -> None:
        note = f"{PLACE} marks where the message goes."
        written = await self.app.push_screen_wait(TextDialog(f"Template {name}", text, note=note))
        if written is not None:
            try:
                save_template(name, written)
            except (EdgetuneError, OSError) as error:
                self.app.say_error(error)  # type: ignore[attr-defined]
        self._fill()

    def _current(self) -> str | None:
        at = self.query_one(OptionList).highlighted
        return self._names[at] if at is not None and at < len(self._names) else None
