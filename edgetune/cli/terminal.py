"""Text on a terminal: what a model or a file says cannot steer it, a reply is flushed at once, columns align."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

_STEERING = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}
_ESCAPED = {code: f"\\x{code:02x}" for code in _STEERING} | {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}


def plain(text: str) -> str:
    """`text`, which may come from a file's name or header, with its control characters written out."""
    return text.translate(_ESCAPED)


def valid_text(text: str) -> str:
    """`text` as it was typed, with U+FFFD for bytes that are not UTF-8, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_text(text: str) -> None:
    """Write a model's text to stdout; on a terminal, without the control characters that could steer it."""
    sys.stdout.write(text.translate(_STEERING) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin() -> str:
    """All of standard input as text, without the newline that ends it; bytes that are not UTF-8 become U+FFFD."""
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen; it is there for whoever reads next."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def is_full_screen() -> bool:
    """Whether there is a terminal all around that can show more than lines; a screen is drawn on stderr."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(stream.isatty() for stream in streams) and os.environ.get("TERM", "") not in ("", "dumb")


def say_dim(text: str) -> None:
    """One quiet line on stderr."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    click.secho(plain(text), err=True, dim=True if color else None)


def say_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Two aligned columns on stderr."""
    for line in aligned(rows, on_terminal=sys.stderr.isatty()):
        click.echo(f"  {line}", err=True)


def aligned(rows: Iterable[tuple[str, str]], *, on_terminal: bool) -> Iterator[str]:
    """Two columns; on a terminal the right one goes on under itself where it is too long."""
    rows = [(plain(left), plain(right)) for left, right in rows]
    left_width = max((len(left) for left, _ in rows), default=0)
    room = max(shutil.get_terminal_size().columns - left_width - 5, 20) if on_terminal else sys.maxsize
    for left, right in rows:
        lines = (
            [
                wrapped
                for line in right.split("\n")
                for wrapped in textwrap.wrap(line, room, break_on_hyphens=False, drop_whitespace=True) or [""]
            ]
            if on_terminal
            else right.split("\n")
        )
        for number, line in enumerate(lines):
            yield f"{left if number == 0 else '':<{left_width}}  {line}".rstrip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: int) -> Iterator[str]:
    """Lines of aligned columns, column `right` to the right; the last one is never cut, so that it can be copied."""
    cells = [list(header), *([plain(cell).replace("\n", "\\n") for cell in row] for row in rows)]
    widths = [max(map(_cells, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            " " * (width - _cells(cell)) + cell if at == right else cell + " " * (width - _cells(cell))
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def typed_path(path: Path) -> str:
    """`path` as short as it can be typed here: relative to the working directory when it lies below."""
    text = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    return f"./{text}" if text.startswith("-") else text


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
