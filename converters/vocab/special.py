"""Special token ids, what is added around a text, where generation stops, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from converters.errors import CorruptCheckpoint
from converters.vocab.files import TokenizerFiles, token_text
from converters.writer import Value

_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # llama.cpp's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def read_special(files: TokenizerFiles, tokens: Mapping[str, int], size: int) -> dict[str, Value]:
    """The `tokenizer.ggml.*` keys beside the vocabulary itself; `tokens` maps texts to ids."""
    config = files.read_json("config.json")
    ids = {}
    for kind in _KEYS:
        text = token_text(files.config.get(f"{kind}_token"))
        number = tokens.get(text) if text is not None else None
        if number is None:
            number = _first(config.get(f"{kind}_token_id"))
        if number is not None and 0 <= number < size:
            ids[kind] = number
    keys: dict[str, Value] = {f"tokenizer.ggml.{_KEYS[kind]}": number for kind, number in ids.items()}
    if template := read_template(files):
        keys["tokenizer.chat_template"] = template
    return keys


def read_template(files: TokenizerFiles) -> str | None:
    """The default chat template, wherever the directory keeps it."""
    path = files.model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for values in (files.read_json("chat_template.json"), files.config):
        template = values.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template:
            return template
    return None


def _first(number: object) -> int | None:
    if isinstance(number, list):
        number = number[0] if number else None
    return number if isinstance(number, int) else None
