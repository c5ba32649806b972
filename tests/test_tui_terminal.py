"""The real thing in a real terminal: `edgetune chat` in tmux, typed at, stopped, resized, left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from textual.events import Key, Paste
from textual.message import Message

from edgetune.tui.terminal import PasteParser
from tests.ggufs import base_gguf

_PATIENCE_S = 90.0
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """A tmux server of our own with one window."""

    def __init__(self, socket: Path, command: str, environment: dict[str, str]) -> None:
        self._socket, self._environment = socket, environment
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", command)

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-f", os.devnull, "-S", str(self._socket), *arguments],
            env={**os.environ, **self._environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    def text(self) -> str:
        return self.tmux("capture-pane", "-p")

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def paste(self, content: bytes) -> None:
        (self._socket.with_suffix(".paste")).write_bytes(content)
        self.tmux("load-buffer", str(self._socket.with_suffix(".paste")))
        self.tmux("paste-buffer", "-p")
        self._socket.with_suffix(".paste").unlink()

    def until(self, holds: Callable[[str], bool]) -> str:
        """Wait until the screen's text `holds`."""
        end = time.monotonic() + _PATIENCE_S
        while not holds(text := self.text()):
            assert time.monotonic() < end, f"waited in vain; the terminal shows:\n{text}"
            time.sleep(0.1)
        return text

    def is_over(self) -> bool:
        return not self.tmux("list-sessions")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    # Large enough to be still speaking when the key that stops it comes.
    model = base_gguf(num_hidden_layers=12, intermediate_size=4096, max_position_embeddings=1024)
    home = tmp_path / "home"
    command = f"{sys.executable} -m edgetune chat {model} -t 1 --ignore-eos -n 900 2>&1; echo code $? > {tmp_path}/code"
    # Socket paths have to be short.
    socket = Path(f"/tmp/edgetune-{os.getpid()}.tmux")
    environment = {"EDGETUNE_HOME": str(home), "TERM": "xterm-256color"}
    one = Terminal(socket, f"cd {Path(__file__).resolve().parents[1]}; {command}", environment)
    yield one
    one.tmux("kill-server")
    socket.unlink(missing_ok=True)


@needs_tmux
@pytest.mark.slow
def test_a_chat_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until(lambda text: "Message, /command" in text)
    # A burst: the key that sends must not overtake what was typed before it.
    terminal.press("hello there", "Enter")
    terminal.until(lambda text: "tok/s" in text)
    assert "hello there" in terminal.text()
    terminal.press("Escape")
    terminal.until(lambda text: "stopped" in text)
    terminal.press("one", "M-Enter", "two")
    terminal.until(lambda text: "│ one" in text and "│ two" in text)
    terminal.press("C-c")
    terminal.press("C-t")
    terminal.press("C-s")
    terminal.until(lambda text: "temperature" in text and "of these" in text)
    terminal.tmux("resize-window", "-x", "20", "-y", "5")
    terminal.until(lambda text: len(text.splitlines()) <= 5)
    terminal.tmux("resize-window", "-x", "120", "-y", "30")
    terminal.until(lambda text: "Message, /command" in text and "hello there" in text)
    # A paste stays in the input, whatever is in it: no line of it is sent, no key in it pressed.
    terminal.paste(b"a \x1b[31mred\x1b[0m \x07line\nand \xff\xfe more\n")
    terminal.until(lambda text: "a ␛[31mred␛[0m ␇line" in text and "and �� more" in text)
    terminal.press("C-c")
    terminal.until(lambda text: "Message, /command" in text)
    raw = terminal.tmux("capture-pane", "-p", "-e")
    assert "\x1b[" in raw
    terminal.press("C-q")
    terminal.until(lambda text: terminal.is_over())
    assert (tmp_path / "code").read_text(encoding="utf-8") == "code 0\n"


PASTE = "\x1b[200~{}\x1b[201~"
READ = {
    "keys": ("ab\x1b[A", ["a", "b", "up"]),
    "plain": (PASTE.format("two\rlines"), ["<two\rlines>"]),
    "keys around it": (f"a{PASTE.format('b')}\x1b[B", ["a", "<b>", "down"]),
    "colours": (PASTE.format("\x1b[31mred\x1b[0m\rls\r"), ["<\x1b[31mred\x1b[0m\rls\r>"]),
    "control characters": (PASTE.format("\x07\x03\x1b\x1b"), ["<\x07\x03\x1b\x1b>"]),
    "a start in it": (PASTE.format("x\x1b[200~y"), ["<x\x1b[200~y>"]),
    "two": (PASTE.format("one") + PASTE.format("two"), ["<one>", "<two>"]),
    "function keys": ("\x1b[2~\x1b[20~", ["insert", "f9"]),
}


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 4096])
@pytest.mark.parametrize("name", READ)
def test_a_paste_is_one_thing_however_it_arrives(name: str, size: int) -> None:
    sent, wanted = READ[name]
    parser, heard = PasteParser(), list[str]()

    def note(events: Iterable[Message]) -> None:
        for event in events:
            assert isinstance(event, Paste | Key)
            heard.append(f"<{event.text}>" if isinstance(event, Paste) else event.key)

    for at in range(0, len(sent), size):
        note(parser.feed(sent[at : at + size]))
    note(parser.tick())
    assert heard == wanted
