"""Texts and pairs of texts → token ids and types for encoders, cut or split where they are too long for the model.

Ids are Hugging Face's own where the file carries its tokenizer.json; other files are tokenized by llama.cpp. Text is
text: it never becomes a control token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.text_pairs import JoinedPair, PairLayout

Text = str | tuple[str, str]
"""A text, or two that belong together."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder takes in one go."""

    ids: Sequence[int]
    types: Sequence[int] = ()
    """Which of two texts each token is of; empty where all are of the first."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokens:
    """A text as an encoder can take it."""

    windows: Sequence[Encoded]
    """The text from its start in pieces that fit; of a pair only one, with what was cut off both."""
    is_cut: bool
    """Whether the first window is not all of it."""


class EncoderTokenizer(Protocol):
    """Texts → ids."""

    def encode(self, texts: Sequence[Text], *, max_tokens: int) -> list[Tokens]:
        """Each text in windows of up to `max_tokens` ids."""

    def close(self) -> None:
        """Free what it holds."""


class JsonEncoderTokenizer:
    """The `tokenizers` library on the text of a tokenizer.json."""

    def __init__(self, source: str) -> None:
        """Raises `CorruptFileError` when `source` cannot be read."""
        from edgetune.engine.json_tokenizer import load_backend

        self._backend = load_backend(source)

    def encode(self, texts: Sequence[Text], *, max_tokens: int) -> list[Tokens]:
        """Each text in windows of up to `max_tokens` ids."""
        singles = iter(self._split([text for text in texts if isinstance(text, str)], max_tokens))
        pairs = iter(self._join([text for text in texts if not isinstance(text, str)], max_tokens))
        return [next(singles) if isinstance(text, str) else next(pairs) for text in texts]

    def close(self) -> None:
        """Free what it holds."""

    def _split(self, texts: list[str], max_tokens: int) -> list[Tokens]:
        self._backend.enable_truncation(max_tokens)
        wholes = self._backend.encode_batch(texts)
        self._backend.no_truncation()
        return [
            Tokens([_encoded(part) for part in (whole, *whole.overflowing)], bool(whole.overflowing))
            for whole in wholes
        ]

    def _join(self, pairs: list[tuple[str, str]], max_tokens: int) -> list[Tokens]:
        # The library's own truncation of a pair keeps every combination of what it cuts off either side.
        flat = [text for pair in pairs for text in pair]
        bare = [part.ids for part in self._backend.encode_batch(flat, add_special_tokens=False)]
        parts = zip(bare[::2], bare[1::2], strict=True)
        return [_joined(self._layout.join(first, second, max_tokens)) for first, second in parts]

    @cached_property
    def _layout(self) -> PairLayout:
        sample = self._backend.encode("a", "a")
        return PairLayout.of(sample.ids, sample.type_ids, sample.sequence_ids)


class LlamaEncoderTokenizer:
    """llama.cpp's own tokenizer, which puts the tokens around a text that the file asks for."""

    def __init__(self, tokenizer: GgufTokenizer, *, is_encoder: bool = True) -> None:
        self._tokenizer, self._is_encoder = tokenizer, is_encoder
        around = tokenizer.encode("a")
        bare = tokenizer.encode("a", add_special=False)
        begin = next((at for at in range(len(around)) if around[at : at + len(bare)] == bare), 0)
        self._before, self._after = around[:begin], around[begin + len(bare) :]

    def encode(self, texts: Sequence[Text], *, max_tokens: int) -> list[Tokens]:
        """Each text in windows of up to `max_tokens` ids."""
        return [
            self._split(text, max_tokens) if isinstance(text, str) else self._join(*text, max_tokens) for text in texts
        ]

    def close(self) -> None:
        """Free the vocabulary."""
        self._tokenizer.close()

    def _split(self, text: str, max_tokens: int) -> Tokens:
        ids = self._bare(text)
        room = max(1, max_tokens - len(self._before) - len(self._after))
        starts = range(0, max(len(ids), 1), room)
        windows = [Encoded([*self._before, *ids[start : start + room], *self._after]) for start in starts]
        return Tokens(windows, is_cut=len(windows) > 1)

    def _join(self, first: str, second: str, max_tokens: int) -> Tokens:
        before, after = self._before, self._after
        # Encoders end each text with what ends one; decoders begin each one anew.
        between = after if self._is_encoder else [*after, *before]
        types = ([0] * len(before), 0, [0] * len(between), 1, [1] * len(after))
        layout = PairLayout(before, between, after, types)
        return _joined(layout.join(self._bare(first), self._bare(second), max_tokens))

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False)


def _joined(pair: JoinedPair) -> Tokens:
    return Tokens([Encoded(pair.ids, pair.types if any(pair.types) else ())], pair.is_cut)


def _encoded(part: Any) -> Encoded:
    types = part.type_ids
    return Encoded(part.ids, types if any(types) else ())
