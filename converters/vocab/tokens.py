"""The list of tokens with their types, as GGUF holds it: one text for each id, gaps filled."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.vocab.files import AddedToken

STOP_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
"""Texts of tokens at which llama.cpp stops, and which it takes for control tokens, whatever the file says."""


class TokenType(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenTable:
    """Texts and types of `size` ids; ids that nothing claims are unused padding."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.types: list[int] = [TokenType.UNUSED] * size
        self._texts: list[str | None] = [None] * size

    def add_vocabulary(self, vocabulary: Mapping[str, int]) -> None:
        """Add the model's own tokens. Raises `UnsupportedModel` when an id lies beyond the embedding."""
        texts, types, size = self._texts, self.types, self.size
        for text, number in vocabulary.items():
            if not 0 <= number < size:
                raise UnsupportedModel(
                    f"The tokenizer's token {text!r} has the id {number}, the model's vocab_size is {size}.",
                    hint="The tokenizer is not the one of these weights.",
                )
            if texts[number] is not None:
                raise CorruptCheckpoint(f"The tokenizer gives the id {number} to {texts[number]!r} and to {text!r}.")
            texts[number] = text
            types[number] = TokenType.NORMAL

    def add_token(self, token: AddedToken) -> None:
        """Add an added token; one that the embedding has no row for is left out, as the model could not read it."""
        if token.id >= self.size:
            return
        control = is_control(token)
        # llama.cpp matches user-defined tokens in the text as written.
        self._texts[token.id] = token.content if control else token.content.replace("▁", " ")
        self.types[token.id] = TokenType.CONTROL if control else TokenType.USER_DEFINED

    def texts(self) -> list[str]:
        """Every id's text, padding named after its id. Raises `CorruptCheckpoint` when two ids share a text."""
        texts = [f"[PAD{number}]" if text is None else text for number, text in enumerate(self._texts)]
        if len(set(texts)) != len(texts):
            seen: set[str] = set()
            twice = next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
            raise CorruptCheckpoint(f"The tokenizer has the token {twice!r} twice; llama.cpp takes each text once.")
        return texts


def is_control(token: AddedToken) -> bool:
    """Whether the GGUF holds the added token as one that is never made from what a person writes."""
    return token.special or looks_special(token.content) or token.content in STOP_TEXTS


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes `text` for a control token although nothing marks it as special."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )
