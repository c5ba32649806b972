"""Phi-3, Phi-3.5 and Phi-4: q, k, v in one projection, gate and up in another, as the graph has them too.

llama.cpp takes the short or the long frequency factors by the size of the context that is opened, transformers by the
length of the text: up to the original context they agree when the context is no larger. The graph has no window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from converters.base import Weight, weight
from converters.config import Rope, read_rope
from converters.families.llama import Llama
from converters.rope import original_context, rope_tensors
from converters.writer import Value


class Phi3(Llama):
    """`Phi3ForCausalLM`."""

    architectures = ("Phi3ForCausalLM",)
    gguf_architecture = "phi3"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    rope_types = ("default", "longrope")
    partial_rotary = True

    @property
    def rope(self) -> Rope:
        rope = read_rope(self.config)
        # transformers reads Phi-3's first releases, which say "yarn", as longrope.
        return Rope("longrope", rope.theta, rope.settings) if rope.type == "yarn" else rope

    @property
    def rope_dims(self) -> int:
        return int(self.head_dim * self.rope.number("partial_rotary_factor", 1.0))

    @property
    def window(self) -> int | None:
        return self.config.natural("sliding_window") if self.config.get("sliding_window") is not None else None

    def check(self) -> None:
        super().check()
        self.config.require("head_dim", None, self.hidden // self.heads)

    def head_metadata(self) -> dict[str, Value]:
        return {
            "rope.dimension_count": self.rope_dims,
            "rope.scaling.original_context_length": original_context(self.rope, self.trained_context),
            "attention.sliding_window": self.window or 0,
        }

    def extra_tensors(self) -> dict[str, NDArray[np.float32]]:
        return rope_tensors(self.rope, self.rope_dims, self.trained_context)

    def attention_weights(self, here: str, there: str) -> Iterator[Weight]:
        rows = self.heads * self.head_dim
        fused = rows + 2 * self.kv_heads * self.head_dim
        yield weight(f"{here}.qkv_proj.weight", (fused, self.hidden), f"{there}.attn_qkv.weight")
        yield weight(f"{here}.o_proj.weight", (self.hidden, rows), f"{there}.attn_output.weight")

    def feed_forward_weights(self, here: str, there: str) -> Iterator[Weight]:
        inner = self.config.natural("intermediate_size")
        yield weight(f"{here}.gate_up_proj.weight", (2 * inner, self.hidden), f"{there}.ffn_up.weight")
        yield weight(f"{here}.down_proj.weight", (self.hidden, inner), f"{there}.ffn_down.weight")
