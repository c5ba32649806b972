"""How far llama.cpp's distributions may be from torch's, by the types of the file's tensors.

F32 and F16 files that stay below a fixed largest KL pass at once. Beyond it, and for coarser types, a fixed number
cannot be right: the same Q4_K_M costs a large model 0.01 nats and a tiny one 0.1. There the bound on the mean KL is
`MARGIN` times what noise of the type's own size does to this very model (see `torch_model`). Measured over eight
families and 24 types, right files reach 0.3 to 1.4 times that value.
"""

from __future__ import annotations

import re
from math import inf, prod, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgetune.gguf_header import GgufHeader
from edgetune.parity.torch_model import NoiseLevels

ROUNDING: dict[str, float] = {
    "F64": 0.0, "F32": 0.0, "F16": 0.0003, "BF16": 0.0018, "Q8_0": 0.0055, "Q6_K": 0.018, "Q5_K": 0.037, "Q5_1": 0.039,
    "Q5_0": 0.045, "Q4_K": 0.073, "IQ4_NL": 0.078, "IQ4_XS": 0.078, "Q4_1": 0.08, "Q4_0": 0.09, "MXFP4": 0.12,
    "NVFP4": 0.1, "Q3_K": 0.152, "IQ3_S": 0.167, "IQ3_XXS": 0.21, "Q2_K": 0.3, "IQ2_S": 0.3, "IQ2_XS": 0.34,
    "IQ2_XXS": 0.38, "Q2_0": 0.5, "TQ1_0": 0.5, "TQ2_0": 0.5, "IQ1_M": 0.5, "IQ1_S": 0.55, "Q1_0": 0.65,
}  # fmt: skip
"""Tensor type → relative root-mean-square error of rounding a weight matrix to it, measured on normal weights."""

_ACTIVATIONS = {"F64": 0.0, "F32": 0.0, "F16": 0.0002, "BF16": 0.0018}
_ACTIVATIONS_QUANTIZED = 0.006
"""llama.cpp rounds the other factor of a product as well: to the same type, or to 8 bits for the quantized ones."""

MARGIN = 4.0
"""Allowed mean KL, as a multiple of the noise's."""
LEAST_MARGIN = 1.6
"""The same where the noise is so large that little more is possible; above what any right file was seen to reach."""
DECISIVE = 0.5
"""A bound above this share of what unrelated distributions make decides nothing."""
FIXED_BOUNDS = {"F32": 1e-4, "F16": 1e-3}
"""Largest KL allowed at any position, in nats, where no tensor is coarser."""
MINIMUM = {False: 1e-4, True: 2e-2}
"""Least bound on the mean KL, without and with experts: there a rounding error can send a token to another expert."""

EFFECT = (0.7, 1.4)
"""Allowed size of an adapter's effect on a coarse base, as a multiple of PEFT's on a base with noise of that size."""

_LAYER = re.compile(r"((enc|dec)\.)?blk\.")

Logits = NDArray[np.float32]
Bounded = Literal["mean_kl", "max_kl"]


def coarsest_type(*headers: GgufHeader) -> str:
    """The matrix type with the largest rounding in the files."""
    types = {tensor.type for header in headers for tensor in header.tensors if len(tensor.shape) > 1}
    return max(types, key=lambda name: ROUNDING.get(name, 1.0), default="F32")


def fixed_bound(coarsest: str, *, is_moe: bool, torch_dtype: str) -> tuple[float, Bounded] | None:
    """The bound that needs no measurement, and on what; None for coarser types than F16, or torch in bfloat16."""
    if coarsest not in FIXED_BOUNDS or torch_dtype != "float32":
        return None
    return FIXED_BOUNDS[coarsest], "mean_kl" if is_moe else "max_kl"


def noise_levels(base: GgufHeader, lora: GgufHeader | None, *, torch_dtype: str) -> NoiseLevels:
    """The noise to add in torch for what the files' types and llama.cpp's arithmetic round away."""
    extra = ROUNDING["BF16"] if torch_dtype != "float32" else 0.0
    vocabulary = next((t.shape[-1] for t in base.tensors if t.name == "token_embd.weight"), 1 << 62)
    return NoiseLevels(
        layers=_level(base, extra, in_layers=True),
        vocabulary=_level(base, extra, in_layers=False),
        adapter=_level(lora, extra, in_layers=None) if lora else 0.0,
        vocabulary_size=vocabulary,
    )


def noise_bound(noise_kl: float, *, is_moe: bool, chance_kl: float = inf) -> tuple[float, Bounded]:
    """The bound on the mean KL when noise of the files' size makes a mean KL of `noise_kl`.

    `chance_kl` is what distributions that have nothing to do with each other make on this model. KL grows no further
    there, so that a multiple of a large noise would allow anything: the bound stays half way, on a logarithmic scale.
    """
    bound = min(MARGIN * noise_kl, max(LEAST_MARGIN * noise_kl, sqrt(noise_kl * chance_kl)))
    return max(bound, MINIMUM[is_moe]), "mean_kl"


def says_little(bound: float, chance_kl: float) -> bool:
    """Whether a file that has nothing to do with the model could stay within `bound`, or nearly."""
    return bound > DECISIVE * chance_kl


def _level(header: GgufHeader, extra: float, *, in_layers: bool | None) -> float:
    """Root mean square over the file's matrices, weighted by their size."""
    count, squares = 0, 0.0
    for tensor in header.tensors:
        if len(tensor.shape) < 2 or in_layers not in (None, _LAYER.match(tensor.name) is not None):
            continue
        rounding, activations = ROUNDING.get(tensor.type, 0.6), _ACTIVATIONS.get(tensor.type, _ACTIVATIONS_QUANTIZED)
        count += prod(tensor.shape)
        squares += prod(tensor.shape) * (rounding**2 + activations**2 + extra**2)
    return sqrt(squares / count) if count else 0.0
