"""`edgetune chat`: talk with a model, full-screen or by lines; from a pipe, one message and its reply."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.model_options import model_options, open_chosen
from edgetune.cli.progress import say, show_progress
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.cli.terminal import is_full_screen
from edgetune.errors import EdgetuneError, ExitCode, UsageError
from edgetune.events import ignore

if TYPE_CHECKING:
    from edgetune.chat.database import SavedSession
    from edgetune.chat.open_chat import OpenChat, Outcome
    from edgetune.chat.session import Session


@click.command("chat", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--plain", is_flag=True, help="Line mode: no full-screen interface.")
@click.option("--system", default="", help="The system prompt.")
@click.option("--continue", "latest", is_flag=True, help="Go on with the last chat, with its model and adapters.")
@click.option("--resume", metavar="ID", default="", help="Go on with this chat: the beginning of its id, or its title.")
@click.option("--no-save", is_flag=True, help="Keep nothing of what is said.")
@click.option(
    "--overflow",
    type=click.Choice(["drop", "shift", "stop"]),
    default="drop",
    show_default=True,
    help="When the context is full: drop the oldest turns, shift what stays without evaluating it again, or stop.",
)
@sampling_options
@model_options
def command(
    model: str | None, plain: bool, system: str, latest: bool, resume: str, no_save: bool, overflow: str, **options: Any
) -> int:
    """Chat with MODEL, a path or a name; left out, it is the base of --lora, or the embedded model.

    Type /help for the commands. When standard input is a pipe, all of it is one message, and the reply is printed.
    Chats on a terminal are kept on this machine, and found with /sessions and /search.
    """
    saved = _find_saved(latest, resume, no_save=no_save)
    if saved and model is None and not options["lora"]:
        model, options["lora"] = _files_of(saved)
    sampling = take_sampling(options)
    settings = {"max_tokens": options.pop("max_tokens"), "stop": options.pop("stop"), "overflow": overflow}
    is_kept = not no_save and (sys.stdin.isatty() or saved is not None)

    def begin(session: Session, on_problem: Callable[[EdgetuneError], None]) -> tuple[OpenChat, Outcome]:
        from edgetune.chat.open_chat import OpenChat, Outcome
        from edgetune.chat.session_commands import resume_session
        from edgetune.engine.sampling import Sampling

        conversation = session.converse(system=system, sampling=sampling, **settings)
        chat, outcome = OpenChat(session, conversation, save=is_kept, on_problem=on_problem), Outcome()
        if saved:
            outcome = resume_session(chat, saved)
            conversation.system = system or conversation.system
            if sampling != Sampling():
                conversation.sampling = sampling
        return chat, outcome

    if not plain and is_full_screen():
        from edgetune.cli.last_words import speak_before_aborting
        from edgetune.opening.files import choose_model
        from edgetune.tui import run_chat

        # Before the screen is taken: it is what an abort gives back.
        speak_before_aborting()
        # What may take minutes, a conversion, is over before the screen is taken.
        with show_progress() as sink:
            choice = choose_model(model, options["lora"], sink=sink)
        options["lora"] = tuple(f"{one.path}:{one.scale:g}" for one in choice.lora)
        base = str(choice.base)
        run_chat(lambda: begin(open_chosen(base, options, sink=ignore), lambda error: None), title=choice.base.stem)
        return ExitCode.OK
    from edgetune.cli.line_mode import run_line_mode, run_piped, show_outcome

    with open_chosen(model, options) as session:
        chat, outcome = begin(session, _warn)
        with chat:
            show_outcome(outcome)
            if sys.stdin.isatty():
                run_line_mode(chat, draft=outcome.draft)
                return ExitCode.OK
            return ExitCode.INTERRUPTED if run_piped(chat.conversation) else ExitCode.OK


def _find_saved(latest: bool, resume: str, *, no_save: bool) -> SavedSession | None:
    """The kept chat that the flags mean. Raises `UsageError` when there is none."""
    if not latest and not resume:
        return None
    if no_save:
        raise UsageError("A chat that goes on is kept.", hint="Leave out --no-save.")
    from edgetune.chat.database import ChatDatabase

    database = ChatDatabase()
    try:
        if resume:
            return database.find(resume)
        found = database.sessions(limit=1)
    finally:
        database.close()
    if not found:
        raise UsageError("No chat is kept yet.", hint="Begin one: edgetune chat")
    return found[0]


def _files_of(saved: SavedSession) -> tuple[str, tuple[str, ...]]:
    """MODEL and the --lora values that a kept chat was held with."""
    if not Path(saved.model).exists():
        raise UsageError(
            f"The model of this chat is gone: {saved.model}.", hint="Name another one: edgetune chat MODEL --resume ID"
        )
    lora = tuple(f"{one['path']}:{one['scale']:g}" for one in saved.adapters if Path(str(one["path"])).exists())
    return saved.model, lora


def _warn(error: EdgetuneError) -> None:
    say(f"{error.message} The chat goes on, but is not kept.", warning=True)
