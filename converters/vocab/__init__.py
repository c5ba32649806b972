"""A Hugging Face tokenizer → GGUF's `tokenizer.*` metadata, by the kind of tokenizer it is.

What is written is the tokenizer as transformers 5 loads it. Kinds that llama.cpp would read otherwise are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.vocab.bpe import read_byte_level
from converters.vocab.engine_keys import engine_keys
from converters.vocab.files import TokenizerFiles
from converters.vocab.loaded import is_byte_level, load_tokenizer
from converters.vocab.sentencepiece import read_sentencepiece_bpe
from converters.vocab.special import read_special
from converters.vocab.tokens import TokenType
from converters.writer import Value

_TOKENS = "tokenizer.ggml.tokens"
_MATCHED_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_PHI3_NAME = re.compile(r"(phi)-?(3)", re.IGNORECASE)
_PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def read_vocabulary(model_dir: Path, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of `model_dir`, with as many tokens as the embedding has rows.

    Raises `CorruptCheckpoint` for broken or missing files, `UnsupportedModel` for what llama.cpp would read otherwise.
    """
    files = TokenizerFiles(model_dir)
    files.tokenizer = load_tokenizer(files)
    read = read_byte_level if is_byte_level(files.tokenizer) else read_sentencepiece_bpe
    keys = read(files, vocab_size)
    texts = keys[_TOKENS]
    assert isinstance(texts, list)
    ids = {str(text): number for number, text in enumerate(texts)}
    keys |= read_special(files, keys, ids)
    return {**keys, **engine_keys(files, keys)}


def harmless_name(name: str, vocabulary: Mapping[str, Value]) -> str:
    """`name`, changed where llama.cpp would act on it: it takes "phi-3" or "phi3" in `general.name` for that tokenizer.

    It then lets control tokens swallow the white space after them, and cannot load a vocabulary without Phi-3's own.
    """
    if not _PHI3_NAME.search(name):
        return name
    texts = [str(text) for text in vocabulary[_TOKENS]]  # type: ignore[union-attr]
    kinds = np.asarray(vocabulary["tokenizer.ggml.token_type"])
    matched = {texts[number] for number in np.flatnonzero(np.isin(kinds, _MATCHED_TYPES))}
    stripping = {texts[int(number)] for number in vocabulary.get("edgetune.tokenizer.rstrip_tokens", [])}  # type: ignore[union-attr]
    if set(texts) >= _PHI3_TOKENS and stripping == (matched | {"</s>"}) - (_PHI3_TOKENS - {"</s>"}):
        return name
    return _PHI3_NAME.sub(r"\1 \2", name)
