"""The SQLite file of all chats: opened when it is first needed, its tables made, its errors put in words.

Knows the schema and how a transaction goes, not what chats are; see `database`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune.errors import CorruptFileError, EdgetuneError, ResourceError

_VERSION = 1
_WAIT_S = 1.0
"""How long another program may hold the file before that is an error."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, title TEXT NOT NULL DEFAULT '', model TEXT NOT NULL DEFAULT '',
    fingerprint TEXT NOT NULL DEFAULT '', adapters TEXT NOT NULL DEFAULT '[]', system TEXT NOT NULL DEFAULT '',
    sampling TEXT NOT NULL DEFAULT '{}', head TEXT, created TEXT NOT NULL, updated TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS nodes (
    number INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    id TEXT NOT NULL, parent TEXT, role TEXT NOT NULL, content TEXT NOT NULL, created TEXT NOT NULL,
    ids BLOB NOT NULL, meta TEXT NOT NULL, in_index INTEGER NOT NULL DEFAULT 0, UNIQUE (session, id)
);
CREATE TABLE IF NOT EXISTS choices (
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE, node TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL, packed BLOB NOT NULL, PRIMARY KEY (session, node, start)
);
CREATE INDEX IF NOT EXISTS not_in_index ON nodes (in_index) WHERE in_index = 0;
"""
# Pieces of three characters find a word's middle, and words of languages that write no spaces.
_INDEX = "CREATE VIRTUAL TABLE words USING fts5 (content, tokenize = 'trigram')"


class SqliteFile:
    """One file. Any thread may use it."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path
        self.has_index = False
        """Whether this SQLite has full-text search; known from the first transaction on."""
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def was_replaced(self) -> bool:
        """Whether the file that is open was removed, or another one put in its place; then that is what is used next.

        SQLite would go on writing to what no longer has a name.
        """
        with self._lock:
            if self._connection is None or self._identity() == self._opened:
                return False
            self.close()
            return True

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing of what is done with the connection. Raises `EdgetuneError` for what goes wrong."""
        with self._lock:
            try:
                connection = self._open()
                with connection:
                    yield connection
            except sqlite3.Error as error:
                raise self._explained(error) from error
            except OSError as error:
                raise EdgetuneError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _identity(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # What people say to a model is theirs alone.
            self.path.touch(mode=0o600, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT_S, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._opened = connection, self._identity()
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        # A process that dies loses nothing; a machine that loses power may lose the last blocks, never the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise EdgetuneError(f"{self.path} was written by a newer edgetune.", hint="Update edgetune.")
        if version < _VERSION:
            with connection:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        self.has_index = self._find_index(connection)

    def _find_index(self, connection: sqlite3.Connection) -> bool:
        """Whether this SQLite has full-text search; makes its table where it is missing."""
        try:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone():
                connection.execute(_INDEX)
            connection.execute("SELECT 1 FROM words LIMIT 1")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "full" in str(error):
                raise
            return False
        return True

    def _explained(self, error: sqlite3.Error) -> EdgetuneError:
        text = str(error)
        if "full" in text:
            return ResourceError(f"The disk is full: {self.path} was not written.", hint="Free some space.")
        if "locked" in text or "busy" in text:
            return EdgetuneError(f"{self.path} is held by another program.", hint="Close it, or try again.")
        if isinstance(error, sqlite3.OperationalError):
            return EdgetuneError(f"{self.path} cannot be used: {text}.")
        hint = f"Move it away: mv {self.path} {self.path}.old"
        return CorruptFileError(f"{self.path} is damaged: {text}.", hint=hint)
