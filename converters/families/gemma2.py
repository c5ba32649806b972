"""Gemma 2: norms around both blocks, soft-capped logits, every other layer with a sliding window.

The norms' gains are stored minus one. The graph scales attention by the head size (one size of model aside), so a
query_pre_attn_scalar that says otherwise goes into the query weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import Weight, weight
from converters.errors import UnsupportedModel
from converters.families.llama import Llama
from converters.operations import Add, Scale
from converters.writer import Value

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
"""Names of the activation that llama.cpp's GELU is: the tanh approximation."""


class Gemma2(Llama):
    """`Gemma2ForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("Gemma2ForCausalLM",)
    gguf_architecture = "gemma2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    rope_types = ("default", "dynamic", "linear")
    interleaved = False
    graph_has_head = False
    layers_of_27b: ClassVar[int] = 46
    """The graph knows the 27B model by its layers, and scales by hidden_size / heads there."""
    pattern: ClassVar[int] = 2
    """One layer in so many looks at the whole context."""

    @property
    def attention_scale(self) -> float:
        """What the queries have to be multiplied with besides what the graph does."""
        divisor = self.hidden // self.heads if self.layers == self.layers_of_27b else self.head_dim
        return math.sqrt(divisor / self.config.number("query_pre_attn_scalar"))

    def check(self) -> None:
        self.config.require("hidden_activation", *TANH_GELU)
        self.config.require("use_bidirectional_attention", None, False)
        self.config.require("attention_bias", None, False)
        self.check_soft_caps()
        self.check_attention()

    def check_soft_caps(self) -> None:
        """Refuse soft caps the graph has no room for, or the lack of those it always computes."""
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not self.config.get(key):
                raise UnsupportedModel(
                    f"config.json sets {key} to {self.config.get(key)!r}; llama.cpp's graph for Gemma 2 always caps."
                )

    @property
    def context(self) -> int:
        return self.trained_context  # the graph has the window

    def metadata(self) -> dict[str, Value]:
        keys = super().metadata()
        if keys.get("rope.freq_base") == 10000.0:
            del keys["rope.freq_base"]  # the graph's default; llama.cpp's converter leaves it out
        return {**keys, **self.soft_caps(), **self.window_metadata()}

    def soft_caps(self) -> dict[str, Value]:
        return {
            "attn_logit_softcapping": self.config.number("attn_logit_softcapping"),
            "final_logit_softcapping": self.config.number("final_logit_softcapping"),
        }

    def window_metadata(self) -> dict[str, Value]:
        """Which layers have a window, said only where it is not the graph's own pattern."""
        pattern = self.config.get("sliding_window_pattern") or self.config.get("_sliding_window_pattern", self.pattern)
        kinds = self.config.get("layer_types")
        limited = [
            kinds[layer] == "sliding_attention" if kinds else bool((layer + 1) % pattern)
            for layer in range(self.layers)
        ]
        keys: dict[str, Value] = {"attention.sliding_window": self.config.natural("sliding_window")}
        if limited != [bool((layer + 1) % self.pattern) for layer in range(self.layers)]:
            keys["attention.sliding_window_pattern"] = limited
        return keys

    def head_metadata(self) -> dict[str, Value]:
        return {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}

    def weights(self) -> Iterator[Weight]:
        for entry in super().weights():
            yield _with_gain(entry) if entry.name == "model.norm.weight" else entry

    def layer_weights(self, here: str, there: str) -> Iterator[Weight]:
        for norm, target in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ):
            yield weight(f"{here}.{norm}.weight", (self.hidden,), f"{there}.{target}.weight", Add(1.0))
        yield from self.attention_weights(f"{here}.self_attn", there)
        yield from self.feed_forward_weights(f"{here}.mlp", there)

    def attention_weights(self, here: str, there: str) -> Iterator[Weight]:
        for entry in super().attention_weights(here, there):
            if entry.name.endswith("q_proj.weight") and self.attention_scale != 1:
                yield weight(entry.name, entry.shape, entry.targets[0].name, Scale(self.attention_scale))
            else:
                yield entry


def _with_gain(entry: Weight) -> Weight:
    return weight(entry.name, entry.shape, entry.targets[0].name, Add(1.0))
