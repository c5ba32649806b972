"""What was typed before, shared with the line mode: prompt_toolkit's history file, read and added to."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

_MOST = 1000
"""How many entries are walked through; older ones stay in the file."""


class History:
    """The entries, and where in them the user is."""

    def __init__(self, path: Path) -> None:
        """`path` may be missing, and need not be writable."""
        self._path = path
        self._entries = _read(path)
        self._at = len(self._entries)
        self._draft = ""

    def add(self, text: str) -> None:
        """Keep `text`, here and, where that works, in the file."""
        self._at = len(self._entries)
        if self._entries[-1:] != [text]:
            self._entries.append(text)
            lines = "".join(f"+{line}\n" for line in text.split("\n"))
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # As private as the chats themselves.
                self._path.touch(mode=0o600)
                with self._path.open("a", encoding="utf-8", errors="replace") as file:
                    file.write(f"\n# {datetime.now()}\n{lines}")
            except OSError:
                pass
        self._at = len(self._entries)

    def step(self, step: int, text: str) -> str | None:
        """The entry before or after the one that is shown; `text` is kept when it is the user's own. None at an end."""
        if not 0 <= self._at + step <= len(self._entries):
            return None
        if self._at == len(self._entries):
            self._draft = text
        self._at += step
        return self._draft if self._at == len(self._entries) else self._entries[self._at]


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    entries: list[list[str]] = []
    was_text = False
    for line in lines:
        if line.startswith("+"):
            if not was_text:
                entries.append([])
            entries[-1].append(line[1:])
        was_text = line.startswith("+")
    return ["\n".join(entry) for entry in entries[-_MOST:]]
