"""Qwen2 and Qwen2.5: biases on q, k, v; rotated in halves; heads of hidden_size / num_attention_heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from converters.families.llama import Llama
from converters.writer import Value


class Qwen2(Llama):
    """`Qwen2ForCausalLM`."""

    architectures = ("Qwen2ForCausalLM",)
    gguf_architecture = "qwen2"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    rope_types = ("default", "dynamic", "linear", "yarn")
    interleaved = False

    @property
    def window(self) -> int | None:
        if not self.config.get("use_sliding_window") or self.config.get("sliding_window") is None:
            return None
        first = self.config.get("max_window_layers", 0)
        kinds = self.config.get("layer_types") or ["sliding_attention"] * max(0, self.layers - first)
        return self.config.natural("sliding_window") if "sliding_attention" in kinds else None

    def check(self) -> None:
        super().check()
        self.config.require("head_dim", None, self.hidden // self.heads)

    def head_metadata(self) -> dict[str, Value]:
        return {}

    def has_bias(self, projection: str) -> bool:
        return projection != "o"
