"""`@path` in a message → the text of that file, with its name, in the message."""

from __future__ import annotations

import re
from pathlib import Path

from edgetune.errors import UsageError

_MOST_BYTES = 1_000_000
_MENTION = re.compile(r"(?<!\S)@(?:\"([^\"\n]+)\"|'([^'\n]+)'|(\S+))")
_TRAILING = ".,;:!?)]}"


def attach_files(text: str) -> str:
    """`text` with what its `@path`s name appended; the words themselves stay.

    An `@name` that names no file is left as it is: people and decorators are written so. Raises `UsageError` for a file
    that is no text, is too large or cannot be read, and for what is plainly a path (quoted, or from `/`, `./`, `~/`) of
    no file.
    """
    found = list(dict.fromkeys(path for match in _MENTION.finditer(text) if (path := _named(match))))
    return "\n\n".join([text, *(_block(path) for path in found)])


def path_start(text: str) -> str | None:
    """The unfinished `@path` at the end of `text`, for completion; None when there is none."""
    match = re.search(r"(?<!\S)@(\S*)$", text)
    return match[1] if match else None


def _named(match: re.Match[str]) -> Path | None:
    quoted = match[1] or match[2]
    for name in [quoted] if quoted else [match[3], match[3].rstrip(_TRAILING)]:
        path = Path(name).expanduser()
        if _is_file(path):
            return path
    name = quoted or match[3].rstrip(_TRAILING)
    if quoted or name.startswith(("/", "./", "../", "~/")):
        if Path(name).expanduser().is_dir():
            raise UsageError(f"{name} is a directory.", hint="Attach its files one by one.")
        raise UsageError(f"There is no file {name!r} to attach.", hint="Leave out the @ if no file is meant.")
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _block(path: Path) -> str:
    content = _read(path)
    longest = max((len(run) for run in re.findall(r"`{3,}", content)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{path}:\n{fence}{path.suffix.removeprefix('.')}\n{content.rstrip()}\n{fence}"


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise UsageError(
                f"{path} has {size / 1e6:.1f} MB; up to {_MOST_BYTES / 1e6:g} MB can be attached.",
                hint="Attach the part that matters.",
            )
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{path} is no text, so it cannot be attached.", hint="Convert it to a text file first.")
    return text.replace("\r\n", "\n")
