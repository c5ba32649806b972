"""How much memory a context takes, estimated from the header, so that asking for too much is an error and not a crash.

llama.cpp touches its whole KV cache when it makes it: a context that does not fit gets the process killed.
"""

from __future__ import annotations

from edgetune.gguf_header import GgufHeader

BYTES_PER_VALUE = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
"""KV cache type → bytes a value takes."""

_FALLBACK_CONTEXT = 4096
_SMALLEST_CONTEXT = 512
_SHARE_OF_FREE = 0.25


def kv_bytes_per_token(header: GgufHeader, *, type_k: str = "f16", type_v: str = "f16") -> float:
    """Bytes of KV cache that one token of context takes, sliding windows not taken into account."""
    heads, width = header.number("attention.head_count") or 1, header.number("embedding_length") or 0
    key_width = header.number("attention.key_length") or width // heads
    value_width = header.number("attention.value_length") or width // heads
    per_head = key_width * BYTES_PER_VALUE[type_k] + value_width * BYTES_PER_VALUE[type_v]
    return _kv_heads(header, heads) * per_head


def choose_context(header: GgufHeader, bytes_per_token: float, free_bytes: int) -> int:
    """The context to use when none is asked for: the model's own, or what fits in a quarter of `free_bytes`."""
    trained = header.number("context_length") or _FALLBACK_CONTEXT
    fits = int(free_bytes * _SHARE_OF_FREE / max(bytes_per_token, 1)) // 256 * 256
    return min(trained, max(fits, _SMALLEST_CONTEXT))


def layers_that_fit(header: GgufHeader, kv_bytes: float, free_bytes: int) -> int:
    """How many layers, their KV cache of `kv_bytes` in all included, fit in `free_bytes` of GPU memory."""
    layers = header.number("block_count") or 0
    weights = [0] * layers
    other = 0
    for tensor in header.tensors:
        number = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else ""
        if number.isdigit() and int(number) < layers:
            weights[int(number)] += tensor.nbytes
        else:
            other += tensor.nbytes
    budget = free_bytes * 0.9
    if sum(weights) + other + kv_bytes <= budget:
        return layers + 1
    fitting = 0
    # llama.cpp offloads the last layers first, the head before them all.
    for size in reversed(weights):
        budget -= size + kv_bytes / max(layers, 1)
        if budget < 0:
            break
        fitting += 1
    return fitting


def _kv_heads(header: GgufHeader, heads: int) -> int:
    recorded = header.metadata.get(f"{header.architecture}.attention.head_count_kv", heads)
    if isinstance(recorded, list):
        return int(sum(float(count) for count in recorded))
    layers = header.number("block_count") or 1
    return layers * (int(recorded) if isinstance(recorded, int | float) else heads)
