"""Gemma 3's text model: norms on each head's q and k, two kinds of layer with rotary settings of their own.

The vision tower of `Gemma3ForConditionalGeneration` is left out: what remains answers text as the whole does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import Weight, weight
from converters.config import Rope, read_rope
from converters.families.gemma2 import Gemma2
from converters.families.llama import Llama
from converters.operations import Add, Operation, Scale
from converters.rope import check_rope
from converters.writer import Value


class Gemma3(Gemma2):
    """`Gemma3ForCausalLM`, and the text of `Gemma3ForConditionalGeneration`."""

    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    gguf_architecture = "gemma3"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2.defaults,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10000.0,
    }
    ignored = r"(.*\.rotary_emb\.inv_freq|vision_tower\..*|multi_modal_projector\..*)"
    graph_has_head = True
    layers_of_27b = 62
    pattern = 6

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({**values, **(values.get("text_config") or {})})

    @property
    def rope(self) -> Rope:
        return read_rope(self.config, default_theta=1000000.0)

    @property
    def window_rope(self) -> Rope:
        """The rotary settings of the layers with a window."""
        nested = (self.config.get("rope_parameters") or {}).get("sliding_attention")
        if nested:
            return read_rope(self.config, layer_type="sliding_attention")
        return Rope("default", self.config.number("rope_local_base_freq"))

    def check_soft_caps(self) -> None:
        self.config.require("attn_logit_softcapping", None)

    def check_attention(self) -> None:
        super().check_attention()
        check_rope(self.window_rope, ("default",))

    def metadata(self) -> dict[str, Value]:
        keys = {**Llama.metadata(self), **self.soft_caps(), **self.window_metadata()}
        return {**keys, "rope.freq_base_swa": self.window_rope.theta}

    def soft_caps(self) -> dict[str, Value]:
        final = self.config.get("final_logit_softcapping")
        return {"final_logit_softcapping": float(final)} if final else {}

    def canonical(self, name: str) -> str:
        name = name.removeprefix("model.") if name.startswith("model.vision_tower.") else name
        name = name.removeprefix("model.") if name.startswith("model.multi_modal_projector.") else name
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return super().canonical(name.removeprefix("language_model."))

    def attention_weights(self, here: str, there: str) -> Iterator[Weight]:
        yield from Llama.attention_weights(self, here, there)
        scale = () if self.attention_scale == 1 else (Scale(self.attention_scale),)
        for part in ("q", "k"):
            operations: tuple[Operation, ...] = (Add(1.0), *(scale if part == "q" else ()))
            yield weight(
                f"{here}.{part}_norm.weight", (self.head_dim,), f"{there}.attn_{part}_norm.weight", *operations
            )
