"""A Hugging Face tokenizer → GGUF's `tokenizer.*` metadata, by the kind of tokenizer it is."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UnsupportedModel
from converters.vocab.bpe import is_byte_level, read_bpe
from converters.vocab.engine_keys import engine_keys
from converters.vocab.files import TokenizerFiles
from converters.vocab.special import read_special
from converters.writer import Value


def read_vocabulary(model_dir: Path, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of `model_dir`, with as many tokens as the embedding has rows."""
    files = TokenizerFiles(model_dir)
    if not is_byte_level(files.tokenizer):
        raise UnsupportedModel("only byte-level BPE so far")
    keys = read_bpe(files, vocab_size)
    tokens = {text: number for number, text in enumerate(keys["tokenizer.ggml.tokens"])}  # type: ignore[arg-type]
    keys |= read_special(files, tokens, vocab_size)
    return {**keys, **engine_keys(files, keys)}
