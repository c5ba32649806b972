"""What the conversation shows besides its messages: the reply that is being made, and lines that are no message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.chat.tree import Node
from edgetune.engine.protocol import TokenChoice


@dataclass(frozen=True)
class Notice:
    """Lines that are no message: what a command said."""

    text: str
    after: str | None
    """The message it stands under; None at the beginning."""
    is_problem: bool = False


@dataclass
class Live:
    """The reply that is being made, as far as it has come."""

    node: Node
    reasoning: str = ""
    answer: str = ""
    generated: str = ""
    """All of its text, reasoning and tags as well: what `choices` count in."""
    choices: Sequence[TokenChoice] = ()
    is_over: bool = False
