"""A Hugging Face tokenizer → GGUF's `tokenizer.*` metadata, by the kind of tokenizer it is.

What is written is the tokenizer as transformers 5 loads it. Kinds that llama.cpp would read otherwise are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.vocab.bpe import read_byte_level
from converters.vocab.engine_keys import engine_keys
from converters.vocab.files import TokenizerFiles
from converters.vocab.huggingface import HUGGINGFACE_KEY, huggingface_json, lower_cased
from converters.vocab.loaded import is_byte_level, load_tokenizer
from converters.vocab.sentencepiece import read_sentencepiece_bpe
from converters.vocab.special import read_special
from converters.vocab.tokens import TokenType
from converters.vocab.unigram import read_unigram
from converters.vocab.wordpiece import read_wordpiece
from converters.writer import Value

_TOKENS = "tokenizer.ggml.tokens"
_MATCHED_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_PHI3_NAME = re.compile(r"(phi)-?(3)", re.IGNORECASE)
_PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def read_vocabulary(
    model_dir: Path, vocab_size: int, *, original: bool = False, lower_case: bool = False
) -> dict[str, Value]:
    """The `tokenizer.*` metadata of `model_dir`, with as many tokens as the embedding has rows.

    `original` adds the tokenizer itself (see `huggingface`), and what llama.cpp would read otherwise is then no reason
    to refuse it; `lower_case` makes that tokenizer lower-case texts first. Raises `CorruptCheckpoint` for broken or
    missing files, `UnsupportedModel` for what llama.cpp would read otherwise.
    """
    files = TokenizerFiles(model_dir)
    files.tokenizer = load_tokenizer(files)
    if lower_case:
        files.tokenizer["normalizer"] = lower_cased(files.tokenizer.get("normalizer"))
    keys = _read(files, vocab_size, exact=not original)
    texts = keys[_TOKENS]
    assert isinstance(texts, list)
    ids = {str(text): number for number, text in enumerate(texts)}
    keys |= read_special(files, keys, ids)
    keys |= engine_keys(files, keys)
    return {**keys, HUGGINGFACE_KEY: huggingface_json(files, vocab_size)} if original else keys


def _read(files: TokenizerFiles, vocab_size: int, *, exact: bool) -> dict[str, Value]:
    readers = {"Unigram": read_unigram, "WordPiece": read_wordpiece}
    if not exact and (read := readers.get(_kind(files.tokenizer["model"]))):
        return read(files, vocab_size)
    if is_byte_level(files.tokenizer):
        return read_byte_level(files, vocab_size, exact=exact)
    return read_sentencepiece_bpe(files, vocab_size)


def _kind(model: Mapping[str, Any]) -> str:
    """The kind of vocabulary, which files of the first years do not name."""
    if kind := model.get("type"):
        return str(kind)
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece"


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
