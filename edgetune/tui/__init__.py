"""The full-screen front end: the chat, and the screens around it, in Textual.

Parses nothing and decides nothing that the line mode does not: it shows `edgetune.chat` and calls it. Knows nothing of
the command line, which opens it through `run_chat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome

__all__ = ["run_chat"]


def run_chat(opening: Callable[[], tuple[OpenChat, Outcome]], *, title: str = "") -> None:
    """Show the chat that `opening` opens, until the user leaves; `title` names the model while it loads.

    `opening` runs on the thread that drives the engine from then on; what it raises is raised here. Its second value
    is shown first, say that a chat was resumed.
    """
    from edgetune.tui.app import EdgetuneApp

    app = EdgetuneApp()
    app.first_screen = lambda: app.chat_screen(opening, title=title, is_first=True)
    app.show()
