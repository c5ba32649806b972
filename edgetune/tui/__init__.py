"""The full-screen front end: the chat, and the screens around it, in Textual.

Parses nothing and decides nothing that the line mode does not: it shows `edgetune.chat` and calls it. Knows nothing of
the command line, which opens it through `run_chat`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome

__all__ = ["run_chat", "run_home"]


def run_chat(opening: Callable[[], tuple[OpenChat, Outcome]], *, title: str = "") -> None:
    """Show the chat that `opening` opens, until the user leaves; `title` names the model while it loads.

    `opening` runs on the thread that drives the engine from then on; what it raises is raised here. Its second value
    is shown first, say that a chat was resumed.
    """
    from edgetune.tui.app import EdgetuneApp

    app = EdgetuneApp()
    app.first_screen = lambda: app.chat_screen(opening, title=title, is_first=True)
    app.show()


def run_home(open_chat: Callable[[Path], tuple[OpenChat, Outcome]]) -> None:
    """Show what is on this machine and what can be done with it, until the user leaves.

    `open_chat` opens a chat with the model, the adapter or the run at a path, as `run_chat`'s `opening` does.
    """
    from edgetune.tui.app import EdgetuneApp
    from edgetune.tui.home import HomeScreen

    EdgetuneApp(lambda: HomeScreen(open_chat)).show()
