"""Where edgetune keeps things, and how a file comes into being: whole or not at all.

Knows directories and files, nothing of what is in them. Creates nothing at import time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune.errors import ResourceError


def home_dir() -> Path:
    """The user's data directory: `EDGETUNE_HOME` if set, else the platform's own place. Not created."""
    if chosen := os.environ.get("EDGETUNE_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edgetune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgetune"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edgetune"


def cache_dir() -> Path:
    """Where things live that can be made again: `cache/` in the home. Not created."""
    return home_dir() / "cache"


@contextmanager
def whole_file(path: Path, *, expected_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else remove it.

    `expected_bytes` is checked against the free space first; `ResourceError` if it does not fit or the disk fills up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(path.parent, expected_bytes)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield partial
        _fsync(partial)
        partial.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it replaces `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for child in partial.rglob("*"):
            if child.is_file():
                _fsync(child)
        old = path.parent / f".{path.name}.{os.getpid()}.old"
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        _fsync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_disk_space(directory: Path, needed_bytes: int) -> None:
    """Raise `ResourceError` when `directory`'s disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if needed_bytes > free:
        raise ResourceError(
            f"{directory} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed.",
            hint="Free some space, or write elsewhere with -o.",
        )


def _fsync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, path: Path) -> Exception:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"The disk is full: {path} was not written.", hint="Free some space, or write elsewhere with -o."
        )
    return error
