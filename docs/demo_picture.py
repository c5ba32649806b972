"""Writes `docs/demo.svg`: what `make demo` shows in a terminal, recorded from a real run.

    python -m docs.demo_picture

Runs the demo on a pseudo-terminal, lets a terminal emulator follow its output, and draws what stands there at the end.
"""

from __future__ import annotations

import os
import pty
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

PICTURE = Path(__file__).with_name("demo.svg")
COLUMNS, ROWS = 116, 160


def main() -> None:
    """Run the demo and draw it."""
    screen = record([sys.executable, "-m", "models.demo"])
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for line in drawn(screen):
        console.print(line, soft_wrap=True)
    console.print(end="")
    PICTURE.write_text(console.export_svg(title="make demo"), encoding="utf-8")


def record(command: list[str]) -> pyte.Screen:
    """Run `command` on a terminal of `COLUMNS` × `ROWS`; returns the screen it leaves."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execv(command[0], command)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while data := _read(terminal):
        stream.feed(data)
    os.waitpid(child, 0)
    return screen


def drawn(screen: pyte.Screen) -> list[Text]:
    """The screen's lines with their colours, empty ones at the end left out."""
    lines = []
    for row in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            style = Style(color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold, italic=cell.italics)
            line.append(cell.data, style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    is_hex = len(name) == 6 and all(character in "0123456789abcdef" for character in name)
    return f"#{name}" if is_hex else name.replace("brown", "yellow").replace("bright", "bright_")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        # The other side was closed: the command has ended.
        return b""


if __name__ == "__main__":
    main()
