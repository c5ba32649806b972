"""Rotary frequency scaling: what llama.cpp's metadata and tensors must say so that it rotates as transformers does.

llama.cpp multiplies cos and sin by `rope.scaling.attn_factor`, and under YaRN by 1 + 0.1·ln(factor) besides; it reads
no `beta_fast` and `beta_slow` in most graphs, so values other than the usual ones are refused there, or, where the
graph takes a tensor of frequency factors, written into that. Sources: transformers'
modeling_rope_utils.py; ggml's rope_yarn.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from converters.config import Rope
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.writer import Value

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""The tensors by which llama.cpp divides the frequencies: always, or by the context's length."""


def check_rope(rope: Rope, types: tuple[str, ...], *, partial: bool = False) -> None:
    """Raise `UnsupportedModel` unless the graph computes the scaling `rope` asks for; `types` are those it can."""
    if rope.type not in types:
        raise UnsupportedModel(
            f"config.json sets rope_type to {rope.type!r}, which llama.cpp's graph for this model does not compute.",
            hint=f"It computes {', '.join(one for one in types if one != FREQUENCIES)}.",
        )
    if not partial and rope.settings.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise UnsupportedModel(
            f"config.json sets partial_rotary_factor to {rope.settings['partial_rotary_factor']!r}; "
            "llama.cpp's graph for this model rotates whole heads.",
        )
    if rope.type == "yarn" and not is_plain_yarn(rope) and FREQUENCIES not in types:
        fields = {key: rope.settings[key] for key in ("beta_fast", "beta_slow", "truncate") if key in rope.settings}
        raise UnsupportedModel(
            f"config.json sets YaRN's {fields}; llama.cpp's graph for this model takes beta_fast 32, beta_slow 1 only."
        )


def is_plain_yarn(rope: Rope) -> bool:
    """Whether YaRN's ramp is the one llama.cpp computes by itself."""
    betas = rope.settings.get("beta_fast") or 32, rope.settings.get("beta_slow") or 1
    return betas == (32, 1) and rope.settings.get("truncate", True) is not False


def rope_metadata(rope: Rope, context: int) -> dict[str, Value]:
    """The `rope.*` keys of an architecture; `context` is the model's max_position_embeddings."""
    keys: dict[str, Value] = {"rope.freq_base": rope.theta}
    if rope.type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor")}
    elif rope.type == "yarn":
        keys |= _yarn_metadata(rope, context)
    elif rope.type == "longrope":
        keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original_context(rope, context),
            "rope.scaling.attn_factor": _longrope_attention(rope, context),
        }
    return keys


def rope_tensors(rope: Rope, dims: int, context: int) -> dict[str, NDArray[np.float32]]:
    """The tensors by which the graph divides the frequencies of `dims` rotated dimensions; none for most scalings."""
    if rope.type == "llama3":
        return {FREQUENCIES: _llama3_factors(rope, dims, context)}
    if rope.type == "yarn" and not is_plain_yarn(rope):
        return {FREQUENCIES: _yarn_factors(rope, dims, context)}
    if rope.type == "longrope":
        return {LONG: _listed_factors(rope, "long_factor", dims), SHORT: _listed_factors(rope, "short_factor", dims)}
    return {}


def original_context(rope: Rope, context: int) -> int:
    """The context the model was trained on before its frequencies were scaled."""
    return int(rope.number("original_max_position_embeddings", context))


def _yarn_metadata(rope: Rope, context: int) -> dict[str, Value]:
    attention = _yarn_attention(rope, context)
    if not is_plain_yarn(rope):
        return {"rope.scaling.attn_factor": attention}
    factor = _yarn_factor(rope, context)
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original_context(rope, context),
    }
    own = attention / _magnitude(factor)
    return keys if math.isclose(own, 1.0, rel_tol=1e-6) else {**keys, "rope.scaling.attn_factor": own}


def _yarn_factor(rope: Rope, context: int) -> float:
    return rope.number("factor", context / original_context(rope, context))


def _yarn_attention(rope: Rope, context: int) -> float:
    if rope.settings.get("attention_factor") is not None:
        return rope.number("attention_factor")
    factor = _yarn_factor(rope, context)
    scale, all_dim = rope.number("mscale", 0), rope.number("mscale_all_dim", 0)
    return _magnitude(factor, scale) / _magnitude(factor, all_dim) if scale and all_dim else _magnitude(factor)


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope_attention(rope: Rope, context: int) -> float:
    if rope.settings.get("attention_factor") is not None:
        return rope.number("attention_factor")
    original = original_context(rope, context)
    factor = rope.number("factor", context / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3_factors(rope: Rope, dims: int, context: int) -> NDArray[np.float32]:
    # In float32 throughout, as transformers and llama.cpp's converter compute it.
    factor, low, high = (np.float32(rope.number(key)) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    wavelengths = np.float32(2 * math.pi) / (np.float32(1) / np.float32(rope.theta) ** exponents)
    turns = np.float32(original_context(rope, context)) / wavelengths
    with np.errstate(divide="ignore", invalid="ignore"):
        smooth = (turns - low) / (high - low)
        between = np.float32(1) / ((np.float32(1) - smooth) / factor + smooth)
    factors = np.where(turns > high, np.float32(1), np.where(turns < low, factor, between))
    return np.asarray(factors, dtype=np.float32)


def _yarn_factors(rope: Rope, dims: int, context: int) -> NDArray[np.float32]:
    original, factor = original_context(rope, context), _yarn_factor(rope, context)

    def boundary(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = boundary(rope.settings.get("beta_fast") or 32), boundary(rope.settings.get("beta_slow") or 1)
    if rope.settings.get("truncate", True) is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    return np.asarray(1 / (ramp / factor + (1 - ramp)), dtype=np.float32)


def _listed_factors(rope: Rope, key: str, dims: int) -> NDArray[np.float32]:
    listed = rope.settings.get(key)
    if not isinstance(listed, list) or len(listed) != dims // 2:
        found = f"{len(listed)} values" if isinstance(listed, list) else repr(listed)
        raise CorruptCheckpoint(f"config.json gives the rotary {key} as {found}, not a list of {dims // 2} values.")
    return np.asarray(listed, dtype=np.float32)
