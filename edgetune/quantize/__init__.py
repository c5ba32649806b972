"""Quantizing a GGUF file with llama.cpp's own quantizer.

Takes a model file in F32, F16 or BF16 and writes another one; adapters are not quantized here. Makes no importance
matrix.
"""

from __future__ import annotations

from edgetune.quantize.quant_types import ALIASES, QUANT_TYPES, QuantType, find_quant_type
from edgetune.quantize.run import quantize

__all__ = ["ALIASES", "QUANT_TYPES", "QuantType", "find_quant_type", "quantize"]
