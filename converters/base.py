"""What a model family is: the weights it expects, where they go, the metadata they come with, and what is refused.

A family is a subclass of `Family` in `converters/families/`, found by `architectures[0]` of config.json. Its weights
are one table: each entry names a checkpoint tensor, its shape, and one or more places in the GGUF file with the exact
operations in between. The base converter and the adapter converter read the same table. Nothing here touches files.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from converters.config import Config
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.head import Head, Layer, classifier_task, label_names
from converters.operations import Operation
from converters.writer import Value

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""The GGUF names of the token embedding and the output head."""

CLASSIFIER = "ForSequenceClassification"
"""How the architectures end that transformers has for classes and values of whole texts."""

_DECODERS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
"""What transformers' names begin with → the decoder, where it is not …ForCausalLM."""
_ANSWERS = {
    "ForTokenClassification": "every token",
    "ForQuestionAnswering": "where in a text an answer begins and ends",
    "ForMultipleChoice": "several texts at a time",
}
_OTHER_HEADS = re.compile("|".join(_ANSWERS))

SHORTEST_CONTEXT = 1024
"""A model whose sliding window cannot be honoured is converted up to its window if that is at least this long."""


@dataclass(frozen=True)
class Target:
    """One place in the GGUF file that a checkpoint tensor, or a part of it, goes to."""

    name: str
    """The GGUF tensor."""
    operations: tuple[Operation, ...] = ()
    """Applied to the checkpoint tensor, in order."""
    expert: int | None = None
    """The slot in a stack of experts; None when the tensor is not stacked here."""


@dataclass(frozen=True)
class Weight:
    """A tensor that a checkpoint of the family must hold."""

    name: str
    """Its name as transformers saves it."""
    shape: tuple[int, ...]
    targets: tuple[Target, ...]


def weight(name: str, shape: tuple[int, ...], target: str, *operations: Operation, expert: int | None = None) -> Weight:
    """A `Weight` with a single target."""
    return Weight(name, shape, (Target(target, operations, expert),))


class Family:
    """One model family; a subclass says what differs, in class attributes and the methods that raise or are empty."""

    architectures: ClassVar[tuple[str, ...]] = ()
    """`architectures[0]` of config.json, for which the class is used."""
    gguf_architecture: ClassVar[str] = ""
    """`general.architecture` in the GGUF file: which of llama.cpp's graphs runs it."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers takes for fields that config.json leaves out."""
    ignored: ClassVar[str] = r".*\.rotary_emb\.inv_freq"
    """Pattern of checkpoint tensors that hold nothing of their own (buffers that are computed)."""
    head_name: ClassVar[str] = "lm_head.weight"
    embedding_name: ClassVar[str] = "model.embed_tokens.weight"
    graph_has_head: ClassVar[bool] = True
    """Whether llama.cpp's graph can take an output head that differs from the embedding."""
    not_float16: ClassVar[str] = ""
    """Pattern of GGUF tensors that float16 does not suit: llama.cpp rounds what they are multiplied with as well."""
    writes_text: ClassVar[bool] = True
    """Whether the graph ends in a distribution over the vocabulary; an encoder's does not."""
    left_out: ClassVar[str] = ""
    """Pattern of checkpoint tensors that belong to a head no GGUF file needs, such as that of masked words."""
    classifier: ClassVar[str] = ""
    """The architecture that transformers gives a base of this family when it trains a classifier on it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """From the fields of config.json; `check` is for the caller to call."""
        self.config = Config(values, defaults=self.defaults)

    def check(self) -> None:
        """Raise `UnsupportedModel`, by the field's name, for what the graph cannot honour."""

    def metadata(self) -> dict[str, Value]:
        """The architecture's own keys, without the `<architecture>.` prefix."""
        raise NotImplementedError

    def other_metadata(self) -> dict[str, Value]:
        """Keys under their full names, beside the architecture's own."""
        return {}

    def weights(self) -> Iterator[Weight]:
        """Every tensor a checkpoint must hold, the output head aside where it is tied."""
        raise NotImplementedError

    def extra_tensors(self) -> dict[str, NDArray[np.float32]]:
        """Tensors that are computed from the config, by GGUF name."""
        return {}

    def adopt(self, names: Sequence[str]) -> None:
        """Look at the checkpoint's tensor names before the table is read: saved layouts of a family may differ."""

    def canonical(self, name: str) -> str:
        """The checkpoint tensor `name` as the table spells it, where saved checkpoints differ."""
        prefix = self.embedding_name.partition(".")[0]
        return f"{prefix}.{name}" if self.is_headless and not name.startswith(f"{prefix}.") else name

    def head_layers(self, outputs: int) -> tuple[str, tuple[Layer, ...]]:
        """What is pooled and which layers follow, of a classifier with `outputs` classes; a decoder's by default."""
        return "last", (Layer("score", self.hidden, outputs, bias=False),)

    @property
    def hidden(self) -> int:
        return self.config.natural("hidden_size")

    def may_repeat(self, name: str) -> bool:
        """Whether checkpoints hold the tensor `name` under other names as well, with the same values."""
        return False

    def check_adapted(self, name: str) -> None:
        """Raise `UnsupportedAdapter` when an adapter must not change the tensor `name` of the table."""

    @property
    def layers(self) -> int:
        return self.config.natural("num_hidden_layers")

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's values, unless the checkpoint holds a different one."""
        return self.is_classifier or self.is_headless or bool(self.config["tie_word_embeddings"])

    @property
    def architecture(self) -> str:
        """`architectures[0]` of config.json, or the family's first where that has none."""
        return str((self.config.get("architectures") or self.architectures)[0])

    @property
    def is_classifier(self) -> bool:
        """Whether the model ends in a head over whole texts: classes, or a value."""
        return self.architecture.endswith(CLASSIFIER)

    @property
    def is_headless(self) -> bool:
        """Whether the model ends in its hidden states, as those do that make embeddings."""
        return self.architecture.endswith("Model") and not self.architecture.endswith("LMHeadModel")

    @property
    def carries_tokenizer(self) -> bool:
        """Whether the GGUF file holds the tokenizer itself, for our own engine to read texts with."""
        return self.is_classifier or self.is_headless or not self.writes_text

    @property
    def head(self) -> Head | None:
        """The model's own head; None for a model that has none, or another one than over whole texts."""
        if not self.is_classifier:
            return Head("embedding") if self.is_headless or not self.writes_text else None
        labels = label_names(self.config)
        pooling, layers = self.head_layers(len(labels))
        return Head(classifier_task(self.config.get("problem_type"), labels), pooling, layers, labels)

    @cached_property
    def table(self) -> dict[str, Weight]:
        """`weights` by name, and the head's, which go nowhere: they travel in the metadata."""
        table = {entry.name: entry for entry in self.weights()}
        if self.is_classifier or self.is_headless:
            table.pop(self.head_name, None)
        for layer in self.head.layers if self.head else ():
            table |= {name: Weight(name, shape, ()) for name, shape in layer.shapes()}
        return table

    def map_weight(self, name: str) -> tuple[Target, ...]:
        """Where the checkpoint tensor `name` goes. Raises `UnsupportedModel` for a name the family does not have."""
        entry = self.table.get(self.canonical(name))
        if entry is None:
            raise UnsupportedModel(f"{type(self).__name__} has no place for the tensor {name!r}.")
        return entry.targets

    def is_ignored(self, name: str) -> bool:
        """Whether the checkpoint tensor `name` holds nothing that the GGUF file needs."""
        return re.fullmatch(self.ignored, name) is not None or self.is_left_out(name)

    def is_head_weight(self, name: str) -> bool:
        """Whether the table's tensor `name` belongs to the head, and so travels as metadata."""
        return name in self.table and not self.table[name].targets

    def is_left_out(self, name: str) -> bool:
        """Whether the checkpoint tensor `name` belongs to a head that the GGUF file does without."""
        name = self.canonical(name)
        if name in self.table:
            return False
        return name == self.head_name or (bool(self.left_out) and re.fullmatch(self.left_out, name) is not None)


def check_window(window: int | None, context: int) -> None:
    """Refuse a sliding window that leaves too little of the context, for a graph that has none.

    Up to the window every token sees all others, so a file whose context ends there is exact; but it has to be of use.
    """
    if window is not None and window < min(context, SHORTEST_CONTEXT):
        raise UnsupportedModel(
            f"config.json sets sliding_window to {window}; llama.cpp's graph for this model has no sliding window, "
            f"and a file that ends after {window} tokens would be of no use."
        )


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a model by its config.json. Raises `UnsupportedModel` for an unknown architecture.

    The model's settings have been checked when this returns.
    """
    architectures = values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise CorruptCheckpoint(
            "config.json names no architecture.",
            hint='Add the class that it was saved from, e.g. "architectures": ["LlamaForCausalLM"] or ["BertModel"].',
        )
    if values.get("is_encoder_decoder") and name not in families():
        raise UnsupportedModel(
            f"llama.cpp has no graph for {name}, an encoder-decoder.",
            hint="edgetune generate runs it in torch from its directory, adapters included; nothing is converted.",
        )
    family_class = _family_class(name)
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"config.json has a quantization_config ({method}): the weights are not plain numbers.",
            hint="Use the full-precision (16 or 32 bit) version of this model and quantize it after the conversion.",
        )
    family = family_class(values)
    family.check()
    return family


def _family_class(name: str) -> type[Family]:
    known = families()
    if (family_class := known.get(name) or known.get(_decoder_of(name))) is not None:
        return family_class
    if refused := _OTHER_HEADS.search(name):
        raise UnsupportedModel(
            f"{name} answers for {_ANSWERS[refused[0]]}; edgetune runs heads that answer for a text as a whole.",
            hint="Models …ForSequenceClassification and those without a head are converted.",
        )
    raise UnsupportedModel(
        f"The architecture {name} is not supported.",
        hint="What transformers knows runs in torch from its directory: edgetune generate, embed or classify. "
        f"Supported are {', '.join(sorted(known))}.",
    )


def _decoder_of(name: str) -> str:
    """The architecture that writes text with the decoder under `name`, a classifier or a model without a head."""
    ending = next((one for one in (CLASSIFIER, "Model") if name.endswith(one)), None)
    if ending is None:
        return ""
    stem = name.removesuffix(ending)
    return _DECODERS.get(stem, f"{stem}ForCausalLM")


def _stem(decoder: str) -> str:
    """What transformers' names for a decoder and its relatives begin with; empty for what writes no text."""
    named = next((stem for stem, name in _DECODERS.items() if name == decoder), "")
    return named or (decoder.removesuffix("ForCausalLM") if decoder.endswith("ForCausalLM") else "")


def classifier_of(family: Family) -> str:
    """The architecture that transformers gives a model of `family` as a classifier; empty where there is none."""
    if family.is_classifier:
        return family.architecture
    if family.classifier:
        return family.classifier
    stem = family.architecture.removesuffix("Model") if family.is_headless else _stem(family.architecture)
    return f"{stem}{CLASSIFIER}" if stem and family.writes_text else ""


def headless(architecture: str) -> str:
    """The architecture that transformers gives the decoder `architecture` without its head; empty for others."""
    stem = _stem(architecture)
    return f"{stem}Model" if stem else ""


def families() -> dict[str, type[Family]]:
    """Architecture name → family, over every module in `converters.families`."""
    package = importlib.import_module("converters.families")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"converters.families.{module.name}")
    return {name: one for one in _subclasses(Family) for name in one.architectures}


def _subclasses(base: type[Family]) -> Iterator[type[Family]]:
    for one in base.__subclasses__():
        yield one
        yield from _subclasses(one)
