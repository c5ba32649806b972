"""A tokenizer as tokenizer.json text inside the GGUF, for models whose texts llama.cpp's tokenizer may read otherwise.

llama.cpp leaves the key alone; edgetune's engines for encoders and encoder-decoders tokenize from it with the
`tokenizers` library, so that their ids are Hugging Face's own.
"""

from __future__ import annotations

import json
from typing import Any

from converters.vocab.files import AddedToken, TokenizerFiles

HUGGINGFACE_KEY = "tokenizer.huggingface.json"
"""GGUF metadata: tokenizer.json's content, as transformers has it in memory."""

_STAGES: dict[str, Any] = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}


def huggingface_json(files: TokenizerFiles, vocab_size: int) -> str:
    """The text of a tokenizer.json for `files.tokenizer` with every added token that the model has a row for."""
    added = [_entry(token) for token in files.added_tokens.values() if token.id < vocab_size]
    values = {"version": "1.0", **_STAGES, **files.tokenizer, "truncation": None, "padding": None}
    return json.dumps({**values, "added_tokens": added}, ensure_ascii=False, separators=(",", ":"))


def _entry(token: AddedToken) -> dict[str, Any]:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": token.id, "content": token.content, **flags}


def lower_cased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """`normalizer` with a step in front that lower-cases."""
    steps = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
    return {"type": "Sequence", "normalizers": steps}
