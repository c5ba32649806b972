"""KV states of chats on disk, one file a chat, together no larger than a limit; the engine reads and writes them."""

from __future__ import annotations

from pathlib import Path

_MOST_BYTES = 4_000_000_000
"""What all of them together may take; the oldest go first."""


class KvStates:
    """The files in one directory, which is made when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, session_id: str) -> Path:
        """Where the state of a chat is kept."""
        return self._directory / f"{session_id}.kv"

    def make_room(self, session_id: str, expected_bytes: int) -> bool:
        """Remove the oldest states until this chat's fits; False when it never will."""
        if expected_bytes > _MOST_BYTES:
            return False
        # What people say to a model is theirs alone.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = self.path(session_id)
        others = [(path.stat(), path) for path in self._directory.glob("*.kv") if path != mine]
        others.sort(key=lambda one: one[0].st_mtime)
        while others and expected_bytes + sum(stat.st_size for stat, _ in others) > _MOST_BYTES:
            others.pop(0)[1].unlink(missing_ok=True)
        return True

    def remove(self, session_id: str) -> None:
        """Forget the state of a chat."""
        self.path(session_id).unlink(missing_ok=True)
