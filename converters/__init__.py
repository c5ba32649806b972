"""Converts Hugging Face checkpoints and PEFT adapters to GGUF, exactly or not at all; numpy only, no torch.

    convert_base      a base model, with an adapter merged into it if asked
    convert_adapter   a PEFT LoRA adapter
    locate_weights    where a checkpoint's weights lie in a GGUF file

Everything else in the package serves these two. Importing it is cheap: the work is imported when it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.errors import ConverterError, CorruptCheckpoint, UnsupportedAdapter, UnsupportedModel

if TYPE_CHECKING:
    from converters.adapter import convert_adapter
    from converters.adapter_head import TrainedHead
    from converters.base import find_family
    from converters.convert import OnTensor, convert_base
    from converters.layout import GgufModel, Piece, decoders, locate_weights

__all__ = [
    "ConverterError",
    "CorruptCheckpoint",
    "GgufModel",
    "OnTensor",
    "Piece",
    "TrainedHead",
    "UnsupportedAdapter",
    "UnsupportedModel",
    "convert_adapter",
    "convert_base",
    "decoders",
    "find_family",
    "locate_weights",
]

_HOMES = {
    "convert_base": "converters.convert",
    "OnTensor": "converters.convert",
    "TrainedHead": "converters.adapter_head",
    "convert_adapter": "converters.adapter",
    "find_family": "converters.base",
    "GgufModel": "converters.layout",
    "decoders": "converters.layout",
    "Piece": "converters.layout",
    "locate_weights": "converters.layout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
