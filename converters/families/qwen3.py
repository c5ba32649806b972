"""Qwen3: Qwen2 without biases, with a norm on each head's q and k, and a head size of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import Weight, weight
from converters.families.llama import Llama
from converters.families.qwen2 import Qwen2
from converters.writer import Value


class Qwen3(Qwen2):
    """`Qwen3ForCausalLM`."""

    architectures = ("Qwen3ForCausalLM",)
    gguf_architecture = "qwen3"
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128}

    def check(self) -> None:
        Llama.check(self)
        # The graph has no bias after the attention.
        self.config.require("attention_bias", False, None)

    def head_metadata(self) -> dict[str, Value]:
        return {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}

    def has_bias(self, projection: str) -> bool:
        return False

    def attention_weights(self, here: str, there: str) -> Iterator[Weight]:
        yield from super().attention_weights(here, there)
        for part in ("q", "k"):
            yield weight(f"{here}.{part}_norm.weight", (self.head_dim,), f"{there}.attn_{part}_norm.weight")
