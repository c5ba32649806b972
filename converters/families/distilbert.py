"""DistilBERT: BERT's layers under other names, without token types, and a classifier with ReLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import EMBEDDING, Weight, weight
from converters.families.bert import GELU, Bert
from converters.head import Layer


class DistilBert(Bert):
    """`DistilBertModel`, with or without the head it was trained with; a classifier keeps its own."""

    architectures = ("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification")
    classifier = "DistilBertForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "activation": "gelu",
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    prefix = "distilbert."
    left_out = r"vocab_(transform|layer_norm|projector)\..*"

    def check(self) -> None:
        self.config.require("activation", *GELU)
        # The module has this number in its code; no config sets it.
        self.config.require("layer_norm_eps", 1e-12)
        self.check_heads()

    @property
    def hidden(self) -> int:
        return self.config.natural("dim")

    @property
    def layers(self) -> int:
        return self.config.natural("n_layers")

    @property
    def heads(self) -> int:
        return self.config.natural("n_heads")

    @property
    def inner(self) -> int:
        return self.config.natural("hidden_dim")

    @property
    def token_types(self) -> int:
        return 1  # what llama.cpp wants to hear of a model that has none

    def weights(self) -> Iterator[Weight]:
        yield from self.embedding_weights()
        for layer in range(self.layers):
            yield from self.layer_weights(f"transformer.layer.{layer}", f"blk.{layer}")

    def embedding_weights(self) -> Iterator[Weight]:
        vocabulary, positions = self.config.natural("vocab_size"), self.config.natural("max_position_embeddings")
        yield weight(self.embedding_name, (vocabulary, self.hidden), EMBEDDING)
        yield weight("embeddings.position_embeddings.weight", (positions, self.hidden), "position_embd.weight")
        yield from self.affine("embeddings.LayerNorm", "token_embd_norm", self.hidden)

    def layer_weights(self, here: str, there: str) -> Iterator[Weight]:
        for part, target in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("out", "attn_output")):
            yield from self.affine(f"{here}.attention.{part}_lin", f"{there}.{target}", self.hidden, self.hidden)
        yield from self.affine(f"{here}.sa_layer_norm", f"{there}.attn_output_norm", self.hidden)
        yield from self.affine(f"{here}.ffn.lin1", f"{there}.ffn_up", self.inner, self.hidden)
        yield from self.affine(f"{here}.ffn.lin2", f"{there}.ffn_down", self.hidden, self.inner)
        yield from self.affine(f"{here}.output_layer_norm", f"{there}.layer_output_norm", self.hidden)

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        before = Layer("pre_classifier", self.hidden, self.hidden, activation="relu")
        return "cls", (before, Layer("classifier", self.hidden, outputs))
