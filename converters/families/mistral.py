"""Mistral: Llama's graph without biases. The graph has no sliding window; see `converters.base.check_window`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from converters.families.llama import Llama


class Mistral(Llama):
    """`MistralForCausalLM`, from Mistral 7B to Nemo."""

    architectures = ("MistralForCausalLM",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    @property
    def window(self) -> int | None:
        return self.config.natural("sliding_window") if self.config.get("sliding_window") is not None else None
