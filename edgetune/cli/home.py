"""`edgetune` without a command, on a terminal: the screen that everything else can be started from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.events import ignore

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome


def show_home() -> None:
    """Show it until the user leaves."""
    from edgetune.tui import run_home

    run_home(open_chat)


def open_chat(path: Path) -> tuple[OpenChat, Outcome]:
    """A kept chat with the model, the adapter or the run at `path`, as `edgetune chat PATH` opens it."""
    from edgetune.chat import open_session
    from edgetune.chat.open_chat import OpenChat, Outcome
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.opening.files import choose_model

    choice = choose_model(str(path), (), sink=ignore)
    speak_before_aborting()
    session = open_session(choice.base, lora=choice.lora)
    return OpenChat(session, session.converse()), Outcome()
