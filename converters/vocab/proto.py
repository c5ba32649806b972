"""Reads a SentencePiece model file (tokenizer.model): the pieces with scores and types, and the settings that matter.

A protobuf message read by hand: four kinds of field, no generated code, no library to import.
Format: sentencepiece_model.proto of github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import CorruptCheckpoint

_UNIGRAM = 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: int
    """SentencePiece's type, whose numbers llama.cpp shares."""

    @property
    def is_control(self) -> bool:
        return self.type == _CONTROL

    @property
    def is_user_defined(self) -> bool:
        return self.type == _USER_DEFINED


@dataclass
class SentencePieceModel:
    """What tokenizer.model holds."""

    path: Path
    pieces: list[Piece] = field(default_factory=list)
    is_unigram: bool = True
    byte_fallback: bool = False
    charsmap: bytes = b""
    """The table of characters that text is normalized by; empty when it is not."""
    unknown: str = "<unk>"

    @property
    def has_charsmap(self) -> bool:
        return bool(self.charsmap)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read `path`. Raises `CorruptCheckpoint` when it is not a SentencePiece model."""
    model = SentencePieceModel(path)
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 1:
                model.pieces.append(_read_piece(_bytes(value)))
            elif number == 2:
                settings = dict(_fields(_bytes(value)))
                model.is_unigram = settings.get(3, _UNIGRAM) == _UNIGRAM
                model.byte_fallback = bool(settings.get(35, 0))
                model.unknown = bytes(_bytes(settings.get(45, memoryview(b"<unk>")))).decode()
            elif number == 3:
                tables = [bytes(_bytes(table)) for key, table in _fields(_bytes(value)) if key == 2]
                model.charsmap = tables[-1] if tables else b""
    except (ValueError, IndexError, struct.error) as error:
        raise CorruptCheckpoint(f"{path} is not a SentencePiece model: {error}.", hint="Download it again.") from error
    if not model.pieces:
        raise CorruptCheckpoint(f"{path} holds no vocabulary.", hint="Download it again.")
    return model


def _read_piece(message: memoryview) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(message):
        if number == 1:
            text = bytes(_bytes(value)).decode()
        elif number == 2:
            score = struct.unpack("<f", _bytes(value))[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, its value: a whole number, or raw bytes) in order."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"an unknown kind of field ({kind})")
        if position + size > len(message):
            raise ValueError("it is cut short")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number too long")
