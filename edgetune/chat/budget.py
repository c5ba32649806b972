"""How much of a conversation goes into the context: what leaves it when it is full, or that nothing more is said.

Counts tokens of prompts that it has others build; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.chat.prompt import Prompt
from edgetune.chat.tree import Node
from edgetune.errors import UsageError

Overflow = Literal["drop", "shift", "stop"]
"""What happens when the context is full: "drop": the oldest turns leave it, and what stays is evaluated again; "shift":
they leave it, and what stays is kept as it was computed in their presence; "stop": nothing more is said."""

_SHARE_FOR_REPLY = 4
"""One part in this many of the context is kept free for the reply when its length is not limited."""


@dataclass(frozen=True)
class Forecast:
    """What a next message will find in the context."""

    tokens: int
    """Of the prompt that would be evaluated or reused."""
    room: int
    """How many of them the policy lets in, so that a reply has space."""
    size: int
    """Of the context."""
    dropped_turns: int
    """How many of the oldest turns leave the context for it."""
    refused: bool
    """Whether it would not be answered at all."""


@dataclass(frozen=True)
class Budget:
    """The room that a context has for a prompt."""

    size: int
    """Of the context, in tokens."""
    max_tokens: int
    """Limit of a reply; -1 is the context."""
    overflow: Overflow

    @property
    def room(self) -> int:
        """How many tokens a prompt may have so that its reply has space."""
        wanted = self.max_tokens if self.max_tokens > 0 else self.size // _SHARE_FOR_REPLY
        return self.size - min(wanted, self.size // 2)

    def fit(self, path: Sequence[Node], first: int, build: Callable[[int], Prompt]) -> tuple[int, Prompt]:
        """(index of the first message shown, prompt), with as many of the oldest turns left out as it takes.

        `first` are left out already; `build` makes the prompt of the messages from an index on.
        """
        prompt = build(first)
        if self.overflow == "stop" or len(prompt.ids) <= self.room:
            return first, prompt
        # A long history is not rendered once for each of its turns.
        turns = [index for index in range(first + 1, len(path)) if path[index].role == "user"]
        low, high = 0, len(turns) - 1
        while low <= high:
            middle = (low + high) // 2
            shorter = build(turns[middle])
            if len(shorter.ids) <= self.room or middle == len(turns) - 1:
                first, prompt, high = turns[middle], shorter, middle - 1
            else:
                low = middle + 1
        return first, prompt

    def forecast(self, path: Sequence[Node], before: int, first: int, prompt: Prompt) -> Forecast:
        """What `prompt`, of the messages from `first` on, means where `before` were left out until now."""
        refused = len(prompt.ids) >= self.size or self._stops(path, prompt)
        return Forecast(len(prompt.ids), self.room, self.size, count_turns(path[before:first]), refused)

    def check(self, path: Sequence[Node], prompt: Prompt) -> None:
        """Raise `UsageError` when there is no room for a reply to `prompt`."""
        tokens = len(prompt.ids)
        if self._stops(path, prompt):
            raise UsageError(
                f"The context is full: the conversation takes {tokens} of {self.size} tokens with this message.",
                hint="Let the oldest turns leave it with /overflow drop, or begin anew with /clear.",
            )
        if tokens >= self.size:
            raise UsageError(
                f"The message takes {tokens} tokens with the system prompt; the context has {self.size}.",
                hint="Shorten it, or start again with a larger context: -c",
            )

    def _stops(self, path: Sequence[Node], prompt: Prompt) -> bool:
        """Whether the policy lets nothing more be said."""
        return self.overflow == "stop" and len(path) > 1 and len(prompt.ids) > self.room


def count_turns(nodes: Sequence[Node]) -> int:
    """How many turns begin among `nodes`."""
    return sum(node.role == "user" for node in nodes)
