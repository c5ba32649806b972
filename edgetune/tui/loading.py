"""The screen while a model is loaded: how long it takes, and the way out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import ProgressBar, Static

from edgetune.errors import EdgetuneError
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.visible import visible

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome
    from edgetune.tui.app import EdgetuneApp


class LoadingScreen(EndsWorkers, Screen[None]):
    """Opens a chat on the engine's thread and gives way to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "give_up", "Give up", priority=True),
        Binding("ctrl+c", "give_up", "Give up", show=False, priority=True),
    ]

    def __init__(self, opening: Callable[[], tuple[OpenChat, Outcome]], *, title: str, is_first: bool) -> None:
        super().__init__()
        self._opening, self._title, self._is_first = opening, title, is_first
        self._started = time.monotonic()
        self._is_given_up = False

    def compose(self) -> ComposeResult:
        """Name, a bar that moves, seconds."""
        with Vertical(id="loading"):
            yield Static(visible(self._title or "Loading the model"), id="loading-title", markup=False)
            yield ProgressBar(show_percentage=False, show_eta=False)
            yield Static("", id="loading-note", markup=False)

    def on_mount(self) -> None:
        """Begin."""
        self.set_interval(0.1, self._tick)
        self.run_worker(self._open(), exit_on_error=False)

    def action_give_up(self) -> None:
        """Leave as soon as llama.cpp lets go."""
        self._is_given_up = True
        self._tick()

    async def _open(self) -> None:
        app: EdgetuneApp = self.app  # type: ignore[assignment]
        try:
            chat, outcome = await app.engine_worker.run(self._opening)
        except (EdgetuneError, OSError) as error:
            if self._is_first:
                app.fail(error)
            else:
                app.pop_screen()
                app.say_error(error)
            return
        except Exception as error:  # noqa: BLE001  (whoever started the app explains it)
            app.fail(error)
            return
        if self._is_given_up:
            await app.engine_worker.run(lambda: _close(chat))
            if self._is_first:
                app.exit()
            else:
                app.pop_screen()
            return
        from edgetune.tui.chat import ChatScreen

        app.switch_screen(ChatScreen(chat, first=outcome, is_first=self._is_first))

    def _tick(self) -> None:
        seconds = time.monotonic() - self._started
        note = "leaving as soon as it is loaded" if self._is_given_up else "Esc gives up"
        self.query_one("#loading-note", Static).update(f"{seconds:.1f} s · {note}")


def _close(chat: OpenChat) -> None:
    chat.close()
    chat.session.engine.close()
