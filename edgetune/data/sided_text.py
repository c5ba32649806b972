"""Vocabularies with a side for sources and one for targets, with the methods that training asks a tokenizer for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.char_tokenizer import CharTokenizer
from edgetune.data.tokenizer import Whole, has_tokenizer
from edgetune.piece_tokenizer import PieceTokenizer, load_pieces


@dataclass(frozen=True)
class SidedText:
    """Texts as ids, sources and targets each in their own vocabulary."""

    sides: CharTokenizer | PieceTokenizer

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self.sides.eos_id

    @property
    def unk_id(self) -> int:
        """What stands for a character or piece that there is none of."""
        return self.sides.unk_id

    @property
    def control_ids(self) -> dict[str, int]:
        """Tokens that no text spells, and their ids."""
        return dict(self.sides.control_ids)

    @property
    def marks(self) -> dict[str, int]:
        """Target languages, by name, whose token stands in front of a source."""
        return dict(self.sides.marks)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a source."""
        return self.sides.encode(text, add_special=add_special)

    def encode_whole(self, first: str, second: str | None = None, *, max_length: int) -> Whole:
        """A source between what stands around every source."""
        assert second is None
        *before, after = self.sides.encode("")
        ids, room = self.sides.encode(first, add_special=False), max_length - len(before) - 1
        return _whole([*before, *ids[:room], after], cut=len(ids) > room)

    def encode_target(self, text: str, *, max_length: int) -> Whole:
        """A target and its end."""
        ids = self.sides.encode_target(text)
        return _whole([*ids[:-1][: max_length - 1], self.sides.eos_id], cut=len(ids) > max_length)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The target that `ids` spell."""
        return self.sides.decode(ids).decode()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as a target's piece."""
        return [self.sides.piece(index, special=True).decode(errors="replace") for index in ids]


def _whole(ids: list[int], *, cut: bool) -> Whole:
    return Whole(np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.int32), cut)


def load_sided(model_dir: Path) -> SidedText | None:
    """The vocabularies of a model that has one a side; None when it has an ordinary tokenizer, or none."""
    if pieces := load_pieces(model_dir):
        return SidedText(pieces)
    if has_tokenizer(model_dir):
        return None
    chars = CharTokenizer.from_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    return None if chars is None else SidedText(chars)
