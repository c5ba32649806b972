"""Byte-level BPE (GPT-2's kind): tokenizer.json, or vocab.json with merges.txt → tokens, types, merges.

The tokens stay in GPT-2's byte alphabet, as llama.cpp expects; added tokens are plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.errors import CorruptCheckpoint
from converters.vocab.files import TokenizerFiles, require_plain
from converters.vocab.pre_tokenizer import recognise
from converters.vocab.tokens import TokenTable
from converters.writer import Value


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json describes a byte-level BPE."""
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        return False
    stages = [tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}]
    return any("ByteLevel" in _types(stage) for stage in stages)


def read_bpe(files: TokenizerFiles, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.ggml.*` keys of a byte-level BPE, padded to `vocab_size` tokens."""
    model = files.tokenizer.get("model") or {}
    vocabulary = model.get("vocab")
    merges = model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise CorruptCheckpoint(f"{files.model_dir / 'tokenizer.json'} holds no BPE vocabulary and merges.")
    table = TokenTable(vocab_size)
    table.add_vocabulary(vocabulary)
    for token in files.added_tokens.values():
        require_plain(token)
        table.add_token(token)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognise(files.tokenizer),
        "tokenizer.ggml.tokens": table.texts(),
        "tokenizer.ggml.token_type": np.asarray(table.types, dtype=np.int32),
        "tokenizer.ggml.merges": merge_lines(merges),
    }


def merge_lines(merges: list[Any]) -> list[str]:
    """Merges as "left right", from either spelling that tokenizer.json has."""
    if merges and isinstance(merges[0], str):
        return merges
    return [f"{left} {right}" for left, right in merges]


def _types(stage: Mapping[str, Any]) -> set[str]:
    parts = stage.get("pretokenizers") or stage.get("decoders") or [stage]
    return {str(part.get("type")) for part in parts}
