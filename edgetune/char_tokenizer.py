"""A vocabulary of single characters that stands in a model's config.json, one for the source and one for the target.

Some small sequence-to-sequence models (letters → phonemes) come without tokenizer files: `grapheme_chars` and
`phoneme_chars` list the characters, a character's place is its id, and the first places are kept for control tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

from edgetune.errors import CorruptFileError

SOURCE_KEY, TARGET_KEY = "grapheme_chars", "phoneme_chars"
_PLACEHOLDER = "_"


@dataclass(frozen=True)
class CharTokenizer:
    """Characters ↔ ids; what the vocabulary lacks is the unknown token."""

    source_chars: str
    target_chars: str
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CharTokenizer | None:
        """The vocabularies in a config.json; None when it has none. Raises `CorruptFileError` when they make no sense.

        The unknown token, which such a config does not name, is the last placeholder before the characters.
        """
        source, target = config.get(SOURCE_KEY), config.get(TARGET_KEY)
        if not isinstance(source, str) or not isinstance(target, str):
            return None
        reserved = len(source) - len(source.lstrip(_PLACEHOLDER))
        ids = [config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
        known = [index for index in ids if isinstance(index, int)]
        size = config.get("vocab_size", 0)
        if len(known) != 3 or reserved < 4 or len(target) > size or len(source) > size or max(known) >= reserved:
            raise CorruptFileError(
                f"The character vocabularies in config.json ({SOURCE_KEY}, {TARGET_KEY}) do not fit its token ids."
            )
        return cls(source, target, bos_id=known[0], eos_id=known[1], unk_id=reserved - 1, pad_id=known[2])

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a source text; `add_special` puts BOS before and EOS after it."""
        ids = [self._source_ids.get(character, self.unk_id) for character in text]
        return [self.bos_id, *ids, self.eos_id] if add_special else ids

    def encode_target(self, text: str) -> list[int]:
        """Ids of a target text as it is learned: without BOS, EOS at the end."""
        return [*(self._target_ids.get(character, self.unk_id) for character in text), self.eos_id]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The target text of `ids`; `special` writes control tokens as `piece` does."""
        return b"".join(self.piece(token, special=special) for token in ids)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The character that the target token stands for; nothing for a control token unless `special`."""
        if token < self._reserved or token >= len(self.target_chars):
            return f"<{token}>".encode() if special else b""
        return self.target_chars[token].encode()

    def source_piece(self, token: int) -> str:
        """The character that the source token stands for."""
        known = self._reserved <= token < len(self.source_chars)
        return self.source_chars[token] if known else f"<{token}>"

    def speller(self, *, after: int) -> Callable[[int], bytes]:
        """Spells the tokens of a text one by one, whatever they follow."""
        return self.piece

    @property
    def eog_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset({self.eos_id})

    @property
    def control_ids(self) -> dict[str, int]:
        """No text spells one."""
        return {}

    control_tokens: ClassVar[frozenset[str]] = frozenset()
    """None has a text."""
    marks: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """There are no languages."""

    @property
    def chat_template(self) -> None:
        """There is none."""
        return None

    @property
    def _reserved(self) -> int:
        return self.unk_id + 1

    @cached_property
    def _source_ids(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self.source_chars) if index >= self._reserved}

    @cached_property
    def _target_ids(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self.target_chars) if index >= self._reserved}
