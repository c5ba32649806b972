"""Attention within packed sequences, as transformers calls it in every layer.

What a layer asks for (causal, window, soft cap) is read here; a kernel of `packed_kernels` computes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.training.packed_kernels import Asked, Kernel, attend

if TYPE_CHECKING:
    import torch


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    kernel: Kernel,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, tokens, size) within each sequence; returns (1, tokens, heads, size).

    Takes ordinary masks and batches as well. Raises `ValueError` for what it does not compute (sinks, position biases).
    """
    import torch

    if unknown := [name for name in ("s_aux", "position_bias", "cache") if others.get(name) is not None]:
        raise ValueError(f"packed attention takes no {unknown[0]}")
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if softcap is None:
            plain: tuple[torch.Tensor, None] = _transformers_own()(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
            )
            return plain
        causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, others)
        asked = Asked(dropout, scaling, softcap)
        return attend(asked, query, key, value, attention_mask, causal=causal).transpose(1, 2).contiguous(), None
    if not _is_causal(module, others):
        raise ValueError("packed attention is causal")
    asked = Asked(dropout, scaling, softcap, sliding_window or _window(module))
    lengths = tuple(attention_mask.flatten().tolist())
    return kernel(query, key, value, lengths, asked), None


def _transformers_own() -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _is_causal(module: Any, others: dict[str, Any]) -> bool:
    given = others.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _window(module: Any) -> int | None:
    """The window of a layer that does not tell it to its attention, but whose config does."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or number is None or kinds[number] == "full_attention":
        return None
    if kinds[number] != "sliding_attention":
        raise ValueError(f"packed attention does not know {kinds[number]}")
    return int(config.sliding_window)  # type: ignore[union-attr]
