"""Text from models, files and the clipboard → text that a terminal cannot mistake for commands.

Everything that is shown and was not written in this package goes through `visible`. Nothing is hidden: what would steer
the terminal, or turn the direction of what follows, is written out.
"""

from __future__ import annotations

import unicodedata

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡"}
_KEPT = {ord("\n"): "\n", ord("\t"): "    "}
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_INVISIBLE = (0xFEFF, 0x2028, 0x2029, *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))
_TABLE: dict[int, str] = {
    **_PICTURES,
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*range(0xD800, 0xE000), *_BIDI)},
    **{code: f"\\u{code:04x}" for code in _INVISIBLE},
    **_KEPT,
}
_MARKS = {"\n": "↵", "\t": "⇥", " ": "␣"}


def visible(text: str) -> str:
    """`text` with its control characters written out; lines stay lines, a tab becomes four spaces."""
    return text if text.isascii() and text.isprintable() else text.replace("\r\n", "\n").translate(_TABLE)


def one_line(text: str, *, length: int = 0) -> str:
    """`visible` on one line, cut to `length` characters when that is not 0."""
    line = " ".join(visible(text).split())
    return line if not length or len(line) <= length else line[: length - 1].rstrip() + "…"


def token_text(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    if not text:
        return "∅"
    stripped = "".join(_MARKS.get(char, char) for char in text)
    shown = visible(stripped)
    # A combining mark alone would sit on whatever stands before it.
    return f"◌{shown}" if unicodedata.combining(shown[0]) else shown


def typed(text: str) -> str:
    """Pasted `text` as it may enter an input: control characters are written out there as well."""
    return visible(text.replace("\r\n", "\n").replace("\r", "\n"))
