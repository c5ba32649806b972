"""Where one types: several lines, a history, completion of commands and `@paths`, pasted text made harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, TextArea
from textual.widgets.option_list import Option

from edgetune.tui.history import History
from edgetune.tui.visible import typed, visible

Completer = Callable[[str], Iterable[tuple[str, int, str]]]
"""Text before the cursor → (word, how many characters of it are typed already, what it does)."""

_MOST_CHOICES = 200
_OWN_KEYS = {
    "enter": "submit",
    "ctrl+j": "new_line",
    "alt+enter": "new_line",
    "shift+enter": "new_line",
    "tab": "complete",
    "ctrl+c": "screen.stop_or_leave",
    "ctrl+d": "delete_or_leave",
}


class Entry(TextArea):
    """The text itself."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False),
        Binding("ctrl+j,alt+enter,shift+enter", "new_line", "New line", show=False),
        Binding("up", "earlier", "Line above; earlier input", show=False),
        Binding("down", "later", "Line below; later input", show=False),
        Binding("tab", "complete", "Complete a command or @path", show=False),
        Binding("ctrl+c", "screen.stop_or_leave", "Stop the reply; else empty the input", show=False),
        Binding("ctrl+d", "delete_or_leave", "Leave, when nothing is typed", show=False),
    ]

    class Submitted(Message):
        """Enter was pressed."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(id="entry", soft_wrap=True, tab_behavior="focus", show_line_numbers=False, compact=True)
        self.cursor_blink = False

    @property
    def composer(self) -> Composer:
        """What it is in."""
        parent = self.parent
        assert isinstance(parent, Composer)
        return parent

    @property
    def before_cursor(self) -> str:
        """What completion looks at."""
        return self.get_text_range((0, 0), self.cursor_location)

    async def _on_paste(self, event: events.Paste) -> None:
        # Before TextArea sees it: a pasted control character would be drawn as it is.
        event.prevent_default()
        event.stop()
        if result := self._replace_via_keyboard(typed(event.text), *self.selection):
            self.move_cursor(result.end_location)

    async def _on_key(self, event: events.Key) -> None:
        # Here and not by bindings: those of a key that TextArea takes would have to have priority, and then overtake
        # what was typed just before.
        action = "app.show_keys" if event.key == "question_mark" and not self.text else _OWN_KEYS.get(event.key)
        if action is None:
            await super()._on_key(event)
            return
        event.prevent_default()
        event.stop()
        await self.run_action(action)

    def action_submit(self) -> None:
        """Take the chosen completion, or send."""
        if not self.composer.take_choice(only_if_moved=True):
            self.post_message(self.Submitted(self.text))

    def action_new_line(self) -> None:
        """Begin another line."""
        self._replace_via_keyboard("\n", *self.selection)

    def action_earlier(self) -> None:
        """Up."""
        if not self.composer.move_choice(-1) and not (self.cursor_at_first_line and self.composer.walk_history(-1)):
            self.action_cursor_up()

    def action_later(self) -> None:
        """Down."""
        if not self.composer.move_choice(1) and not (self.cursor_at_last_line and self.composer.walk_history(1)):
            self.action_cursor_down()

    def action_complete(self) -> None:
        """Complete, or go on to the conversation."""
        if not self.composer.take_choice() and not self.composer.offer(is_asked=True):
            self.screen.focus_next()

    def action_delete_or_leave(self) -> None:
        """Ctrl-D as in a shell."""
        if self.text:
            self.action_delete_right()
        else:
            self.app.call_later(self.screen.run_action, "leave")


class Composer(Vertical):
    """The text with its choices above it."""

    DEFAULT_CSS = """
    Composer {
        height: auto;
        max-height: 50%;
        border: round $primary 40%;
        border-subtitle-color: $text-muted;
        background: $background;
        padding: 0 1;
        &:focus-within { border: round $accent; }
        Entry { height: auto; max-height: 8; border: none; padding: 0; background: transparent; }
        #choices { height: auto; max-height: 7; border: none; padding: 0; background: $panel; display: none; }
        #choices.open { display: block; }
    }
    """

    def __init__(self, *, completer: Completer, history: History, placeholder: str, id: str | None = None) -> None:
        super().__init__(id=id)
        self._completer, self._history, self._placeholder = completer, history, placeholder
        self._is_moved = False
        self._is_walking = False
        self._offered: list[tuple[str, int, str]] = []

    def compose(self) -> ComposeResult:
        """The choices above the text."""
        choices = OptionList(id="choices", markup=False)
        choices.can_focus = False
        yield choices
        entry = Entry()
        entry.placeholder = self._placeholder
        yield entry

    @property
    def entry(self) -> Entry:
        """The text."""
        return self.query_one(Entry)

    @property
    def is_open(self) -> bool:
        """Whether choices are shown."""
        return self.query_one("#choices").has_class("open")

    def put(self, text: str) -> None:
        """Let `text` be what is typed."""
        self._is_walking = True
        self.entry.load_text(typed(text))
        self.entry.move_cursor(self.entry.document.end)
        self.close()
        self.call_after_refresh(self._stop_walking)

    def remember(self, text: str) -> None:
        """Add to the history."""
        self._history.add(text)

    def close(self) -> bool:
        """Take the choices away; whether there were any."""
        was_open = self.is_open
        self.query_one("#choices").remove_class("open")
        return was_open

    def on_text_area_changed(self) -> None:
        """Offer what fits what is typed now."""
        if self._is_walking:
            return
        self.offer()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A choice was clicked."""
        event.stop()
        self._take(event.option_index)
        self.entry.focus()

    def offer(self, *, is_asked: bool = False) -> bool:
        """Show the choices; whether there are any. A single one that was asked for is taken."""
        before = self.entry.before_cursor
        wanted = is_asked or (before.startswith("/") and "\n" not in before) or "@" in before
        self._offered = list(self._completer(before))[:_MOST_CHOICES] if wanted else []
        self._is_moved = False
        choices = self.query_one("#choices", OptionList)
        choices.set_class(bool(self._offered), "open")
        if not self._offered:
            return False
        choices.clear_options()
        width = max(len(word) for word, _, _ in self._offered[:30])
        choices.add_options([Option(f"{visible(word):<{width}}  {visible(note)}") for word, _, note in self._offered])
        choices.highlighted = 0
        if is_asked and len(self._offered) == 1:
            self._take(0)
        return True

    def move_choice(self, step: int) -> bool:
        """Another choice; False when none are shown."""
        if not self.is_open:
            return False
        choices = self.query_one("#choices", OptionList)
        choices.highlighted = ((choices.highlighted or 0) + step) % len(self._offered)
        self._is_moved = True
        return True

    def take_choice(self, *, only_if_moved: bool = False) -> bool:
        """Put the chosen word into the text; False when none are shown."""
        if not self.is_open or (only_if_moved and not self._is_moved):
            return False
        self._take(self.query_one("#choices", OptionList).highlighted or 0)
        return True

    def walk_history(self, step: int) -> bool:
        """Show the input before or after; whether there is one."""
        found = self._history.step(step, self.entry.text)
        if found is None:
            return False
        self.put(found)
        return True

    def _take(self, index: int) -> None:
        word, start, _ = self._offered[index]
        rest = word[start:]
        ending = "" if word.endswith("/") else " "
        self.entry.insert(rest + ending)
        if ending:
            self.close()

    def _stop_walking(self) -> None:
        self._is_walking = False
