"""A model's dimensions, from config.json or a GGUF header, and the memory it takes with texts of several lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.gguf_header import GgufHeader
from edgetune.text_limit import positions

_CONFIG_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "feed_forward_size": ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim", "ffn_dim"),
    "heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "encoder_attention_heads",
        "num_encoder_attention_heads",
        "num_heads",
    ),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim", "d_kv"),
    "vocabulary": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_used": ("num_experts_per_tok", "num_experts_per_token"),
    "expert_size": ("moe_intermediate_size", "expert_ffn_size"),
    "window": ("sliding_window",),
}
_GGUF_NAMES = {
    "layers": "block_count",
    "decoder_layers": "decoder_block_count",
    "hidden_size": "embedding_length",
    "feed_forward_size": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "context": "context_length",
    "vocabulary": "vocab_size",
    "experts": "expert_count",
    "experts_used": "expert_used_count",
    "expert_size": "expert_feed_forward_length",
    "window": "attention.sliding_window",
}
_WINDOWED_LAYERS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt-oss": 2, "gpt_oss": 2}
"""Architectures with a sliding window in llama.cpp's graph → the last of so many layers has none."""
_WIDE = ("gpt2", "gptj", "gpt_bigcode", "codegen", "bloom", "falcon")
"""`model_type` of those whose MLP has four times the hidden size where the config does not say."""

_LENGTHS = (512, 2048, 8192, 32768, 131072)
"""Contexts in tokens that people ask about."""

_WINDOWS, _BATCH, _CELLS = 4, 512, 256
"""What a layer with a window keeps in llama.cpp: so many windows and a batch, rounded up to so many tokens."""

_KV_BYTES = 2
"""Of a number in the cache, in float16 as llama.cpp keeps it unless told otherwise."""


@dataclass(frozen=True)
class Sizes:
    """A model's dimensions; None where the file does not say."""

    layers: int | None = None
    """Blocks; of an encoder-decoder, the encoder's."""
    decoder_layers: int | None = None
    """Of an encoder-decoder alone."""
    hidden_size: int | None = None
    feed_forward_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    """Numbers a head works on."""
    context: int | None = None
    """Tokens that the model has positions for."""
    vocabulary: int | None = None
    """Tokens."""
    experts: int | None = None
    """Of a mixture of experts, in a layer."""
    experts_used: int | None = None
    """For each token."""
    expert_size: int | None = None
    """An expert's feed-forward size."""
    window: int | None = None
    """Tokens that some layers look at; None where all look at every one."""
    windowed_layers: int | None = None
    """How many do."""

    def memory(self, weights_bytes: int, *, keeps_cache: bool) -> dict[int, int]:
        """Context in tokens → bytes of weights and, for models that `keeps_cache`, keys and values; up to its own."""
        own = self.context or 0
        lengths = [length for length in _LENGTHS if not own or length < own] + ([own] if own else [])
        layers = self.decoder_layers or self.layers
        if not layers or not self.kv_heads or not self.head_size:
            return {}
        if not keeps_cache:
            return dict.fromkeys(lengths, weights_bytes)
        per_token = 2 * self.kv_heads * self.head_size * _KV_BYTES
        kept = -(-(_WINDOWS * (self.window or 0) + _BATCH) // _CELLS) * _CELLS
        windowed = self.windowed_layers or 0
        return {
            length: weights_bytes + per_token * ((layers - windowed) * length + windowed * min(kept, length))
            for length in lengths
        }


def sizes_from_gguf(header: GgufHeader) -> Sizes:
    """From a header's metadata."""
    numbers = {name: header.number(key) for name, key in _GGUF_NAMES.items()}
    kv = header.metadata.get(f"{header.architecture}.attention.head_count_kv")
    if isinstance(kv, list) and kv:
        numbers["kv_heads"] = max(int(count) for count in kv)
    if tokens := header.array_length("tokenizer.ggml.tokens"):
        numbers["vocabulary"] = tokens
    return _completed(numbers, header.architecture)


def sizes_from_config(config: Mapping[str, Any]) -> Sizes:
    """From the fields of config.json; of models made of several, the one that writes."""
    own = next((config[name] for name in ("text_config", "decoder") if isinstance(config.get(name), dict)), config)
    numbers = {name: _first(own, keys) for name, keys in _CONFIG_NAMES.items()}
    numbers["context"] = positions(own)
    model_type = str(own.get("model_type"))
    if numbers["feed_forward_size"] is None and model_type in _WIDE and numbers["hidden_size"]:
        numbers["feed_forward_size"] = 4 * numbers["hidden_size"]
    if not config.get("is_encoder_decoder"):
        numbers["decoder_layers"] = None
    elif numbers["decoder_layers"] is None:
        numbers["decoder_layers"] = numbers["layers"]
    if isinstance(config.get("encoder"), dict):
        numbers["layers"] = _first(config["encoder"], _CONFIG_NAMES["layers"])
    return _completed(numbers, model_type)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _completed(numbers: dict[str, int | None], architecture: str) -> Sizes:
    if numbers["kv_heads"] is None:
        numbers["kv_heads"] = numbers["heads"]
    if numbers["head_size"] is None and numbers["heads"] and numbers["hidden_size"]:
        numbers["head_size"] = numbers["hidden_size"] // numbers["heads"]
    if (every := _WINDOWED_LAYERS.get(architecture)) and numbers["window"] and (layers := numbers["layers"]):
        numbers["windowed_layers"] = layers - layers // every
    else:
        numbers["window"] = None
    return Sizes(**numbers)
