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
        return [
            self._layout.join(first, second, max_tokens) for first, second in zip(bare[::2], bare[1::2], strict=True)
        ]

    @cached_property
    def _layout(self) -> _PairLayout:
        sample = self._backend.encode("a", "a")
        return _PairLayout.of(sample.ids, sample.type_ids, sample.sequence_ids)


@dataclass(frozen=True)
class _PairLayout:
    """The tokens around two texts, and the types of everything."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[list[int], int, list[int], int, list[int]]
    """Of the tokens before, of the first text, of the tokens between, of the second text, of those after."""

    @classmethod
    def of(cls, ids: Sequence[int], types: Sequence[int], sides: Sequence[int | None]) -> _PairLayout:
        """Read from the ids of a pair; `sides` tells which text each is of, None for the tokens around them."""
        first = [at for at, side in enumerate(sides) if side == 0]
        second = [at for at, side in enumerate(sides) if side == 1]
        parts = (slice(0, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, len(ids)))
        before, between, after = (list(ids[part]) for part in parts)
        kinds = [list(types[part]) for part in parts]
        return cls(before, between, after, (kinds[0], types[first[0]], kinds[1], types[second[0]], kinds[2]))

    def join(self, first: Sequence[int], second: Sequence[int], max_tokens: int) -> Tokens:
        """The pair, the longer text cut first."""
        around = len(self.before) + len(self.between) + len(self.after)
        left, right = _lengths(len(first), len(second), max(0, max_tokens - around))
        is_cut = (left, right) != (len(first), len(second))
        ids = [*self.before, *first[:left], *self.between, *second[:right], *self.after]
        before, of_first, between, of_second, after = self.types
        types = [*before, *[of_first] * left, *between, *[of_second] * right, *after]
        return Tokens([Encoded(ids, types if any(types) else ())], is_cut)


class LlamaEncoderTokenizer:
    """llama.cpp's own tokenizer, which puts the tokens around a text that the file asks for."""

    def __init__(self, tokenizer: GgufTokenizer) -> None:
        self._tokenizer = tokenizer
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
        types = ([0] * len(before), 0, [0] * len(after), 1, [1] * len(after))
        return _PairLayout(before, after, after, types).join(self._bare(first), self._bare(second), max_tokens)

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False)


def _lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """What is left of two texts of these lengths in `room` tokens, as Hugging Face's "longest_first" cuts them."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if first > second else (shorter, longer)


def _encoded(part: Any) -> Encoded:
    types = part.type_ids
    return Encoded(part.ids, types if any(types) else ())
