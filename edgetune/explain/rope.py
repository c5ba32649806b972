"""How fast rotary positions turn the numbers of queries and keys, from a GGUF header or from torch's own table.

A pair of numbers is turned by the position times its speed (Su et al., 2021). Scalings change the speeds: all alike
(linear), by factors in the file (Llama 3, LongRoPE), or the slow ones alone (YaRN, Peng et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetune.explain.page import Rope
from edgetune.gguf_header import GgufHeader
from edgetune.gguf_tensors import GgufTensors

_FASTEST, _SLOWEST = 32.0, 1.0
"""Turns within the trained context from which, and up to which, YaRN leaves a speed or divides it."""


def build_rope(speeds: Sequence[float], base: float, *, scaling: str, positions: int, window_base: float = 0.0) -> Rope:
    """What pairs that turn by `speeds` (radians a token) do in a text of so many tokens."""
    last = max(positions - 1, 0)
    return Rope(
        dimensions=2 * len(speeds),
        base=base,
        scaling=scaling,
        wavelengths=tuple(2 * math.pi / speed for speed in speeds),
        angles=tuple(math.degrees(speed * last) % 360 for speed in speeds),
        window_base=window_base if window_base != base else 0.0,
    )


def read_rope(header: GgufHeader, head_size: int, *, positions: int) -> Rope:
    """What llama.cpp does for the model with `header`, in a context that just holds a text of so many tokens."""
    dimensions = header.number("rope.dimension_count") or head_size
    base = _number(header, "freq_base", 10000.0)
    scaling = str(header.metadata.get(f"{header.architecture}.rope.scaling.type", "")).replace("none", "")
    factor = _number(header, "scaling.factor", 1.0)
    trained = _number(header, "scaling.original_context_length", float(header.number("context_length") or 0))
    speeds = [base ** (-2 * pair / dimensions) for pair in range(dimensions // 2)]
    name = "rope_factors_long.weight" if positions > trained else "rope_factors_short.weight"
    tensors = GgufTensors(header)
    for tensor in ("rope_freqs.weight", name):
        if tensor in tensors:
            scaling = scaling or "llama3"
            speeds = [speed / by for speed, by in zip(speeds, tensors.read(tensor).tolist(), strict=False)]
    if scaling == "linear":
        speeds = [speed / factor for speed in speeds]
    elif scaling == "yarn":
        speeds = [
            speed * (kept + (1 - kept) / factor)
            for speed, kept in zip(speeds, _kept_by_yarn(dimensions, base, trained), strict=True)
        ]
    window_base = _number(header, "freq_base_swa", 0.0)
    return build_rope(speeds, base, scaling=scaling, positions=positions, window_base=window_base)


def _kept_by_yarn(dimensions: int, base: float, trained: float) -> list[float]:
    """How much of each pair's speed YaRN leaves, 0 to 1; the rest is divided by the factor."""

    def pair_that_turns(times: float) -> float:
        return dimensions * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(pair_that_turns(_FASTEST)))
    high = min(dimensions - 1, math.ceil(pair_that_turns(_SLOWEST)))
    return [1 - min(1, max(0, (pair - low) / max(0.001, high - low))) for pair in range(dimensions // 2)]


def _number(header: GgufHeader, key: str, otherwise: float) -> float:
    value = header.metadata.get(f"{header.architecture}.rope.{key}")
    return float(value) if isinstance(value, int | float) else otherwise
