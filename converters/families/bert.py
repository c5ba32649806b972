"""BERT: learned positions, token types, LayerNorm after every block, and a pooler under its classifier.

MiniLM, multilingual BERT and most sentence models are saved as BERT. The graph computes GELU by its tanh approximation
(a few 1e-4 from the exact one) and gives every token the first token type; the engine knows how to tell a second text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import EMBEDDING, Family, Weight, weight
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.head import Layer
from converters.operations import RowSlice
from converters.writer import Value

GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")
"""Names of the activation and of its approximations, which differ by less than 16-bit weights do."""

_OLD_NORM = re.compile(r"(.*LayerNorm)\.(gamma|beta)")


class Bert(Family):
    """`BertModel`, with or without the head it was trained with; a classifier keeps its own."""

    architectures: ClassVar[tuple[str, ...]] = (
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
    )
    gguf_architecture = "bert"
    classifier = "BertForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    writes_text = False
    prefix: ClassVar[str] = "bert."
    """What the encoder's tensors are called after, where it is a part of a larger model."""
    head_name = ""
    embedding_name = "embeddings.word_embeddings.weight"
    ignored = r".*embeddings\.(position_ids|token_type_ids)"
    left_out: ClassVar[str] = r"cls\..*|pooler\..*"

    def check(self) -> None:
        self.config.require("hidden_act", *GELU)
        self.config.require("position_embedding_type", None, "absolute")
        self.config.require("is_decoder", None, False)
        self.config.require("add_cross_attention", None, False)
        if self.config.get("pruned_heads"):
            raise UnsupportedModel(
                f"config.json sets pruned_heads to {self.config['pruned_heads']!r}; llama.cpp's graph has all heads in "
                "every layer."
            )
        self.check_heads()

    def check_heads(self) -> None:
        """Refuse a width that the heads do not share out evenly."""
        if self.hidden % self.heads:
            raise CorruptCheckpoint(f"config.json gives {self.heads} heads to a width of {self.hidden}.")

    @property
    def heads(self) -> int:
        return self.config.natural("num_attention_heads")

    @property
    def inner(self) -> int:
        return self.config.natural("intermediate_size")

    @property
    def token_types(self) -> int:
        return self.config.natural("type_vocab_size")

    @property
    def first_position(self) -> int:
        """The row of the position table that belongs to the first token."""
        return 0

    @property
    def context(self) -> int:
        return self.config.natural("max_position_embeddings") - self.first_position

    def metadata(self) -> dict[str, Value]:
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.inner,
            "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": self.config.number("layer_norm_eps"),
            "attention.causal": False,
            "vocab_size": self.config.natural("vocab_size"),
        }

    def other_metadata(self) -> dict[str, Value]:
        return {"tokenizer.ggml.token_type_count": self.token_types}

    def canonical(self, name: str) -> str:
        name = name.removeprefix(self.prefix)
        if old := _OLD_NORM.fullmatch(name):
            return f"{old[1]}.{'weight' if old[2] == 'gamma' else 'bias'}"
        return name

    def weights(self) -> Iterator[Weight]:
        yield from self.embedding_weights()
        for layer in range(self.layers):
            yield from self.layer_weights(f"encoder.layer.{layer}", f"blk.{layer}")

    def embedding_weights(self) -> Iterator[Weight]:
        vocabulary, positions = self.config.natural("vocab_size"), self.config.natural("max_position_embeddings")
        yield weight(self.embedding_name, (vocabulary, self.hidden), EMBEDDING)
        rows = (RowSlice(self.first_position, positions),) if self.first_position else ()
        yield weight("embeddings.position_embeddings.weight", (positions, self.hidden), "position_embd.weight", *rows)
        yield weight("embeddings.token_type_embeddings.weight", (self.token_types, self.hidden), "token_types.weight")
        yield from self.affine("embeddings.LayerNorm", "token_embd_norm", self.hidden)

    def layer_weights(self, here: str, there: str) -> Iterator[Weight]:
        """The weights of one layer, under `here` in the checkpoint and `there` in the GGUF file."""
        for part in ("query", "key", "value"):
            yield from self.affine(f"{here}.attention.self.{part}", f"{there}.attn_{part[0]}", self.hidden, self.hidden)
        yield from self.affine(f"{here}.attention.output.dense", f"{there}.attn_output", self.hidden, self.hidden)
        yield from self.affine(f"{here}.attention.output.LayerNorm", f"{there}.attn_output_norm", self.hidden)
        yield from self.affine(f"{here}.intermediate.dense", f"{there}.ffn_up", self.inner, self.hidden)
        yield from self.affine(f"{here}.output.dense", f"{there}.ffn_down", self.hidden, self.inner)
        yield from self.affine(f"{here}.output.LayerNorm", f"{there}.layer_output_norm", self.hidden)

    def affine(self, here: str, there: str, *shape: int) -> Iterator[Weight]:
        """A weight of `shape` and the bias beside it."""
        yield weight(f"{here}.weight", shape, f"{there}.weight")
        yield weight(f"{here}.bias", shape[:1], f"{there}.bias")

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        pooler = Layer("pooler.dense", self.hidden, self.hidden, activation="tanh")
        return "cls", (pooler, Layer("classifier", self.hidden, outputs))
