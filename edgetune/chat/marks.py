"""What a chat template writes around a part of a message, found by rendering the message with and without it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Message

TAG = re.compile(r"<\|?/?[A-Za-z_:]+\|?>|\[/?[A-Z_]+\]")
"""What templates mark parts with."""
QUESTION: Message = {"role": "user", "content": "What now?"}
"""What the messages that are rendered answer."""


def render_after_question(
    template: ChatTemplate, *messages: Message, tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The text of `messages` after `QUESTION`; empty when the template refuses them."""
    try:
        return template.render([QUESTION, *messages], tools=tools).text
    except UsageError:
        return ""


def mark_before(before: str, plain: str) -> str:
    """What `before`, the text up to a part of a message, ends in that `plain`, the message without it, does not share.

    Empty when they share everything.
    """
    shared = shared_length(before, plain)
    tags = TAG.finditer(before)
    return before[next((tag.start() for tag in tags if tag.start() < shared < tag.end()), shared) :].strip()


def shared_length(left: str, right: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
