"""Commands on single tokens of a reply: which of them were unsure, and going on from another one."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.tree import Node
from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.errors import UsageError

_TOKENS, _ALTERNATIVES = 8, 4
"""What is listed unless asked for: the least sure tokens, and of each as many likely ones."""
_MOST_LISTED = 10
_BEFORE = 24
"""Characters shown before a token."""


def alternatives(chat: OpenChat, arguments: str) -> Outcome:
    """List the tokens of the last reply that were least sure, and what else was likely there."""
    if arguments and not (arguments.isdecimal() and int(arguments)):
        raise UsageError(f"/alternatives takes a number of tokens, not {arguments!r}.")
    node = _looked_at(chat)
    chosen = [index for index, choice in enumerate(node.choices) if len(choice.alternatives) > 1]
    unsure = sorted(chosen, key=lambda index: node.choices[index].probability)[: int(arguments or _TOKENS)]
    rows = tuple((str(index + 1), _described(node, node.choices[index])) for index in sorted(unsure))
    return Outcome("/branch TOKEN ALTERNATIVE goes on from another one, e.g. /branch 3 2:", rows=rows)


def branch_at(chat: OpenChat, token: str, alternative: str) -> Outcome:
    """Another reply beside the last one: the same up to `token`, there `alternative` (its number or text), then on."""
    node = _looked_at(chat)
    if not token.isdecimal() or not 1 <= int(token) <= len(node.choices):
        raise UsageError(f"The reply has no token {token!r}: they are numbered from 1 to {len(node.choices)}.")
    index = int(token) - 1
    found = _find(node.choices[index].alternatives, alternative)
    return Outcome(reply=chat.conversation.branch(node.id, index, found.id), moved=True)


def _looked_at(chat: OpenChat) -> Node:
    node = chat.last("assistant")
    if not any(choice.alternatives for choice in node.choices):
        raise UsageError(
            "It was not recorded what the tokens of this reply were chosen from.", hint="/retry makes another reply."
        )
    return node


def _find(candidates: Sequence[Candidate], wanted: str) -> Candidate:
    """The candidate with this number, or this text, with or without the quotes and spaces it is shown with."""
    if wanted.isdecimal() and 1 <= int(wanted) <= len(candidates):
        return candidates[int(wanted) - 1]
    for form in (_quoted, str, str.strip):
        if found := next((one for one in candidates if form(one.text) == wanted), None):
            return found
    listed = ", ".join(f"{number} {_quoted(one.text)}" for number, one in enumerate(candidates[:_MOST_LISTED], 1))
    raise UsageError(f"{wanted!r} was not among the likely ones there.", hint=f"Those are: {listed}.")


def _described(node: Node, choice: TokenChoice) -> str:
    before = " ".join(node.generated[max(0, choice.start - _BEFORE) : choice.start].split())
    others = [
        f"{number}{'*' if one.id == choice.id else ''} {_quoted(one.text)} {_share(one.probability)}"
        for number, one in enumerate(choice.alternatives[:_ALTERNATIVES], 1)
    ]
    if all(one.id != choice.id for one in choice.alternatives[:_ALTERNATIVES]):
        others.append(f"… * {_quoted(node.generated[choice.start : choice.end])} {_share(choice.probability)}")
    return f"…{before} → {'  '.join(others)}"


def _quoted(text: str) -> str:
    """A token as it may be typed and read, white space and all; one without text ends the reply."""
    return json.dumps(text, ensure_ascii=False) if text else "(end)"


def _share(probability: float) -> str:
    if probability < 0.005:
        return "<1%"
    return f"{probability:.0%}" if probability < 0.995 else ">99%"
