"""A vocabulary of characters (`edgetune.char_tokenizer`) with the methods that training asks a tokenizer for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.char_tokenizer import CharTokenizer
from edgetune.data.tokenizer import Whole, has_tokenizer


@dataclass(frozen=True)
class CharText:
    """Texts letter by letter, sources and targets each in their own vocabulary."""

    chars: CharTokenizer

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self.chars.eos_id

    @property
    def control_ids(self) -> dict[str, int]:
        """No text spells one."""
        return {}

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a source."""
        return self.chars.encode(text, add_special=add_special)

    def encode_whole(self, first: str, second: str | None = None, *, max_length: int) -> Whole:
        """A source between BOS and EOS."""
        assert second is None
        ids = self.chars.encode(first, add_special=False)
        kept = [self.chars.bos_id, *ids[: max_length - 2], self.chars.eos_id]
        return Whole(np.asarray(kept, dtype=np.int32), np.zeros(len(kept), dtype=np.int32), len(ids) > max_length - 2)

    def encode_target(self, text: str, *, max_length: int) -> Whole:
        """A target and EOS."""
        ids = self.chars.encode_target(text)
        kept = [*ids[:-1][: max_length - 1], self.chars.eos_id]
        return Whole(np.asarray(kept, dtype=np.int32), np.zeros(len(kept), dtype=np.int32), len(kept) < len(ids))

    def decode_text(self, ids: Sequence[int]) -> str:
        """The target that `ids` spell."""
        return self.chars.decode(ids).decode()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as a target's character."""
        return [self.chars.piece(index, special=True).decode() for index in ids]


def load_chars(model_dir: Path) -> CharText | None:
    """The vocabulary in config.json of a model without tokenizer files; None when it has the usual ones or neither."""
    if has_tokenizer(model_dir):
        return None
    chars = CharTokenizer.from_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    return None if chars is None else CharText(chars)
