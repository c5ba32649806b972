"""Text between a person and a model: what it says is flushed at once and cannot steer the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

_STEERING = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


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


def say_dim(text: str) -> None:
    """One quiet line on stderr."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    click.secho(text, err=True, dim=True if color else None)


def say_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Two aligned columns on stderr."""
    rows = list(rows)
    width = max((len(left) for left, _ in rows), default=0)
    for left, right in rows:
        click.echo(f"  {left:<{width}}  {right}".rstrip(), err=True)
