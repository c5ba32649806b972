"""SentencePiece-style BPE over characters with a fallback to bytes (Llama 2, Phi-3, Gemma, Mistral) → GGUF.

llama.cpp's own kind for it ("llama") merges any two neighbours that make up a token, best score first; Hugging Face
merges listed pairs, lowest rank first. They agree when every way to put a token together is listed, one after the
other, and no control token can be put together. Vocabularies trained otherwise go to llama.cpp's BPE over
plain characters, which keeps to the list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import UnsupportedModel
from converters.vocab.bpe import bpe_parts, check_model, check_normalizers
from converters.vocab.files import TokenizerFiles, normalizer_steps, token_text
from converters.vocab.matching import check_added_tokens
from converters.vocab.merges import merge_pairs
from converters.vocab.proto import read_sentencepiece
from converters.vocab.tokens import TokenTable, TokenType
from converters.writer import Value

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter has them
_CHARACTER_BPE = "sarvam-moe"
"""llama.cpp's pre-tokenizer that leaves characters as they are and splits at line ends only."""


def read_sentencepiece_bpe(files: TokenizerFiles, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys of a BPE over characters, padded to `vocab_size` tokens. Raises `UnsupportedModel`."""
    tokenizer = files.tokenizer
    model = tokenizer["model"]
    vocabulary, merges = bpe_parts(files, model)
    check_model(model)
    check_normalizers(tokenizer, {"Prepend", "Replace"})
    prefix = _prefix_space(tokenizer)
    _check_bytes(model, vocabulary)
    _check_words(tokenizer, vocabulary, files)
    table = TokenTable(vocab_size)
    table.add_vocabulary(vocabulary)
    for text, number in vocabulary.items():
        if _BYTE.fullmatch(text):
            table.types[number] = TokenType.BYTE
        elif text == model.get("unk_token"):
            table.types[number] = TokenType.UNKNOWN
    check_added_tokens(files.added_tokens.values())
    for token in files.added_tokens.values():
        table.add_token(token)
        if not token.is_listed and token.content == token_text(files.config.get("unk_token")):
            table.types[token.id] = TokenType.UNKNOWN
    pairs = merge_pairs(merges)
    keys: dict[str, Value] = {
        "tokenizer.ggml.tokens": table.texts(),
        "tokenizer.ggml.token_type": np.asarray(table.types, dtype=np.int32),
        "edgetune.tokenizer.prefix_space": prefix,
    }
    matched = {token.content for token in files.added_tokens.values()}
    if _merges_are_complete(vocabulary, pairs, table, matched):
        scores = _scores(files, vocabulary, pairs, table)
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
        return keys if prefix != "never" else {**keys, "tokenizer.ggml.add_space_prefix": False}
    _check_character_bpe(vocabulary, prefix)
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _CHARACTER_BPE}
    return {**keys, "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs]}


def _prefix_space(tokenizer: dict[str, Any]) -> str:
    """When a space is put in front: "always" (of every piece of text), "where_missing" (the same, but for text that
    begins with one), "first" (of the whole) or "never"."""
    steps = normalizer_steps(tokenizer)
    replaced = any(_replaces_spaces(step) for step in steps)
    for step in steps:
        if step["type"] == "Replace" and not _replaces_spaces(step):
            raise UnsupportedModel(
                f"The tokenizer replaces {step.get('pattern')} in texts, which llama.cpp does not do."
            )
        if step["type"] == "Prepend" and step.get("prepend") != _SPACE:
            raise UnsupportedModel(
                f"The tokenizer puts {step.get('prepend')!r} before texts, which llama.cpp does not do."
            )
    stage = tokenizer.get("pre_tokenizer")
    if isinstance(stage, dict) and stage.get("type") == "Metaspace" and stage.get("replacement") == _SPACE:
        scheme = stage.get("prepend_scheme") or ("always" if stage.get("add_prefix_space", True) else "never")
        return "where_missing" if scheme == "always" else str(scheme)
    if stage is not None and not (replaced and _splits_at_spaces(stage)):
        raise UnsupportedModel(
            f"The tokenizer splits text with {stage.get('type')} before a vocabulary of characters; llama.cpp does not."
        )
    if not replaced:
        raise UnsupportedModel("The tokenizer leaves spaces as they are before a vocabulary over characters.")
    return "always" if any(step["type"] == "Prepend" for step in steps) else "never"


def _replaces_spaces(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE


def _splits_at_spaces(stage: Mapping[str, Any]) -> bool:
    """Gemma's way: it splits at spaces when none are left."""
    return stage.get("type") == "Split" and stage.get("pattern") == {"String": " "}


def _check_bytes(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing or not model.get("byte_fallback"):
        what = (
            f"lacks {len(missing)} of the 256 byte tokens" if missing else "does not fall back to bytes (byte_fallback)"
        )
        raise UnsupportedModel(f"The vocabulary {what}; llama.cpp spells unknown characters in bytes always.")


def _check_words(tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int], files: TokenizerFiles) -> None:
    """A Metaspace that splits into words keeps merges from crossing them; llama.cpp needs the vocabulary to."""
    stage = tokenizer.get("pre_tokenizer") or {}
    if stage.get("type") != "Metaspace" or not stage.get("split", True):
        return
    added = {token.content for token in files.added_tokens.values()}
    crossing = next((text for text in vocabulary if _SPACE in text[1:] and text not in added), None)
    if crossing is not None:
        raise UnsupportedModel(
            f"The tokenizer splits text into words, and its vocabulary has {crossing!r}; llama.cpp would join words."
        )


def _merges_are_complete(
    vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]], table: TokenTable, matched: set[str]
) -> bool:
    """Whether merging by the tokens' scores comes to the same as merging the listed pairs in order."""
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    for text, number in vocabulary.items():
        splits = sum(1 for at in range(1, len(text)) if text[:at] in vocabulary and text[at:] in vocabulary)
        if table.types[number] in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE) and splits:
            return False
        if text in matched:
            continue
        listed = ranks.get(text, [])
        if len(listed) != splits or (listed and listed[-1] - listed[0] + 1 != splits):
            return False
    return True


def _scores(
    files: TokenizerFiles, vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]], table: TokenTable
) -> NDArray[np.float32]:
    """Each token's score: tokenizer.model's own where it is of the same mind, else by the order of the merges."""
    scores = np.full(table.size, _PADDING_SCORE, dtype=np.float32)
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
    for text, number in vocabulary.items():
        scores[number] = -float(first.get(text, len(pairs)))
    own = _own_scores(files, vocabulary, first)
    if own is not None:
        scores[: len(own)] = own[: table.size]
    for number, token in files.added_tokens.items():
        if number < table.size and (token.is_listed or own is None):
            scores[number] = _ADDED_SCORE
    return scores


def _own_scores(
    files: TokenizerFiles, vocabulary: Mapping[str, int], first: Mapping[str, int]
) -> NDArray[np.float32] | None:
    if not files.has("tokenizer.model"):
        return None
    pieces = read_sentencepiece(files.model_dir / "tokenizer.model").pieces
    if any(vocabulary.get(piece.text, number) != number for number, piece in enumerate(pieces)):
        return None
    scores = np.asarray([piece.score for piece in pieces], dtype=np.float32)
    order = [
        scores[vocabulary[text]] for text in sorted(first, key=first.__getitem__) if vocabulary[text] < len(scores)
    ]
    return scores if np.all(np.diff(order) <= 0) else None


def _check_character_bpe(vocabulary: Mapping[str, int], prefix: str) -> None:
    if prefix == "always":
        raise UnsupportedModel(
            "The tokenizer puts a space before every piece of text, and its merges are not the full list that "
            "llama.cpp's SentencePiece kind supposes."
        )
    mixed = next((text for text in vocabulary if "\n" in text and text.strip("\n")), None)
    if mixed is not None:
        raise UnsupportedModel(
            f"The vocabulary has {mixed!r}, which reaches over a line's end; llama.cpp splits there."
        )
