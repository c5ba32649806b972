"""A verdict on two replies → rows at the end of a training file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgetune.chat.exports import preference_pairs, voted_rows
from edgetune.chat.tree import Node, Tree
from edgetune.errors import UsageError
from edgetune.paths import whole_file

RowKind = Literal["pairs", "rows"]


def verdict_rows(tree: Tree, replies: Sequence[Node], *, kind: RowKind, system: str) -> list[dict[str, Any]]:
    """What can be learned of these replies to one question; empty when none is preferred."""
    if not replies:
        return []
    path = tree.path(replies[0].id)[:-1]
    alone = Tree([*path, *replies])
    if kind == "pairs":
        return preference_pairs(alone, system=system)
    texts = {reply.content for reply in replies}
    return [row for row in voted_rows(alone, system=system) if row["messages"][-1]["content"] in texts]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Add `rows` to the JSONL file at `path`, whole or not at all; returns how many were not in it yet.

    Raises `UsageError` when there is nothing to add, or the file is no text.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text, so no rows can be added.", hint="Name another file.") from None
    known = set(before.splitlines())
    fresh = [line for row in rows if (line := json.dumps(row, ensure_ascii=False)) not in known]
    if fresh:
        ending = "" if not before or before.endswith("\n") else "\n"
        with whole_file(path) as partial:
            partial.write_text(before + ending + "".join(f"{line}\n" for line in fresh), encoding="utf-8")
    return len(fresh)
