"""Qwen3-MoE: Qwen3 with experts in every layer, and router weights that the graph always normalises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from converters.base import Weight, weight
from converters.families.experts import expert_weights, stacked_expert_weights
from converters.families.qwen3 import Qwen3
from converters.writer import Value


class Qwen3Moe(Qwen3):
    """`Qwen3MoeForCausalLM`."""

    architectures = ("Qwen3MoeForCausalLM",)
    gguf_architecture = "qwen3moe"
    defaults: ClassVar[Mapping[str, Any]] = {
        **{key: value for key, value in Qwen3.defaults.items() if key != "head_dim"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    }
    stacked = False
    """Whether the checkpoint holds all experts of a layer in one tensor."""

    @property
    def experts(self) -> int:
        return self.config.natural("num_experts" if "num_experts" in self.config else "num_local_experts")

    @property
    def window(self) -> int | None:
        # Unlike Qwen3's, it holds for every layer.
        limited = self.config.get("use_sliding_window") and self.config.get("sliding_window") is not None
        return self.config.natural("sliding_window") if limited else None

    def adopt(self, names: Sequence[str]) -> None:
        self.stacked = any(name.endswith(".experts.gate_up_proj") for name in names)

    def check(self) -> None:
        super().check()
        self.config.require("norm_topk_prob", True)
        self.config.require("decoder_sparse_step", 1)
        self.config.require("mlp_only_layers", None, [])

    def metadata(self) -> dict[str, Value]:
        return {
            **super().metadata(),
            "expert_count": self.experts,
            "expert_used_count": self.config.natural("num_experts_per_tok"),
            "expert_feed_forward_length": self.config.natural("moe_intermediate_size"),
        }

    def feed_forward_weights(self, here: str, there: str) -> Iterator[Weight]:
        inner = self.config.natural("moe_intermediate_size")
        yield weight(f"{here}.gate.weight", (self.experts, self.hidden), f"{there}.ffn_gate_inp.weight")
        here = f"{here}.experts"
        if self.stacked:
            yield from stacked_expert_weights(here, there, experts=self.experts, inner=inner, hidden=self.hidden)
        else:
            names = ("gate_proj", "up_proj", "down_proj")
            yield from expert_weights(here, there, names=names, experts=self.experts, inner=inner, hidden=self.hidden)
