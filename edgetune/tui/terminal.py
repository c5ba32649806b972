"""What a terminal sends, as events: a paste is one thing, whatever is in it, and bytes that are no text end nothing.

Textual 8.2 reads an escape sequence inside a paste as keys, with what follows it: a coloured log would be sent line by
line, and its control characters obeyed. It also stops reading for good at a byte that is not UTF-8.
"""

from __future__ import annotations

import codecs
import os
import select
from collections.abc import Iterable

from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver
from textual.events import Paste
from textual.message import Message

_START, _END = "\x1b[200~", "\x1b[201~"
_WAIT_S, _AT_ONCE = 0.1, 4096
_SHORTEST_HELD = 2
"""Escape alone is a key that must not wait for more."""


class PasteParser(XTermParser):
    """Takes pastes out of what is read; the rest is Textual's."""

    def __init__(self, debug: bool = False) -> None:
        super().__init__(debug)
        self._pasted: str | None = None
        self._held = ""

    def feed(self, data: str) -> Iterable[Message]:
        """The events in `data`, which may begin and end anywhere; empty at the end of the input."""
        if not data:
            yield from super().feed(data)
            return
        data, self._held = self._held + data, ""
        while data:
            if self._pasted is None:
                keys, start, data = data.partition(_START)
                if start:
                    self._pasted = ""
                else:
                    keys, self._held = _split_start(keys)
                if keys:
                    yield from super().feed(keys)
            else:
                # The end may have come in two parts.
                self._pasted, end, data = (self._pasted + data).partition(_END)
                if end:
                    pasted, self._pasted = self._pasted, None
                    yield Paste(pasted.replace("\x00", ""))

    def tick(self) -> Iterable[Message]:
        """What was only the beginning of a paste as long as more could come."""
        if self._held:
            held, self._held = self._held, ""
            yield from super().feed(held)
        yield from super().tick()


class Terminal(LinuxDriver):
    """Textual's driver for terminals, but for how it reads."""

    def run_input_thread(self) -> None:
        """Hand on what is typed until the app ends."""
        parser = PasteParser(self._debug)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while not self.exit_event.is_set():
            is_there, _, _ = select.select([self.fileno], [], [], _WAIT_S)
            text = decoder.decode(os.read(self.fileno, _AT_ONCE)) if is_there else ""
            for event in parser.feed(text) if text else parser.tick():
                self.process_message(event)


def _split_start(keys: str) -> tuple[str, str]:
    """(keys, what may be the beginning of a paste's start)."""
    for length in range(len(_START) - 1, _SHORTEST_HELD - 1, -1):
        if keys.endswith(_START[:length]):
            return keys[:-length], keys[-length:]
    return keys, ""
