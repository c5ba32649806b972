"""Mixtral: Mistral with experts. The router's weights are normalised over the chosen experts, here and in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from converters.base import Weight, weight
from converters.families.experts import expert_weights, stacked_expert_weights
from converters.families.mistral import Mistral
from converters.writer import Value


class Mixtral(Mistral):
    """`MixtralForCausalLM`."""

    architectures = ("MixtralForCausalLM",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **Mistral.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    stacked = False
    """Whether the checkpoint holds all experts of a layer in one tensor."""

    def adopt(self, names: Sequence[str]) -> None:
        self.stacked = any(name.endswith(".experts.gate_up_proj") for name in names)

    def metadata(self) -> dict[str, Value]:
        return {
            **super().metadata(),
            "expert_count": self.config.natural("num_local_experts"),
            "expert_used_count": self.config.natural("num_experts_per_tok"),
        }

    def head_metadata(self) -> dict[str, Value]:
        keys = super().head_metadata()
        return (
            keys if self.config.get("head_dim") else {key: keys[key] for key in ("rope.dimension_count", "vocab_size")}
        )

    def canonical(self, name: str) -> str:
        return super().canonical(name).replace(".mlp.", ".block_sparse_moe.")

    def feed_forward_weights(self, here: str, there: str) -> Iterator[Weight]:
        here = here.replace(".mlp", ".block_sparse_moe")
        experts, inner = self.config.natural("num_local_experts"), self.config.natural("intermediate_size")
        yield weight(f"{here}.gate.weight", (experts, self.hidden), f"{there}.ffn_gate_inp.weight")
        here = f"{here}.experts"
        if self.stacked:
            yield from stacked_expert_weights(here, there, experts=experts, inner=inner, hidden=self.hidden)
        else:
            names = ("w1", "w3", "w2")
            yield from expert_weights(here, there, names=names, experts=experts, inner=inner, hidden=self.hidden)
