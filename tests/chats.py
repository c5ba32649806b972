"""An open chat with a small model, and what a person does in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgetune.chat import Conversation, Node, Session, open_session
from edgetune.chat.commands import run_command
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.cli import line_mode
from edgetune.engine.sampling import Sampling
from tests.ggufs import base_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)


def say(chat: OpenChat, text: str) -> Node:
    reply = chat.say(text)
    "".join(reply)
    return reply.node


def do(chat: OpenChat, line: str) -> Outcome:
    outcome = run_command(chat, line)
    if outcome.reply is not None:
        "".join(outcome.reply)
    return outcome


@contextmanager
def fresh_chat(session: Session) -> Iterator[OpenChat]:
    """A kept chat in which nothing was said or evaluated yet."""
    session.engine.set_adapters([])
    session.engine.forget()
    conversation = session.converse(sampling=GREEDY, max_tokens=12, top=3)
    with OpenChat(session, conversation) as opened:
        yield opened


class Typed:
    """Stands for the terminal: hands over lines, then end of input."""

    def __init__(self, lines: list[str | type[BaseException]]) -> None:
        self.lines = iter(lines)
        self.drafts: list[str] = []

    def prompt(self, _message: str, *, default: str = "") -> str:
        self.drafts.append(default)
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def chat_through(lines: list[Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Conversation:
    monkeypatch.setattr(line_mode, "_build_prompt", lambda chat: Typed(lines))
    with open_session(base_gguf(), threads=1) as session:
        conversation = Conversation(session.engine, sampling=Sampling(temp=0), max_tokens=8, **options)
        with OpenChat(session, conversation) as chat:
            line_mode.run_line_mode(chat)
    return conversation
