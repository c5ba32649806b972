"""A sentence-transformers directory: which of its modules hold the model, what is pooled, and what follows.

modules.json lists them in order. A transformer, one pooling, dense layers, LayerNorms and a normalization at the end
are what a GGUF file can say; any other module is refused by name. Prompts and the length limit are read as well.
Source: the modules' own `load` and `forward` in sentence_transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.checkpoint import SafetensorsCheckpoint, load_float32
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.head import Head, Layer
from converters.writer import Value

MODULES_NAME = "modules.json"
MAX_LENGTH_KEY = "edgetune.tokenizer.max_length"

_AGAIN = "Download or save the model again."
_TORCH = "Run it with torch: --engine torch."
_MODES = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
}
"""Poolings as older files spell them, "pooling_mode_…": true."""
_POOLINGS = ("cls", "mean", "max", "last")
_ACTIVATIONS = {"Identity": "none", **{name: name.lower() for name in ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")}}
_LIMIT_NAMES = ("bert", "roberta", "distilbert", "camembert", "xlm-roberta", "albert", "xlnet")
_UNLIMITED = 1 << 20  # where no limit is known, a number far above this is saved
_NORM_EPS = 1e-5  # torch's own, which the module leaves as it is


@dataclass(frozen=True)
class SentenceModel:
    """What a sentence-transformers directory adds to the model in it."""

    transformer_dir: Path
    """Where config.json, weights and tokenizer are: the directory itself, or one in it."""
    pooling: str = ""
    width: int = 0
    """How wide the pooled states are."""
    layers: tuple[tuple[Layer, Path], ...] = ()
    """The layers after the pooling, each with the directory of its weights."""
    normalize: bool = False
    max_length: int | None = None
    """Tokens after which a text is cut, those around it counted."""
    lower_case: bool = False
    """Whether texts are lower-cased before the tokenizer sees them."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def head_of(self, hidden: int) -> Head:
        """The head after a model of that width. Raises `CorruptCheckpoint` when the pooling is made for another one."""
        if self.pooling and self.width != hidden:
            raise CorruptCheckpoint(
                f"The pooling in {MODULES_NAME} is {self.width} wide, the model {hidden}.", hint=_AGAIN
            )
        return Head("embedding", self.pooling, tuple(layer for layer, _ in self.layers), normalize=self.normalize)

    def load(self, name: str) -> NDArray[np.float32]:
        """A tensor of the layers, by the name they give it."""
        module, _, part = name.rpartition(".")
        folder = next(folder for layer, folder in self.layers if layer.name == module)
        with SafetensorsCheckpoint(folder) as checkpoint:
            for inner in ("linear", "norm"):
                if f"{inner}.{part}" in checkpoint.names:
                    return load_float32(checkpoint, f"{inner}.{part}")
        raise CorruptCheckpoint(f"{folder} lacks the tensor linear.{part}.", hint=_AGAIN)

    def metadata(self) -> dict[str, Value]:
        """The length limit and the prompts, as keys."""
        keys: dict[str, Value] = {f"edgetune.prompts.{name}": text for name, text in self.prompts.items()}
        if self.default_prompt:
            keys["edgetune.default_prompt"] = self.default_prompt
        if self.max_length:
            keys[MAX_LENGTH_KEY] = self.max_length
        return keys


def transformer_dir(model_dir: Path) -> Path:
    """Where the model itself is in `model_dir`: there, or in a directory that modules.json names."""
    if (model_dir / "config.json").is_file() or not (model_dir / MODULES_NAME).is_file():
        return model_dir
    return _modules(model_dir)[0][1]


def tokenizer_limit(tokenizer_dir: Path) -> int | None:
    """Tokens after which transformers' tokenizer cuts a text; None where its files set no limit."""
    limit = _read(tokenizer_dir / "tokenizer_config.json").get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _UNLIMITED else None


def read_sentence_model(model_dir: Path) -> SentenceModel | None:
    """What modules.json in `model_dir` describes; None when there is none.

    Raises `CorruptCheckpoint` for broken files, `UnsupportedModel` for a module that a GGUF file has no place for.
    """
    if not (model_dir / MODULES_NAME).is_file():
        return None
    modules = _modules(model_dir)
    inside = modules[0][1]
    pooling, width, layers, normalize = _head(modules[1:])
    limits = _limits(inside)
    prompts = _read(model_dir / "config_sentence_transformers.json")
    texts = prompts.get("prompts")
    named = {str(name): str(text) for name, text in texts.items() if text} if isinstance(texts, dict) else {}
    default = prompts.get("default_prompt_name")
    length = limits.get("max_seq_length")
    return SentenceModel(
        inside,
        pooling,
        width,
        tuple(layers),
        normalize,
        length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None,
        bool(limits.get("do_lower_case")),
        named if _pools_prompts(modules) else {},
        str(default) if default in named and _pools_prompts(modules) else "",
    )


def _modules(model_dir: Path) -> list[tuple[str, Path]]:
    """Every module's kind and directory, in order; the first one is the transformer."""
    path = model_dir / MODULES_NAME
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(one["type"]).rpartition(".")[2], str(one.get("path") or "")) for one in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} is not a valid list of modules: {error}.", hint=_AGAIN) from error
    for _, folder in modules:
        # A module is a directory in the model's own: a list must not lead out of it.
        if Path(folder).is_absolute() or ".." in Path(folder).parts or "\\" in folder:
            raise CorruptCheckpoint(f"{path} names the directory {folder!r}, which is not inside the model's.")
    if not modules:
        raise CorruptCheckpoint(f"{path} lists no modules.", hint=_AGAIN)
    if (first := modules[0][0]) != "Transformer":
        raise UnsupportedModel(f"{path} begins with {first}; only models that begin with a Transformer are converted.")
    if not (model_dir / modules[0][1]).is_dir():
        raise CorruptCheckpoint(f"{path} names {modules[0][1]!r}, and there is no such directory.", hint=_AGAIN)
    return [(kind, model_dir / folder) for kind, folder in modules]


def _head(modules: list[tuple[str, Path]]) -> tuple[str, int, list[tuple[Layer, Path]], bool]:
    """What is pooled, how wide, the layers after it, and whether the result is normalized."""
    pooling, width, normalize = "", 0, False
    layers: list[tuple[Layer, Path]] = []
    for number, (kind, folder) in enumerate(modules):
        if kind == "Dropout":
            continue
        if kind == "Pooling" and not pooling:
            normalized = [later for later, _ in modules[number + 1 :] if later != "Dropout"][:1] == ["Normalize"]
            pooling, width = _pooling(folder, normalized=normalized)
        elif kind == "Normalize" and pooling:
            normalize = True
        elif kind in ("Dense", "LayerNorm") and pooling and not normalize:
            last = layers[-1][0].outputs if layers else width
            layers.append((_layer(f"{number}_{kind}", kind, folder, last), folder))
        else:
            raise UnsupportedModel(
                f"The sentence-transformers module {kind} in {folder.name or 'this model'!r} has no place in a GGUF "
                "file where it stands: after the Transformer come one Pooling, Dense and LayerNorm, and Normalize.",
                hint=_TORCH,
            )
    return pooling, width, layers, normalize


def _pooling(folder: Path, *, normalized: bool) -> tuple[str, int]:
    """What is pooled, and how wide it is."""
    path = folder / "config.json"
    config = _read(path)
    modes = list(_modes(config)) or ["mean"]
    width = config.get("word_embedding_dimension") or config.get("embedding_dimension")
    if len(modes) > 1:
        raise UnsupportedModel(
            f"{path} joins {' and '.join(modes)} end to end; the file has room for one pooling.", hint=_TORCH
        )
    # A length that is normalized away makes no difference.
    mode = "mean" if modes[0] == "mean_sqrt_len" and normalized else modes[0]
    if mode not in _POOLINGS:
        raise UnsupportedModel(f"{path} pools by {mode}; converted are {', '.join(_POOLINGS)}.", hint=_TORCH)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise CorruptCheckpoint(f"{path} gives word_embedding_dimension as {width!r}.", hint=_AGAIN)
    return mode, width


def _modes(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("pooling_mode")
    if named is not None:
        for mode in named if isinstance(named, list) else [named]:
            yield {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}.get(str(mode), str(mode))
        return
    for key, mode in _MODES.items():
        if config.get(f"pooling_mode_{key}"):
            yield mode


def _layer(name: str, kind: str, folder: Path, width: int) -> Layer:
    path = folder / "config.json"
    config = _read(path)
    if kind == "LayerNorm":
        return Layer(name, width, width, kind="layer_norm", eps=_NORM_EPS)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedModel(
                f"{path} sets {key} to {config[key]!r}; only whole texts are converted.", hint=_TORCH
            )
    inputs, outputs = config.get("in_features"), config.get("out_features")
    if inputs != width or isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise CorruptCheckpoint(
            f"{path} describes a layer of {inputs} to {outputs}, after one of {width}.", hint=_AGAIN
        )
    function = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if function not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{path} sets activation_function to {function}; converted are {', '.join(_ACTIVATIONS)}.", hint=_TORCH
        )
    return Layer(name, width, outputs, bias=bool(config.get("bias", True)), activation=_ACTIVATIONS[function])


def _limits(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, under whichever of its names it has."""
    for name in _LIMIT_NAMES:
        if values := _read(folder / f"sentence_{name}_config.json"):
            return values
    return {}


def _pools_prompts(modules: list[tuple[str, Path]]) -> bool:
    """Whether a prompt's own tokens are pooled; where they are not, a prompt is more than a text in front."""
    folders = [folder for kind, folder in modules if kind == "Pooling"]
    return all(_read(folder / "config.json").get("include_prompt", True) for folder in folders)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is not valid JSON: {error}.", hint=_AGAIN) from error
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path} does not hold a JSON object.", hint=_AGAIN)
    return values
