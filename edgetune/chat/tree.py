"""Everything that was said in a conversation, as a tree: each message a node, each way on a branch.

The history is the path from the root to the head. Retry, edit and undo move the head or grow siblings; nothing is ever
removed. Knows no engine and no storage.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.engine.protocol import TokenChoice


def _new_id() -> str:
    return uuid.uuid4().hex


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class Node:
    """One message."""

    role: str
    content: str
    """What was said; a reply's reasoning is not part of it (see `meta`)."""
    parent: str | None = None
    """The message before it; None for the first."""
    id: str = field(default_factory=_new_id)
    created: str = field(default_factory=_now)
    """ISO 8601, UTC."""
    ids: tuple[int, ...] = ()
    """The tokens of a generated reply, as they were sampled."""
    choices: list[TokenChoice] = field(default_factory=list)
    """What each of `ids` was chosen from, where that was recorded; positions are those in `generated`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """For a generated reply: "finish_reason", "seed", "sampling", "adapters", "timings", "vocabulary", and where they
    apply "reasoning", "raw" (text as it was generated), "cut" (a stop string cut the text of `ids`), "calls_tool",
    "branched_from".
    For any: "vote" ("up" or "down"), "edited_from" (a node's id), "fields" (what it holds
    besides role and content)."""

    @property
    def generated(self) -> str:
        """The text that `ids` and `choices` stand for: the content, with the reasoning in its tags."""
        return str(self.meta.get("raw", self.content))

    @property
    def message(self) -> dict[str, Any]:
        """As a template takes it."""
        return {"role": self.role, "content": self.content, **self.meta.get("fields", {})}


class Tree:
    """Nodes, and which of them is the latest message now."""

    def __init__(self, nodes: Iterable[Node] = (), *, head: str | None = None) -> None:
        """Take over `nodes`, each after its parent; `head` None is before the first message."""
        self.nodes: dict[str, Node] = {}
        """By id, in the order they were added."""
        self.head: str | None = None
        """The latest message of the history; None when nothing was said."""
        self._children: dict[str | None, list[str]] = {}
        for node in nodes:
            self._link(node)
        if head is not None:
            self.head = self.node(head).id

    def node(self, node_id: str) -> Node:
        """The node with this id. Raises `UsageError` when there is none."""
        if node_id not in self.nodes:
            raise UsageError(f"There is no message {node_id!r} in this conversation.")
        return self.nodes[node_id]

    def add(self, node: Node) -> Node:
        """Put `node` under its parent, and the head on it."""
        self._link(node)
        self.head = node.id
        return node

    def path(self, node_id: str | None = None) -> list[Node]:
        """The messages from the first one to `node_id`, or to the head."""
        found: list[Node] = []
        at = self.head if node_id is None else self.node(node_id).id
        while at is not None:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found[::-1]

    def children(self, node_id: str | None) -> list[Node]:
        """What was said after `node_id` (None: at the start), oldest first."""
        return [self.nodes[child] for child in self._children.get(node_id, [])]

    def siblings(self, node_id: str) -> list[Node]:
        """The messages in this one's place, itself among them, oldest first."""
        return self.children(self.node(node_id).parent)

    def select(self, node_id: str) -> Node:
        """Put the head on the newest message that follows from `node_id`; returns it."""
        node = self.node(node_id)
        while children := self.children(node.id):
            node = children[-1]
        self.head = node.id
        return node

    def leaves(self) -> list[Node]:
        """The last message of every branch, oldest first."""
        return [node for node in self.nodes.values() if not self._children.get(node.id)]

    def _link(self, node: Node) -> None:
        if node.id in self.nodes:
            raise ValueError(f"node {node.id} is in the tree already")
        if node.parent is not None:
            self.node(node.parent)
        self.nodes[node.id] = node
        self._children.setdefault(node.parent, []).append(node.id)
