"""What a reply's tokens were chosen from, with what a branch took over from the reply it left.

The tokens a branch begins with were given to the engine, not chosen by it; their choices are those of the reply they
come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import TokenChoice


def given_tokens(node: Node) -> int:
    """How many tokens of `node` were given: what a branch kept, and the one it took instead."""
    origin = node.meta.get("branched_from")
    return int(origin.get("token", 0)) + 1 if isinstance(origin, dict) else 0


def recorded_choices(tree: Tree, node: Node, choices: Sequence[TokenChoice] | None = None) -> list[TokenChoice]:
    """The choices of `node`, or `choices` in their stead while it runs; alternatives as complete as they are known."""
    own = list(node.choices if choices is None else choices)
    origin = node.meta.get("branched_from")
    source = tree.nodes.get(origin.get("node", "")) if isinstance(origin, dict) else None
    if source is None:
        return own
    at = given_tokens(node) - 1
    kept = recorded_choices(tree, source)
    if len(kept) <= at:
        return own
    for number in range(min(at, len(own))):
        own[number] = kept[number]
    if at < len(own):
        taken, alternatives = own[at], kept[at].alternatives
        found = next((one for one in alternatives if one.id == taken.id), None)
        if found is not None:
            own[at] = replace(taken, probability=found.probability, sampled=found.sampled, alternatives=alternatives)
    return own
