"""Every chat on this machine in one SQLite file, searchable, with its branches and what its replies were chosen from.

Written block by block while a reply runs, so that a process that dies loses no more than the last block. What goes
wrong (a full disk, a locked or damaged file) is an `EdgetuneError`; whoever records goes on without.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgetune.chat.kv_states import KvStates
from edgetune.chat.node_values import pack_choices, pack_ids, unpack_choices, unpack_ids
from edgetune.chat.sqlite_file import SqliteFile
from edgetune.chat.tree import Node, Tree
from edgetune.errors import CorruptFileError, UsageError
from edgetune.paths import home_dir

_TITLE_LENGTH = 60
# A title that a person gave stays.
_SAVE_SESSION = """
INSERT INTO sessions (id, title, model, fingerprint, adapters, system, sampling, head, created, updated)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    title = CASE title WHEN '' THEN excluded.title ELSE title END, model = excluded.model,
    fingerprint = excluded.fingerprint, adapters = excluded.adapters, system = excluded.system,
    sampling = excluded.sampling, head = excluded.head, updated = excluded.updated
"""
_SAVE_NODE = """
INSERT INTO nodes (session, id, parent, role, content, created, ids, meta)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (session, id) DO UPDATE SET
    content = excluded.content, ids = excluded.ids, meta = excluded.meta, in_index = 0
"""
_INDEXED_LENGTH = 3


@dataclass(frozen=True)
class SavedSession:
    """A chat in the database, without what was said."""

    id: str
    title: str = ""
    model: str = ""
    """Path of the base model."""
    fingerprint: str = ""
    """Of its weights; empty when the file has none."""
    adapters: tuple[Mapping[str, Any], ...] = ()
    """ "path" and "scale" of those applied last."""
    system: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters that differ from the defaults."""
    created: str = ""
    updated: str = ""
    messages: int = 0
    """How many there are, on all branches."""


@dataclass(frozen=True)
class Found:
    """A message that a search found."""

    session: SavedSession
    node: str
    excerpt: str
    """The message around the words looked for, on one line."""


class ChatDatabase:
    """The file of all chats; made when something is first written. Any thread may call it."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is `chats.sqlite` in the home unless given; nothing is opened yet."""
        self.path = path or home_dir() / "chats.sqlite"
        """Where it lies."""
        self.states = KvStates(self.path.parent / "chats" / "state")
        """The KV states of its chats."""
        self._file = SqliteFile(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def was_replaced(self) -> bool:
        """Whether the file was removed or replaced since it was used: what was in it has to be written anew."""
        return self._file.was_replaced()

    def save(self, session: SavedSession, nodes: Iterable[Node] = (), *, head: str | None) -> None:
        """Write `session` and those of its `nodes` that are new or changed, all or nothing."""
        now = _now()
        with self._file.transaction() as sql:
            values = (
                session.id,
                _storable(session.title),
                session.model,
                session.fingerprint,
                json.dumps(list(session.adapters)),
                _storable(session.system),
                json.dumps(dict(session.sampling)),
                head,
                session.created or now,
                now,
            )
            sql.execute(_SAVE_SESSION, values)
            for node in nodes:
                self._save_node(sql, session.id, node)

    def sessions(self, *, limit: int = -1) -> list[SavedSession]:
        """All chats, the one that was spoken in last first."""
        if not self.path.exists():
            return []
        with self._file.transaction() as sql:
            return [_session(row) for row in sql.execute(f"{_SELECT} ORDER BY updated DESC LIMIT ?", (limit,))]

    def find(self, key: str) -> SavedSession:
        """The chat with this id, beginning of an id, or title. Raises `UsageError` when there is none, or several."""
        everything = self.sessions()
        matching = [one for one in everything if key and one.title == key] or [
            one for one in everything if key and one.id.startswith(key)
        ]
        if len(matching) != 1:
            problem = f"Several chats go by {key!r}" if matching else f"There is no chat {key!r}"
            raise UsageError(f"{problem}.", hint="/sessions lists them; the first letters of the id are enough.")
        return matching[0]

    def load(self, session_id: str) -> Tree:
        """Everything said in a chat. Raises `UsageError` when there is none, `CorruptFileError` for a broken one."""
        with self._file.transaction() as sql:
            row = sql.execute("SELECT head FROM sessions WHERE id = ?", (session_id,)).fetchone()
            if row is None:
                raise UsageError(f"There is no chat {session_id!r}.", hint="/sessions lists them.")
            nodes = [_node(values) for values in sql.execute(_SELECT_NODES, (session_id,))]
            by_id = {node.id: node for node in nodes}
            for block in sql.execute("SELECT * FROM choices WHERE session = ? ORDER BY start", (session_id,)):
                if block["node"] in by_id:
                    by_id[block["node"]].choices += unpack_choices(block["packed"])
        try:
            return Tree(nodes, head=row["head"])
        except (UsageError, ValueError) as error:
            raise CorruptFileError(f"The chat {session_id} in {self.path} is incomplete: {error}") from error

    def rename(self, session_id: str, title: str) -> None:
        """Give a chat another title."""
        with self._file.transaction() as sql:
            sql.execute("UPDATE sessions SET title = ? WHERE id = ?", (_storable(title.strip()), session_id))

    def delete(self, session_id: str) -> None:
        """Remove a chat and its KV state."""
        with self._file.transaction() as sql:
            if self._file.has_index:
                sql.execute(
                    "DELETE FROM words WHERE rowid IN (SELECT number FROM nodes WHERE session = ?)", (session_id,)
                )
            sql.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
        self.states.remove(session_id)

    def search(self, words: str, *, limit: int = 50) -> list[Found]:
        """The messages that hold every one of `words`, newest first; case does not matter."""
        terms = words.split()
        if not terms or not self.path.exists():
            return []
        with self._file.transaction() as sql:
            where, values = self._condition(sql, terms)
            rows = sql.execute(
                f"SELECT id, session, content FROM nodes WHERE {where} ORDER BY created DESC LIMIT ?", (*values, limit)
            ).fetchall()
        by_id = {session.id: session for session in self.sessions()}
        return [
            Found(by_id[row["session"]], row["id"], _excerpt(row["content"], terms))
            for row in rows
            if row["session"] in by_id
        ]

    def _save_node(self, sql: sqlite3.Connection, session_id: str, node: Node) -> None:
        values = (
            session_id,
            node.id,
            node.parent,
            node.role,
            _storable(node.content),
            node.created,
            pack_ids(node.ids),
            json.dumps(node.meta),
        )
        sql.execute(_SAVE_NODE, values)
        if node.choices:
            # A reply's choices only grow, and are too many to be written anew with every block.
            key = (session_id, node.id)
            saved = sql.execute("SELECT max(stop) FROM choices WHERE session = ? AND node = ?", key).fetchone()[0] or 0
            if saved < len(node.choices):
                packed = pack_choices(node.choices[saved:])
                sql.execute("INSERT INTO choices VALUES (?, ?, ?, ?, ?)", (*key, saved, len(node.choices), packed))

    def _condition(self, sql: sqlite3.Connection, terms: Sequence[str]) -> tuple[str, list[str]]:
        """What a message's row has to fulfil, and the values in it."""
        if self._file.has_index and all(len(term) >= _INDEXED_LENGTH for term in terms):
            # Running replies change too often to be indexed while they run.
            sql.execute("DELETE FROM words WHERE rowid IN (SELECT number FROM nodes WHERE in_index = 0)")
            sql.execute("INSERT INTO words (rowid, content) SELECT number, content FROM nodes WHERE in_index = 0")
            sql.execute("UPDATE nodes SET in_index = 1 WHERE in_index = 0")
            quoted = " AND ".join('"' + term.replace('"', '""') + '"' for term in terms)
            return "number IN (SELECT rowid FROM words WHERE words MATCH ?)", [quoted]
        escaped = [term.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for term in terms]
        return " AND ".join(["content LIKE ? ESCAPE '\\'"] * len(terms)), [f"%{term}%" for term in escaped]


_SELECT = "SELECT *, (SELECT count(*) FROM nodes WHERE session = sessions.id) AS messages FROM sessions"
_SELECT_NODES = "SELECT * FROM nodes WHERE session = ? ORDER BY number"


def new_session_id() -> str:
    """An id that no other chat has."""
    return uuid.uuid4().hex


def title_of(text: str) -> str:
    """A chat's title from its first message."""
    line = " ".join(text.split())
    return line if len(line) <= _TITLE_LENGTH else line[: _TITLE_LENGTH - 1].rstrip() + "…"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _session(row: sqlite3.Row) -> SavedSession:
    return SavedSession(
        id=row["id"],
        title=row["title"],
        model=row["model"],
        fingerprint=row["fingerprint"],
        adapters=tuple(json.loads(row["adapters"])),
        system=row["system"],
        sampling=json.loads(row["sampling"]),
        created=row["created"],
        updated=row["updated"],
        messages=row["messages"],
    )


def _node(row: sqlite3.Row) -> Node:
    meta = json.loads(row["meta"])
    if row["ids"] and meta.get("finish_reason") is None:
        # Its process died while it ran.
        meta["finish_reason"] = "interrupted"
    return Node(
        role=row["role"],
        content=row["content"],
        parent=row["parent"],
        id=row["id"],
        created=row["created"],
        ids=unpack_ids(row["ids"]),
        meta=meta,
    )


def _storable(text: str) -> str:
    """Half a surrogate pair, which a terminal may paste, is no Unicode text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _excerpt(text: str, terms: Sequence[str], *, around: int = 40) -> str:
    line = " ".join(text.split())
    at = max(0, min((found for term in terms if (found := line.lower().find(term.lower())) >= 0), default=0) - around)
    piece = line[at : at + 2 * around + len(terms[0])]
    return ("…" if at else "") + piece.strip() + ("…" if at + len(piece) < len(line) else "")
