"""Byte-level BPE (GPT-2's kind) → tokens, types, merges and the name of the pre-tokenizer.

The tokens stay in GPT-2's byte alphabet, as llama.cpp expects; added tokens are plain text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.vocab.files import TokenizerFiles, normalizer_steps
from converters.vocab.matching import check_added_tokens
from converters.vocab.merges import merge_lines
from converters.vocab.pre_tokenizer import recognise
from converters.vocab.tokens import TokenTable
from converters.writer import Value

_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
"""llama.cpp knows none of them; our engine reads the form from the file (see `engine_keys`). Qwen's is NFC."""


def read_byte_level(files: TokenizerFiles, vocab_size: int, *, exact: bool = True) -> dict[str, Value]:
    """The `tokenizer.*` keys of a byte-level BPE, padded to `vocab_size` tokens.

    Raises `UnsupportedModel` for what llama.cpp would read otherwise; not so where that need not be `exact`.
    """
    tokenizer = files.tokenizer
    vocabulary, merges = bpe_parts(files, tokenizer["model"])
    if exact:
        _check_exact(files, vocabulary)
    table = TokenTable(vocab_size)
    table.add_vocabulary(vocabulary)
    for token in files.added_tokens.values():
        table.add_token(token)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognise(tokenizer) if exact else _nearest(tokenizer),
        "tokenizer.ggml.tokens": table.texts(),
        "tokenizer.ggml.token_type": np.asarray(table.types, dtype=np.int32),
        "tokenizer.ggml.merges": merge_lines(merges),
        "edgetune.tokenizer.prefix_space": "never",
    }


def _check_exact(files: TokenizerFiles, vocabulary: dict[str, int]) -> None:
    tokenizer, model = files.tokenizer, files.tokenizer["model"]
    check_model(model)
    check_normalizers(tokenizer, _UNICODE_FORMS)
    if model.get("unk_token") and not vocabulary.keys() >= _BYTE_LETTERS:
        raise UnsupportedModel(
            f"The vocabulary lacks some bytes, for which {model['unk_token']!r} stands; llama.cpp would drop them."
        )
    forms = [str(step["type"]) for step in normalizer_steps(tokenizer)]
    check_added_tokens(files.added_tokens.values(), normal_form="".join(forms[-1:]))


def _nearest(tokenizer: dict[str, Any]) -> str:
    try:
        return recognise(tokenizer)
    except UnsupportedModel:
        return "gpt-2"


def bpe_parts(files: TokenizerFiles, model: dict[str, Any]) -> tuple[dict[str, int], list[Any]]:
    """The vocabulary and the merges of a BPE. Raises `UnsupportedModel` for any other kind."""
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise UnsupportedModel(
            f"The tokenizer is of type {kind}; llama.cpp's exact equivalents are of type BPE.",
            hint="Models with a byte-level or SentencePiece BPE vocabulary are converted.",
        )
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise CorruptCheckpoint(f"{files.model_dir / 'tokenizer.json'} holds no BPE vocabulary and merges.")
    return vocabulary, merges


def check_model(model: dict[str, Any]) -> None:
    """Refuse settings of a BPE that llama.cpp does not have."""
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedModel(f"The tokenizer sets {key} to {model[key]!r}, which llama.cpp does not have.")


def check_normalizers(tokenizer: dict[str, Any], allowed: set[str]) -> None:
    """Refuse normalizers that change what llama.cpp would see."""
    for step in normalizer_steps(tokenizer):
        if step.get("type") not in allowed:
            raise UnsupportedModel(
                f"The tokenizer normalizes text with {step.get('type')}, which llama.cpp does not do.",
                hint="A file made from it would read some texts as other tokens.",
            )


def _byte_letters() -> frozenset[str]:
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = [byte for byte in range(256) if byte not in plain]
    return frozenset(chr(byte) for byte in plain) | {chr(256 + number) for number in range(len(shifted))}


_BYTE_LETTERS = _byte_letters()
