"""ModernBERT: rotary positions, a local window in two layers of three, gated feed-forward, norms before the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import EMBEDDING, Family, Weight, weight
from converters.config import Rope, read_rope
from converters.errors import CorruptCheckpoint
from converters.families.bert import GELU
from converters.families.gemma2 import TANH_GELU
from converters.head import Layer
from converters.rope import check_rope
from converters.writer import Value

_ACTIVATIONS = {**dict.fromkeys(TANH_GELU, "gelu_tanh"), "swish": "silu"}
"""transformers' names of activations, where ours differ."""
_HEAD_ACTIVATIONS = ("gelu", *TANH_GELU, "relu", "silu", "swish", "tanh")
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_THETAS = {_GLOBAL: ("global_rope_theta", 160_000.0), _LOCAL: ("local_rope_theta", 10_000.0)}


class ModernBert(Family):
    """`ModernBertModel`, with or without the head it was trained with; a classifier keeps its own."""

    architectures = ("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification")
    gguf_architecture = "modern-bert"
    classifier = "ModernBertForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "classifier_pooling": "cls",
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "norm_bias": False,
        "tie_word_embeddings": False,
    }
    writes_text = False
    head_name = ""
    embedding_name = "model.embeddings.tok_embeddings.weight"
    left_out = r"head\..*|decoder\..*"

    def check(self) -> None:
        self.config.require("hidden_activation", *GELU)
        for key in ("attention_bias", "mlp_bias", "norm_bias"):
            self.config.require(key, None, False)
        if self.is_classifier:
            self.config.require("classifier_pooling", "cls", "mean")
            self.config.require("classifier_activation", *_HEAD_ACTIVATIONS)
        for kind in _THETAS:
            check_rope(self.rope(kind), ("default",))
        if self.hidden % self.heads:
            raise CorruptCheckpoint(f"config.json gives {self.heads} heads to a width of {self.hidden}.")

    def rope(self, kind: str) -> Rope:
        """The rotary settings of the layers of `kind`."""
        key, theta = _THETAS[kind]
        return read_rope(self.config, layer_type=kind, default_theta=float(self.config.get(key, theta)))

    @property
    def heads(self) -> int:
        return self.config.natural("num_attention_heads")

    @property
    def local_layers(self) -> list[bool]:
        """Which layers look no further than their window."""
        if kinds := self.config.get("layer_types"):
            return [kind == _LOCAL for kind in kinds]
        return [bool(layer % self.config.natural("global_attn_every_n_layers")) for layer in range(self.layers)]

    def metadata(self) -> dict[str, Value]:
        return {
            "block_count": self.layers,
            "context_length": self.config.natural("max_position_embeddings"),
            "embedding_length": self.hidden,
            "feed_forward_length": self.config.natural("intermediate_size"),
            "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": self.config.number("norm_eps"),
            "attention.causal": False,
            "attention.sliding_window": self.config.natural("local_attention"),
            "attention.sliding_window_pattern": self.local_layers,
            "rope.freq_base": self.rope(_GLOBAL).theta,
            "rope.freq_base_swa": self.rope(_LOCAL).theta,
            "rope.scaling.type": "none",
            "hidden_activation": "gelu",
            "vocab_size": self.config.natural("vocab_size"),
        }

    def canonical(self, name: str) -> str:
        return name if name.startswith(("model.", "head.", "classifier.", "decoder.")) else f"model.{name}"

    def weights(self) -> Iterator[Weight]:
        inner, vocabulary = self.config.natural("intermediate_size"), self.config.natural("vocab_size")
        yield weight(self.embedding_name, (vocabulary, self.hidden), EMBEDDING)
        yield weight("model.embeddings.norm.weight", (self.hidden,), "token_embd_norm.weight")
        yield weight("model.final_norm.weight", (self.hidden,), "output_norm.weight")
        for layer in range(self.layers):
            here, there = f"model.layers.{layer}", f"blk.{layer}"
            if layer:  # the first one reads the embeddings' own norm
                yield weight(f"{here}.attn_norm.weight", (self.hidden,), f"{there}.attn_norm.weight")
            yield weight(f"{here}.attn.Wqkv.weight", (3 * self.hidden, self.hidden), f"{there}.attn_qkv.weight")
            yield weight(f"{here}.attn.Wo.weight", (self.hidden, self.hidden), f"{there}.attn_output.weight")
            yield weight(f"{here}.mlp_norm.weight", (self.hidden,), f"{there}.ffn_norm.weight")
            yield weight(f"{here}.mlp.Wi.weight", (2 * inner, self.hidden), f"{there}.ffn_up.weight")
            yield weight(f"{here}.mlp.Wo.weight", (self.hidden, inner), f"{there}.ffn_down.weight")

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        name = str(self.config["classifier_activation"])
        bias = bool(self.config["classifier_bias"])
        activation = _ACTIVATIONS.get(name, name)
        dense = Layer("head.dense", self.hidden, self.hidden, bias=bias, activation=activation)
        norm = Layer(
            "head.norm", self.hidden, self.hidden, kind="layer_norm", bias=False, eps=self.config.number("norm_eps")
        )
        return str(self.config["classifier_pooling"]), (dense, norm, Layer("classifier", self.hidden, outputs))
