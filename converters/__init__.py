"""Converts Hugging Face checkpoints and PEFT adapters to GGUF, exactly or not at all; numpy only, no torch.

    convert_base      a base model, with an adapter merged into it if asked
    convert_adapter   a PEFT LoRA adapter

Everything else in the package serves these two. Importing it is cheap: the work is imported when it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.errors import ConverterError, CorruptCheckpoint, UnsupportedAdapter, UnsupportedModel

if TYPE_CHECKING:
    from converters.adapter import convert_adapter
    from converters.convert import OnTensor, convert_base

__all__ = [
    "ConverterError",
    "CorruptCheckpoint",
    "OnTensor",
    "UnsupportedAdapter",
    "UnsupportedModel",
    "convert_adapter",
    "convert_base",
]

_HOMES = {
    "convert_base": "converters.convert",
    "OnTensor": "converters.convert",
    "convert_adapter": "converters.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
