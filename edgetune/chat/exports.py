"""What was said → files: Markdown for people, rows for training, preference pairs, verdicts.

Rows are OpenAI chat rows, which `edgetune train` reads. Pairs and verdicts are what preference training takes: `prompt`
(messages), `chosen` and `rejected` (one message each), or `messages` and `label`. Reasoning is not part of any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from edgetune.chat.tree import Node, Tree
from edgetune.errors import UsageError
from edgetune.paths import whole_file

ExportKind = Literal["markdown", "jsonl", "rows", "pairs", "verdicts"]

_SPEAKERS = {"user": "You", "assistant": "Model", "tool": "Tool", "system": "System"}


def export(path: Path, tree: Tree, *, kind: ExportKind, title: str = "", system: str = "") -> int:
    """Write `kind` of `tree` to `path`, whole or not at all; returns how many messages or rows there are.

    "markdown" and "jsonl" are the current branch; "rows" the replies that were voted up or edited, on all branches;
    "pairs" the preferred replies against those beside them, "verdicts" every reply found good or bad. Raises
    `UsageError` when there is nothing of it.
    """
    if kind == "markdown":
        nodes = tree.path()
        text, count = markdown(nodes, title=title, system=system), len(nodes)
    else:
        rows = _ROWS[kind](tree, system=system)
        text, count = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), len(rows)
    if not count:
        raise UsageError(_NOTHING[kind], hint="/vote up marks a reply, /edit reply puts a better one in its place.")
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return count


def markdown(nodes: Sequence[Node], *, title: str = "", system: str = "") -> str:
    """`nodes` as a document, reasoning folded."""
    parts = [f"# {title or 'Chat'}"]
    if system:
        parts.append(f"> {system}".replace("\n", "\n> "))
    for node in nodes:
        parts.append(f"## {_SPEAKERS.get(node.role, node.role)}")
        if reasoning := node.meta.get("reasoning"):
            parts.append(f"<details><summary>Reasoning</summary>\n\n{reasoning}\n\n</details>")
        if node.content:
            parts.append(node.content)
        if calls := node.meta.get("fields", {}).get("tool_calls"):
            parts.append(f"```json\n{json.dumps(calls, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def chat_rows(tree: Tree, *, system: str = "") -> list[dict[str, Any]]:
    """The current branch up to its last reply, as one row; none without a reply."""
    path = tree.path()
    while path and path[-1].role != "assistant":
        path.pop()
    return [_row(path, system)] if path else []


def voted_rows(tree: Tree, *, system: str = "") -> list[dict[str, Any]]:
    """A row for each reply that was voted up or written by hand: what led to it, and the reply. Only it is learned."""
    rows = []
    for node in _replies(tree):
        if _is_preferred(node):
            row = _row(tree.path(node.id), system)
            for message in row["messages"][:-1]:
                if message["role"] == "assistant":
                    message["weight"] = 0
            rows.append(row)
    return rows


def preference_pairs(tree: Tree, *, system: str = "") -> list[dict[str, Any]]:
    """Each preferred reply against each one beside it that was voted down, or that it was edited from."""
    return [
        {
            "prompt": _row(tree.path(chosen.id)[:-1], system)["messages"],
            "chosen": [_message(chosen)],
            "rejected": [_message(rejected)],
        }
        for chosen in _replies(tree)
        if _is_preferred(chosen)
        for rejected in tree.siblings(chosen.id)
        if rejected.id != chosen.id and rejected.content != chosen.content and _loses(rejected, chosen)
    ]


def verdict_rows(tree: Tree, *, system: str = "") -> list[dict[str, Any]]:
    """A row for each reply that was voted on or edited: what led to it, the reply, and whether it is wanted."""
    replaced = {node.meta.get("edited_from") for node in _replies(tree)}
    rows = []
    for node in _replies(tree):
        good = _is_preferred(node)
        if good or node.meta.get("vote") == "down" or (node.id in replaced and not node.meta.get("vote")):
            rows.append({**_row(tree.path(node.id), system), "label": good})
    return rows


def _replies(tree: Tree) -> Iterator[Node]:
    return (node for node in tree.nodes.values() if node.role == "assistant" and node.content.strip())


def _is_preferred(node: Node) -> bool:
    return bool(node.meta.get("vote", "up" if "edited_from" in node.meta else "") == "up")


def _loses(node: Node, against: Node) -> bool:
    voted_down = node.meta.get("vote") == "down"
    return node.role == "assistant" and (voted_down or against.meta.get("edited_from") == node.id)


def _row(path: Sequence[Node], system: str) -> dict[str, Any]:
    start = [{"role": "system", "content": system}] if system else []
    return {"messages": [*start, *(_message(node) for node in path)]}


def _message(node: Node) -> dict[str, Any]:
    return {"role": node.role, "content": node.content, **node.meta.get("fields", {})}


_ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "jsonl": chat_rows,
    "rows": voted_rows,
    "pairs": preference_pairs,
    "verdicts": verdict_rows,
}

_NOTHING: dict[str, str] = {
    "markdown": "Nothing was said yet.",
    "jsonl": "There is no reply yet.",
    "rows": "No reply was voted up or edited yet.",
    "pairs": "No reply was preferred to another one yet.",
    "verdicts": "No reply was voted on or edited yet.",
}
