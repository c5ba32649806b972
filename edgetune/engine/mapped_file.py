"""A model's file under a running engine: what happens to it is noticed, and is an error instead of the process's end.

llama.cpp maps the weights, and reading a page that a shortened file or a vanished disk no longer has raises SIGBUS,
which ends a process. `survive_lost_pages` lets such pages be zeros instead; the engine then finds out by `is_lost` and
throws away what was computed from them. A file that was removed or replaced stays readable under its old name, as
long as it is mapped. Watches, and decides nothing: the engine does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.errors import CorruptFileError

_MAP_FIXED = 0x10
_FAULTS_IN_FLIGHT_S = 1.0
"""How long after pages were replaced another thread may still report that it missed one."""
_watched: list[MappedFile] = []
_handler: list[Any] = []


class MappedFile:
    """A file whose content must not change."""

    def __init__(self, path: Path) -> None:
        """Remember `path` as it is now; before anything of it is read."""
        self.path = path
        self.is_lost = False
        """Whether a page of it was missing when it was read."""
        self._file = path.open("rb")
        self._known = self._state()
        self._ranges: list[tuple[int, int, int]] = []

    def watch(self) -> None:
        """Look where it was mapped to; once that was done."""
        self._ranges = _mapped_ranges(self.path.resolve())
        _watched.append(self)

    def check(self) -> None:
        """Raise `CorruptFileError` when it is no longer what was opened."""
        if self.is_lost or self._state() != self._known:
            raise CorruptFileError(
                f"{self.path} was changed while it was in use, so this model cannot go on.",
                hint="What was said is kept. Put the right file in its place, and open it again.",
            )

    def close(self) -> None:
        """Watch no longer."""
        if self in _watched:
            _watched.remove(self)
        self._file.close()

    def replace_lost(self, *, all_of_it: bool) -> bool:
        """Put zeros where the file has ended meanwhile, or everywhere; False when there is nothing to replace."""
        if self.is_lost:
            return False
        end_of_file = 0 if all_of_it else self._state()[0]
        for start, end, offset in self._ranges:
            first = max(start, start + _page_up(end_of_file - offset))
            if first < end:
                _map_zeros(first, end - first)
                self.is_lost = True
        return self.is_lost

    def _state(self) -> tuple[int, int]:
        """(size, modification time); of nothing when its disk does not even tell those."""
        try:
            stat = os.fstat(self._file.fileno())
        except OSError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns


def survive_lost_pages(give_up: Callable[[], None]) -> None:
    """From now on, let a missing page of a watched file be zeros; `give_up` is called for one of anything else."""
    number = getattr(signal, "SIGBUS", None)
    if number is None or _handler:
        return
    replaced = [-_FAULTS_IN_FLIGHT_S]

    def on_fault(_: int) -> None:
        # A file that is as long as it was has lost its disk.
        found = [one for one in _watched if one.replace_lost(all_of_it=False)] or [
            one for one in _watched if one.replace_lost(all_of_it=True)
        ]
        if found:
            replaced[0] = time.monotonic()
        elif time.monotonic() - replaced[0] > _FAULTS_IN_FLIGHT_S:
            give_up()

    # Python's own handlers only run between two of its instructions, and the one that failed would be tried forever.
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _handler.append(kind(on_fault))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    libc.signal(int(number), _handler[0])


def _mapped_ranges(path: Path) -> list[tuple[int, int, int]]:
    """(start, end, offset in the file) of what this process has mapped of it; nothing where no system tells."""
    if sys.platform != "linux":
        return []
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == str(path):
                start, _, end = fields[0].partition("-")
                found.append((int(start, 16), int(end, 16), int(fields[2], 16)))
    return found


def _map_zeros(address: int, size: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)


def _page_up(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
