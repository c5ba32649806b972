"""Llama, and what shares its graph: SmolLM, TinyLlama, Llama 2 and 3.

llama.cpp rotates neighbouring pairs here, so the rows of q and k are reordered. The graph honours attention and
feed-forward biases and takes a tensor of frequency factors, so every rotary scaling can be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from converters.base import EMBEDDING, HEAD, Family, Weight, check_window, weight
from converters.config import Rope, read_rope
from converters.operations import RotaryRows
from converters.rope import FREQUENCIES, check_rope, rope_metadata, rope_tensors
from converters.writer import Value


class Llama(Family):
    """`LlamaForCausalLM`; decoders with separate q, k, v and gate, up, down projections build on it."""

    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    gguf_architecture = "llama"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
    rope_types: ClassVar[tuple[str, ...]] = ("default", "dynamic", "linear", "yarn", "llama3", "longrope", FREQUENCIES)
    """Rotary scalings that the graph computes. Dynamic NTK changes nothing up to max_position_embeddings."""
    interleaved: ClassVar[bool] = True
    """Whether the graph rotates neighbouring pairs."""
    partial_rotary: ClassVar[bool] = False
    """Whether the graph can leave a part of each head as it is."""

    @property
    def heads(self) -> int:
        return self.config.natural("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        return self.config.natural("num_key_value_heads") if self.config.get("num_key_value_heads") else self.heads

    @property
    def head_dim(self) -> int:
        return self.config.natural("head_dim") if self.config.get("head_dim") else self.hidden // self.heads

    @property
    def trained_context(self) -> int:
        return self.config.natural("max_position_embeddings")

    @property
    def context(self) -> int:
        """How many tokens the graph computes exactly: it has no sliding window, so no more than the model's window."""
        return min(self.trained_context, self.window or self.trained_context)

    @property
    def window(self) -> int | None:
        """How many tokens a layer looks back on, itself included, if any layer is limited at all."""
        return None

    @property
    def rope(self) -> Rope:
        return read_rope(self.config)

    def check(self) -> None:
        self.config.require("hidden_act", "silu", "swish")
        self.check_attention()

    def check_attention(self) -> None:
        """Refuse what the graph's attention cannot compute."""
        check_rope(self.rope, self.rope_types, partial=self.partial_rotary)
        check_window(self.window, self.trained_context)

    def metadata(self) -> dict[str, Value]:
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.config.natural("intermediate_size"),
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.config.number("rms_norm_eps"),
            **self.head_metadata(),
            **rope_metadata(self.rope, self.trained_context),
        }

    def head_metadata(self) -> dict[str, Value]:
        """The keys that say how wide a head is, as far as the graph needs them."""
        return {
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "rope.dimension_count": self.head_dim,
            "vocab_size": self.config.natural("vocab_size"),
        }

    def extra_tensors(self) -> dict[str, NDArray[np.float32]]:
        return rope_tensors(self.rope, self.head_dim, self.trained_context)

    def weights(self) -> Iterator[Weight]:
        vocabulary = self.config.natural("vocab_size")
        yield weight("model.embed_tokens.weight", (vocabulary, self.hidden), EMBEDDING)
        yield weight("model.norm.weight", (self.hidden,), "output_norm.weight")
        yield weight("lm_head.weight", (vocabulary, self.hidden), HEAD)
        for layer in range(self.layers):
            yield from self.layer_weights(f"model.layers.{layer}", f"blk.{layer}")

    def layer_weights(self, here: str, there: str) -> Iterator[Weight]:
        """The weights of one layer, under `here` in the checkpoint and `there` in the GGUF file."""
        yield weight(f"{here}.input_layernorm.weight", (self.hidden,), f"{there}.attn_norm.weight")
        yield weight(f"{here}.post_attention_layernorm.weight", (self.hidden,), f"{there}.ffn_norm.weight")
        yield from self.attention_weights(f"{here}.self_attn", there)
        yield from self.feed_forward_weights(f"{here}.mlp", there)

    def attention_weights(self, here: str, there: str) -> Iterator[Weight]:
        turned = (RotaryRows(self.head_dim),) if self.interleaved else ()
        rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for projection, shape, operations in (
            ("q", (rows, self.hidden), turned),
            ("k", (kv_rows, self.hidden), turned),
            ("v", (kv_rows, self.hidden), ()),
            ("o", (self.hidden, rows), ()),
        ):
            target = f"{there}.attn_{'output' if projection == 'o' else projection}"
            yield weight(f"{here}.{projection}_proj.weight", shape, f"{target}.weight", *operations)
            if self.has_bias(projection):
                yield weight(f"{here}.{projection}_proj.bias", shape[:1], f"{target}.bias", *operations)

    def has_bias(self, projection: str) -> bool:
        """Whether the attention projection "q", "k", "v" or "o" has a bias."""
        return bool(self.config.get("attention_bias"))

    def feed_forward_weights(self, here: str, there: str) -> Iterator[Weight]:
        inner = self.config.natural("intermediate_size")
        for projection, shape in (
            ("gate", (inner, self.hidden)),
            ("up", (inner, self.hidden)),
            ("down", (self.hidden, inner)),
        ):
            yield weight(f"{here}.{projection}_proj.weight", shape, f"{there}.ffn_{projection}.weight")
            if self.config.get("mlp_bias"):
                yield weight(f"{here}.{projection}_proj.bias", shape[:1], f"{there}.ffn_{projection}.bias")
