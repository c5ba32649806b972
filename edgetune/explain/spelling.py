"""Tokens as text for people. One that is a part of a character has its bytes, and the one that ends it the character.

A byte that is no text by itself stands in a piece as a lone surrogate (Python's "surrogateescape", PEP 383), so that
nothing is lost on the way to a page: `segments` tells them apart, `named` writes them as vocabularies do, "<0xE2>".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

_BYTES = re.compile("[\udc80-\udcff]+")
_ESCAPED = "surrogateescape"
_UNKNOWN = frozenset({"[UNK]", "<unk>"})
"""What stands for a word that a vocabulary has no pieces for."""


class Tokenizer(Protocol):
    """A vocabulary that knows the bytes of its tokens."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of those that no text is made of."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for; nothing for a control token unless `special`."""


class Spelling:
    """The tokens of a vocabulary as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that no text is made of."""
        return without_unknown(self._tokenizer.control_tokens)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token's text."""
        return [self._tokenizer.piece(token, special=True).decode(errors=_ESCAPED) for token in ids]


def without_unknown(control_tokens: frozenset[str]) -> frozenset[str]:
    """`control_tokens` without the one for unknown words, which vocabularies count among them: it stands for text."""
    return control_tokens - _UNKNOWN


def completed(pieces: Sequence[str]) -> list[str]:
    """For each of the `pieces` of one text, the character that it ends and did not begin; else nothing."""
    found, begun = [], b""
    for piece in pieces:
        given = begun + piece.encode(errors=_ESCAPED)
        kept = next((cut for cut in (1, 2, 3) if _is_begun(given[-cut:])), 0)
        text = given[: len(given) - kept].decode(errors=_ESCAPED)
        found.append(text[0] if begun and text and not _BYTES.match(text) else "")
        begun = given[-kept:] if kept else b""
    return found


def segments(piece: str) -> Iterator[tuple[str, bool]]:
    """`piece` in parts: text, or bytes in hexadecimal ("E2 82"), and whether it is bytes."""
    at = 0
    for found in _BYTES.finditer(piece):
        if found.start() > at:
            yield piece[at : found.start()], False
        yield found.group().encode(errors=_ESCAPED).hex(" ").upper(), True
        at = found.end()
    if at < len(piece) or not piece:
        yield piece[at:], False


def named(piece: str) -> str:
    """`piece` with its bytes as vocabularies write them."""
    return _BYTES.sub(lambda found: "".join(f"<0x{ord(sign) - 0xDC00:02X}>" for sign in found.group()), piece)


def _is_begun(end: bytes) -> bool:
    """Whether `end` is the beginning of a character in UTF-8, and not all of it."""
    first = end[:1]
    length = 2 if b"\xc2" <= first <= b"\xdf" else 3 if b"\xe0" <= first <= b"\xef" else 4
    return b"\xc2" <= first <= b"\xf4" and len(end) < length and all(0x80 <= byte <= 0xBF for byte in end[1:])
