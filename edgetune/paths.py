"""Where edgetune keeps things, and how a file comes into being: whole or not at all.

Knows directories and files, nothing of what is in them. Creates nothing at import time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgetune.errors import ResourceError, UsageError

_MAKE_ROOM = "Free some space, or write elsewhere."


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
    A link stays one: what it leads to is replaced. A device or a pipe cannot be, and is yielded itself.
    """
    if _is_special(path):
        yield path
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = hidden_path(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        check_disk_space(path.parent, expected_bytes)
        yield partial
        _fsync(partial)
        partial.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it replaces `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    partial = hidden_path(path, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for child in partial.rglob("*"):
            if child.is_file():
                _fsync(child)
        old = hidden_path(path, "old")
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        _fsync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hidden_path(path: Path, state: str) -> Path:
    """Where this process keeps what is to become `path`, beside it; `state` ends the name, e.g. "partial".

    The name tells machine and process, so that `remove_leftovers` knows what nobody works on any more.
    """
    owner = f".{_node()}-{os.getpid()}."
    if owner in path.name:  # Hidden already: names have a limit.
        return path.with_name(f"{path.name}.{state}")
    return path.with_name(f".{path.name}{owner}{state}")


def remove_leftovers(directory: Path) -> None:
    """Remove hidden files and directories in `directory` whose process, on this machine, was killed at work."""
    for child in directory.glob(f".*.{_node()}-*"):
        owners = {int(number) for number in re.findall(rf"\.{_node()}-(\d+)\.", child.name)}
        # What an atomic replace of a directory had moved aside is the only copy when the process died in between.
        if not owners or child.name.endswith(".old") or any(_is_alive(owner) for owner in owners):
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # A path that is not UTF-8 has lone surrogates in Python; with a backslash they are what JSON calls them.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_replaceable(path: Path) -> None:
    """Raise `UsageError` when writing a GGUF to `path` would replace a file that is none, e.g. safetensors."""
    if _is_special(path):
        raise UsageError(f"{path} is a device or a pipe, which holds no GGUF file.", hint="Name an output file.")
    if path.suffix.lower() == ".gguf" or not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(4) not in (b"GGUF", b""):
            raise UsageError(f"{path} exists and is no GGUF file.", hint="Name another output file, ending in .gguf.")


def check_disk_space(directory: Path, needed_bytes: int) -> None:
    """Raise `ResourceError` when `directory`'s disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if needed_bytes > free:
        raise ResourceError(
            f"{directory} has {bytes_text(free)} free, {bytes_text(needed_bytes)} are needed.", hint=_MAKE_ROOM
        )


def bytes_text(count: float) -> str:
    """`count` bytes for people: "1.2 GB"."""
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} B"


def _is_special(path: Path) -> bool:
    """Whether there is something at `path` that is neither a file nor a directory."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _node() -> str:
    return re.sub("[^a-z0-9]", "", platform.node().lower())[:24] or "host"


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return True
    if sys.platform == "win32":
        import psutil

        return bool(psutil.pid_exists(process))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


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
        return ResourceError(f"The disk is full: {_shown(path)} was not written.", hint=_MAKE_ROOM)
    mine = {*path.parents, path, hidden_path(path, "partial")}
    if isinstance(error.filename, str) and Path(error.filename) in mine:
        return UsageError(
            f"{_shown(path)} cannot be written: {error.strerror}.", hint="Write elsewhere, to a directory of yours."
        )
    return error


def _shown(path: Path) -> Path:
    """`path` as its user knows it, also when it waits under a hidden name."""
    name, owner, _ = path.name.partition(f".{_node()}-{os.getpid()}.")
    return path.with_name(name.removeprefix(".")) if owner else path
