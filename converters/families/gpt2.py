"""GPT-2: learned positions, LayerNorm with biases, weights kept the other way round (Conv1D), a fused q, k, v."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import EMBEDDING, HEAD, Family, Weight, weight
from converters.families.gemma2 import TANH_GELU
from converters.operations import Transpose
from converters.writer import Value


class Gpt2(Family):
    """`GPT2LMHeadModel`."""

    architectures = ("GPT2LMHeadModel",)
    gguf_architecture = "gpt2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    ignored = r".*\.attn\.(masked_)?bias"
    embedding_name = "transformer.wte.weight"

    @property
    def hidden(self) -> int:
        return self.config.natural("n_embd" if "n_embd" in self.config else "hidden_size")

    @property
    def layers(self) -> int:
        return self.config.natural("n_layer" if "n_layer" in self.config else "num_hidden_layers")

    @property
    def heads(self) -> int:
        return self.config.natural("n_head" if "n_head" in self.config else "num_attention_heads")

    @property
    def inner(self) -> int:
        return self.config.natural("n_inner") if self.config.get("n_inner") else 4 * self.hidden

    def check(self) -> None:
        self.config.require("activation_function", *TANH_GELU)
        self.config.require("scale_attn_weights", True)
        self.config.require("scale_attn_by_inverse_layer_idx", False)
        self.config.require("add_cross_attention", False)

    def metadata(self) -> dict[str, Value]:
        return {
            "block_count": self.layers,
            "context_length": self.config.natural("n_positions"),
            "embedding_length": self.hidden,
            "feed_forward_length": self.inner,
            "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": self.config.number("layer_norm_epsilon"),
        }

    def canonical(self, name: str) -> str:
        # The first checkpoints were saved without the prefix.
        return name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"

    def weights(self) -> Iterator[Weight]:
        vocabulary, positions = self.config.natural("vocab_size"), self.config.natural("n_positions")
        yield weight("transformer.wte.weight", (vocabulary, self.hidden), EMBEDDING)
        yield weight("transformer.wpe.weight", (positions, self.hidden), "position_embd.weight")
        yield weight("lm_head.weight", (vocabulary, self.hidden), HEAD)
        yield from self._norm("transformer.ln_f", "output_norm")
        for layer in range(self.layers):
            here, there = f"transformer.h.{layer}", f"blk.{layer}"
            yield from self._norm(f"{here}.ln_1", f"{there}.attn_norm")
            yield from self._norm(f"{here}.ln_2", f"{there}.ffn_norm")
            yield from _linear(f"{here}.attn.c_attn", self.hidden, 3 * self.hidden, f"{there}.attn_qkv")
            yield from _linear(f"{here}.attn.c_proj", self.hidden, self.hidden, f"{there}.attn_output")
            yield from _linear(f"{here}.mlp.c_fc", self.hidden, self.inner, f"{there}.ffn_up")
            yield from _linear(f"{here}.mlp.c_proj", self.inner, self.hidden, f"{there}.ffn_down")

    def _norm(self, here: str, there: str) -> Iterator[Weight]:
        yield weight(f"{here}.weight", (self.hidden,), f"{there}.weight")
        yield weight(f"{here}.bias", (self.hidden,), f"{there}.bias")


def _linear(here: str, inputs: int, outputs: int, there: str) -> Iterator[Weight]:
    yield weight(f"{here}.weight", (inputs, outputs), f"{there}.weight", Transpose())
    yield weight(f"{here}.bias", (outputs,), f"{there}.bias")
