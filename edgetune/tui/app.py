"""The Textual app under every screen: themes, the engine's thread, messages to the user, the way out.

Screens are imported when they are opened. An error of edgetune's becomes a message; any other one ends the app and is
raised to whoever started it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from edgetune.errors import EdgetuneError
from edgetune.tui.themes import DARK, LIGHT, first_theme, remember_theme
from edgetune.tui.visible import visible
from edgetune.tui.worker import EngineWorker

if TYPE_CHECKING:
    from textual.driver import Driver

    from edgetune.chat.open_chat import OpenChat, Outcome

Severity = Literal["information", "warning", "error"]
_SWITCH_SECONDS = 0.001
"""How long one Python thread may keep another waiting: the engine's thread must not wait for a frame to be drawn."""


class _Key(Enum):
    ALT_ENTER = "alt+enter"


class EdgetuneApp(App[None]):
    """One model at a time, and screens on it."""

    TITLE = "edgetune"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Leave", show=False, priority=True),
        Binding("f1", "show_keys", "Keys", show=False, priority=True),
    ]

    def __init__(self, first_screen: Callable[[], Screen[Any]] | None = None) -> None:
        """`first_screen` makes the screen to begin with; it may be set until the app is shown."""
        # Without colours the filter for them has to be told before the first theme.
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        # Textual 8.2 knows Alt-Enter from terminals with the kitty protocol alone; from others it would be Enter.
        cast(dict[str, Any], ANSI_SEQUENCES_KEYS).setdefault("\x1b\r", (_Key.ALT_ENTER,))
        self.first_screen = first_screen
        self.engine_worker = EngineWorker()
        """The only thread that calls an engine."""
        self.failure: BaseException | None = None
        """What `show` raises when the app has ended."""

    def get_driver_class(self) -> type[Driver]:
        """Textual's, but for how it reads a terminal."""
        driver_class = super().get_driver_class()
        if driver_class.__name__ != "LinuxDriver":
            return driver_class
        from edgetune.tui.terminal import Terminal

        return Terminal

    def show(self) -> None:
        """Run until the user leaves. Raises what the first screen could not be opened for."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            self.run()
        finally:
            sys.setswitchinterval(before)
            self.engine_worker.close()
        if self.failure is not None:
            raise self.failure

    def on_mount(self) -> None:
        """Put on the theme and open the first screen."""
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        name = first_theme()
        self.theme = name if name in self.available_themes else DARK.name
        self._theme_in_force = self.theme
        self.theme_changed_signal.subscribe(self, lambda theme: self._remember_theme(theme.name))
        if self.first_screen is not None:
            self.push_screen(self.first_screen())

    def chat_screen(
        self, opening: Callable[[], tuple[OpenChat, Outcome]], *, title: str = "", is_first: bool = False
    ) -> Screen[Any]:
        """The screen that loads a model and then shows the chat; `is_first` ends the app when that fails."""
        from edgetune.tui.loading import LoadingScreen

        return LoadingScreen(opening, title=title, is_first=is_first)

    def fail(self, error: BaseException) -> None:
        """End the app, and let `show` raise `error`."""
        self.failure = error
        self.exit()

    def say(self, text: str, *, hint: str = "", severity: Severity = "information") -> None:
        """Show a message for a while; nothing in it is markup."""
        self.notify(visible(hint or text), title=visible(text) if hint else "", severity=severity, markup=False)

    def say_error(self, error: EdgetuneError | OSError) -> None:
        """Show what went wrong, and what to do about it."""
        if isinstance(error, EdgetuneError):
            self.say(error.message, hint=error.hint, severity="warning")
        else:
            name = f": {error.filename}" if error.filename else ""
            self.say(f"{error.strerror or error}{name}.", severity="warning")

    def _remember_theme(self, name: str) -> None:
        """Remember what was chosen; not what the app began with, which fits this terminal and may not fit the next."""
        if name != self._theme_in_force and not self.no_color:
            remember_theme(name)
        self._theme_in_force = name

    def action_show_keys(self) -> None:
        """Show what every key does here."""
        from edgetune.tui.keys import KeysScreen

        if not isinstance(self.screen, KeysScreen):
            self.push_screen(KeysScreen(self.screen))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the command palette offers everywhere, and what the screen adds."""
        yield SystemCommand("Theme", "Another look", self.action_change_theme)
        yield SystemCommand("Keys", "What every key does here", self.action_show_keys)
        yield SystemCommand("Leave", "End edgetune", self.action_quit)
        if (own := getattr(screen, "palette_commands", None)) is not None:
            yield from own()
