"""Which numbers in a file are a model's parameters: no buffers, and what two modules share once.

As transformers' `num_parameters` counts them, from names and shapes alone. Reads no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from edgetune.gguf_header import GgufHeader

_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|final_logits_bias|(original_)?inv_freq|attn\.masked_bias|attention\.masked_bias)$"
)
"""What old checkpoints hold beside their weights: it is computed, or zero."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""Of GPT-2 and GPT-NeoX, where it has four axes: who may look at whom."""
_GGUF_BUFFERS = re.compile(r"^rope_(freqs|factors_long|factors_short)\.weight$")

_TABLE = re.compile(r"(^|\.)shared\.weight$")
_SHARED = re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$")
"""In an encoder-decoder, other names of `_TABLE`."""
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|lm_head\.decoder|vocab_projector)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in|shared|tok_embeddings)\.weight$")
_HEAD_BIASES = re.compile(r"(^|\.)(cls\.predictions|lm_head)\.decoder\.bias$")
"""In a masked language model, the bias of the head by its second name."""


def checkpoint_parameters(tensors: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Counter[str]:
    """Data type → parameters, of the tensors in safetensors headers (name → "dtype" and "shape") and config.json."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if not _is_buffer(name, tensor["shape"]) and not _is_repeated(name, tensor, tensors, config):
            counts[str(tensor["dtype"])] += prod(tensor["shape"])
    return counts


def gguf_parameters(header: GgufHeader) -> Counter[str]:
    """Tensor type → parameters; a classifier's head, which travels as metadata, is F32."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        if not _GGUF_BUFFERS.match(tensor.name):
            counts[tensor.type] += prod(tensor.shape)
    if head := sum(_head_sizes(header)):
        counts["F32"] += head
    return counts


def _is_buffer(name: str, shape: list[int]) -> bool:
    return bool(_BUFFERS.search(name)) or (len(shape) == 4 and bool(_MASK.search(name)))


def _is_repeated(
    name: str, tensor: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> bool:
    """Whether another tensor is the same one by its first name."""
    if _HEAD_BIASES.search(name):
        return name.replace("decoder.", "") in tensors
    text = config.get("text_config")
    is_tied = {**(text if isinstance(text, dict) else {}), **config}.get("tie_word_embeddings")
    if _SHARED.search(name):
        # T5 always shares its table between both sides, whether or not with the head.
        first, asked = _TABLE, is_tied is not False or "t5" in str(config.get("model_type"))
    else:
        is_masked = any(part in name for part in ("predictions", "lm_head.decoder", "vocab_projector"))
        first, asked = _EMBEDDINGS, bool(_HEADS.search(name)) and (is_masked if is_tied is None else is_tied)
    return asked and any(first.search(one) and tensors[one]["shape"] == tensor["shape"] for one in tensors)


def _head_sizes(header: GgufHeader) -> Iterator[int]:
    """Numbers in each layer of a head that scores texts; what a sentence model has behind its pooling is no part."""
    if header.metadata.get("edgetune.task") not in ("classification", "multilabel", "regression"):
        return
    number = 0
    while (size := header.array_length(f"edgetune.head.{number}.weight")) is not None:
        yield size + (header.array_length(f"edgetune.head.{number}.bias") or 0)
        number += 1
