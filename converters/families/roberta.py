"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions begin after the padding token's, with another classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from converters.families.bert import Bert
from converters.head import Layer


class Roberta(Bert):
    """`RobertaModel` and its kin, with or without the head they were trained with; a classifier keeps its own."""

    architectures = ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification")
    classifier = "RobertaForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {**Bert.defaults, "vocab_size": 50265, "pad_token_id": 1}
    prefix = "roberta."
    left_out = r"lm_head\..*|pooler\..*"

    @property
    def first_position(self) -> int:
        # transformers counts positions from the padding token's id on, and gives that one to padding alone.
        return self.config.natural("pad_token_id") + 1 if self.config["pad_token_id"] else 1

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        dense = Layer("classifier.dense", self.hidden, self.hidden, activation="tanh")
        return "cls", (dense, Layer("classifier.out_proj", self.hidden, outputs))


class XlmRoberta(Roberta):
    """`XLMRobertaModel`: RoBERTa with a SentencePiece vocabulary of a hundred languages."""

    architectures = ("XLMRobertaModel", "XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification")
    classifier = "XLMRobertaForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {**Roberta.defaults, "vocab_size": 30522}


class Camembert(Roberta):
    """`CamembertModel`: RoBERTa with a French SentencePiece vocabulary."""

    architectures = ("CamembertModel", "CamembertForMaskedLM", "CamembertForSequenceClassification")
    classifier = "CamembertForSequenceClassification"
    defaults: ClassVar[Mapping[str, Any]] = {**Roberta.defaults, "vocab_size": 30522}
