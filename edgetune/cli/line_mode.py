"""The chat loop in a terminal: a prompt with history and completion, commands, replies as they come.

Prompts, notes and speeds go to stderr, so that stdout carries what the model says and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import click

from edgetune.chat import Conversation, Reply
from edgetune.chat.commands import COMMANDS, complete, run_command
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.cli.progress import say
from edgetune.cli.terminal import plain, quiet_keyboard, read_stdin, say_dim, say_rows, valid_text, write_text
from edgetune.errors import EdgetuneError, UsageError
from edgetune.paths import home_dir

_QUOTES = '"""'
_KEYS = (
    ('""" … """', "A message over several lines; Alt-Enter makes a line as well."),
    ("Ctrl-C", "Stop the reply and keep what was said."),
    ("Ctrl-D", "Leave."),
)
_SHORT_MESSAGE = "And what else?"
_ALTERNATIVES = 10
"""How many are recorded for each token, for /alternatives and /branch."""


def run_line_mode(chat: OpenChat, *, draft: str = "") -> None:
    """Read turns and commands until the user leaves; `draft` is in the first line already."""
    prompt = _build_prompt(chat)
    chat.keys, chat.conversation.top = _KEYS, _ALTERNATIVES
    adapters = ", ".join(chat.session.adapter_names())
    say_dim(f"{chat.session.name}{f' with {adapters}' if adapters else ''}. /help lists the commands, /bye leaves.")
    while True:
        try:
            text = unquote(valid_text(prompt.prompt(">>> ", default=draft)))
        except KeyboardInterrupt:
            say_dim("Ctrl-D or /bye leaves.")
            continue
        except EOFError:
            return
        finally:
            draft = ""
        try:
            if not text.strip():
                continue
            outcome = run_command(chat, text) if text.startswith("/") else Outcome(reply=chat.say(text))
            show_outcome(outcome)
            if outcome.leaves:
                return
            draft = outcome.draft
            if outcome.reply is not None:
                foretell_overflow(chat.conversation)
        except EdgetuneError as error:
            say(error.message, warning=True)
            if error.hint:
                say_dim(error.hint)
        except OSError as error:
            say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", warning=True)


def run_piped(conversation: Conversation) -> bool:
    """Answer all of stdin as one message; returns whether the user stopped it."""
    text = read_stdin()
    if not text.strip():
        raise UsageError("There is nothing on standard input.", hint="For example: echo hi | edgetune chat --plain")
    return show_reply(conversation.ask(text), with_speed=False)


def show_outcome(outcome: Outcome) -> None:
    """Print what a command did, and the reply it makes as it comes."""
    if outcome.text:
        say_dim(outcome.text)
    say_rows(outcome.rows)
    if outcome.reply is not None:
        with quiet_keyboard():
            show_reply(outcome.reply)


def foretell_overflow(conversation: Conversation) -> None:
    """Say so when even a short message will find the context full."""
    forecast = conversation.forecast(_SHORT_MESSAGE)
    full = f"The context is nearly full ({conversation.engine.cached_tokens} of {forecast.size} tokens)"
    if forecast.refused:
        say_dim(f"{full}: the next message will not be answered. /overflow drop lets the oldest turns leave it.")
    elif forecast.dropped_turns:
        turns = "turn" if forecast.dropped_turns == 1 else f"{forecast.dropped_turns} turns"
        say_dim(f"{full}: with the next message, the oldest {turns} will leave it.")


def show_reply(reply: Reply, *, with_speed: bool = True) -> bool:
    """Print a reply as it comes; Ctrl-C stops it. Returns whether that happened."""
    if reply.dropped_turns:
        turns = "turn has" if reply.dropped_turns == 1 else f"{reply.dropped_turns} turns have"
        say_dim(f"The context is full: the oldest {turns} left it.")
    answer = ""
    try:
        for part in _answer_parts(reply, show_reasoning=with_speed):
            write_text(part)
            answer += part
    except KeyboardInterrupt:
        reply.stop()
    interrupted = reply.finish_reason == "interrupted"
    if answer and not answer.endswith("\n"):
        click.echo()
    if interrupted:
        say_dim("Stopped." if reply.text else "Stopped before the first word; the turn is taken back.")
    elif reply.context_full:
        say_dim("The context is full: the reply was cut. The oldest turns leave it with the next message.")
    elif reply.finish_reason == "length":
        say_dim("The reply reached its limit of new tokens (-n).")
    elif reply.node.meta.get("calls_tool"):
        say_dim("The model calls a tool. /tool TEXT answers it.")
    if with_speed and reply.timings.generated_tokens:
        say_dim(_speed(reply))
    return interrupted


def _answer_parts(reply: Reply, *, show_reasoning: bool) -> Iterator[str]:
    """The answer's text as it comes; the reasoning before it goes to stderr, or nowhere."""
    if not reply.reasons:
        yield from reply
        return
    thought = said = ""
    try:
        # Once more after the last piece: only then is it clear that nothing else is a mark.
        for _ in chain(reply, [""]):
            reasoning, answer = reply.parts()
            if show_reasoning and reasoning.startswith(thought) and reasoning != thought:
                _write_dim(reasoning[len(thought) :])
                thought = reasoning
            if answer.startswith(said) and answer != said:
                if thought and not said:
                    _write_dim("\n\n")
                yield answer[len(said) :]
                said = answer
    finally:
        reply.stop()


def _write_dim(text: str) -> None:
    """Part of a quiet line on stderr."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    click.secho(plain(text), err=True, nl=False, dim=True if color else None)


def unquote(text: str) -> str:
    """`text` without the triple quotes that let it go over several lines."""
    stripped = text.strip()
    if stripped.startswith(_QUOTES):
        return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text


def is_open(text: str) -> bool:
    """Whether `text` began with triple quotes and has not closed them yet."""
    stripped = text.strip()
    if not stripped.startswith(_QUOTES):
        return False
    return len(stripped) < 2 * len(_QUOTES) or not stripped.endswith(_QUOTES)


def _speed(reply: Reply) -> str:
    timings = reply.timings
    evaluated = timings.prompt_tokens - timings.reused_tokens
    parts = [f"{timings.generated_tokens} tokens"]
    if timings.tokens_per_second:
        parts[0] += f" at {timings.tokens_per_second:.1f}/s"
    if evaluated:
        parts.append(f"prompt {evaluated} at {timings.prompt_per_second:.0f}/s")
    if timings.reused_tokens:
        parts.append(f"{timings.reused_tokens} reused")
    return " · ".join(parts)


def _build_prompt(chat: OpenChat) -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _accept(event: Any) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.Vt100MouseEvent)
    def _no_mouse(event: Any) -> None:
        # A colour's escape sequence, pasted, looks like a mouse click to prompt_toolkit, which breaks on it.
        return

    class History(FileHistory):
        """Kept where that is possible; a home that is full, read-only or damaged ends no chat."""

        def load_history_strings(self) -> Any:
            with suppress(OSError):
                return list(super().load_history_strings())
            return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                # As private as the chats themselves.
                Path(str(self.filename)).touch(mode=0o600)
                super().store_string(string)

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Any:
            for word, start in complete(chat, document.text_before_cursor):
                yield Completion(word, start_position=-start, display_meta=_help_of(word))

    history_path = home_dir() / "history"
    with suppress(OSError):
        history_path.parent.mkdir(parents=True, exist_ok=True)
    return PromptSession(
        history=History(str(history_path)),
        multiline=True,
        key_bindings=keys,
        completer=Commands(),
        complete_while_typing=False,
        prompt_continuation="... ",
        output=create_output(stdout=None if sys.stdout.isatty() else sys.stderr),
    )


def _help_of(word: str) -> str:
    return next((command.help for command in COMMANDS if f"/{command.name}" == word), "")
