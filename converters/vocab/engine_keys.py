"""What GGUF has no key for and edgetune's engine needs to act as the original tokenizer; llama.cpp ignores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from converters.vocab.files import TokenizerFiles, token_text

NORMALIZER_KEY = "edgetune.tokenizer.normalizer"
"""The Unicode normal form a text is brought into first, e.g. "NFC"."""
SPECIAL_TOKENS_KEY = "edgetune.tokenizer.special_tokens"
"""The special tokens a chat template may name, as a JSON object; absent when the ids in the file say the same."""

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_WITHOUT_DEFAULTS = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)
"""Tokenizer classes that have no special token but those that the files name."""


def engine_keys(files: TokenizerFiles, keys: Mapping[str, Any]) -> dict[str, str]:
    """The extra metadata for a tokenizer whose ordinary metadata is `keys`."""
    return {**_normalizer(files.tokenizer), **_special_tokens(files, keys)}


def _normalizer(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    normalizer = tokenizer.get("normalizer") or {}
    stages = normalizer.get("normalizers") or [normalizer]
    forms = [stage["type"] for stage in stages if stage.get("type") in _FORMS]
    return {NORMALIZER_KEY: forms[-1]} if forms else {}


def _special_tokens(files: TokenizerFiles, keys: Mapping[str, Any]) -> dict[str, str]:
    # An id in config.json gives a GGUF its BOS although the tokenizer, and with it the chat template, knows of none.
    config = files.config
    only_named = config.get("tokenizer_class") in _WITHOUT_DEFAULTS
    named = {f"{kind}_token": token_text(config.get(f"{kind}_token")) for kind in _KINDS}
    recorded = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    unknown = [
        kind
        for kind in _KINDS
        if f"tokenizer.ggml.{recorded.get(kind, kind)}_token_id" in keys
        and named[f"{kind}_token"] is None
        and (only_named or f"{kind}_token" in config)
    ]
    if not unknown:
        return {}
    return {SPECIAL_TOKENS_KEY: json.dumps({name: text for name, text in named.items() if text is not None})}
