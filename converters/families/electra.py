"""ELECTRA: BERT trained to tell replaced words; a classifier with GELU. Sizes with narrow embeddings are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from converters.errors import UnsupportedModel
from converters.families.bert import Bert
from converters.head import Layer


class Electra(Bert):
    """`ElectraModel`, with or without the head it was trained with; a classifier keeps its own."""

    architectures = (
        "ElectraModel",
        "ElectraForMaskedLM",
        "ElectraForPreTraining",
        "ElectraForSequenceClassification",
    )
    classifier = "ElectraForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Bert.defaults,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    prefix = "electra."
    left_out = r"(discriminator_predictions|generator_predictions|generator_lm_head)\..*"

    def check(self) -> None:
        super().check()
        if self.config.natural("embedding_size") != self.hidden:
            raise UnsupportedModel(
                f"config.json sets embedding_size to {self.config['embedding_size']} and hidden_size to {self.hidden}; "
                "llama.cpp's graph has no projection between the two.",
                hint="Run it with torch: --engine torch. ELECTRA models of one width (base) are converted.",
            )

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        dense = Layer("classifier.dense", self.hidden, self.hidden, activation="gelu")
        return "cls", (dense, Layer("classifier.out_proj", self.hidden, outputs))
