"""What a sentence-transformers directory says beside the model in it: pooling, layers after it, limits, prompts.

More than a GGUF file can say of it; modules that are unknown are refused. Loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.gguf_header import GgufHeader
from edgetune.paths import write_json

_ACTIVATIONS = {
    "Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid",
}  # fmt: skip
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_NEW_MODES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_LIMIT_NAMES = ("bert", "roberta", "distilbert", "camembert", "xlm-roberta", "albert", "xlnet")
"""In the name of the file with the limits, as saved by older and newer versions."""
_PROMPT_PREFIX = "edgetune.prompts."
"""GGUF metadata: what is put before a text, by the name of its purpose."""
MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")
"""Poolings that sentence-transformers has."""


@dataclass(frozen=True)
class LayerFiles:
    """A layer after the pooling, not loaded."""

    kind: Literal["dense", "layer_norm"]
    folder: Path
    """Where its weights are."""
    activation: str = "none"


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What texts are made ready with."""

    max_tokens: int | None = None
    """Tokens after which a text is cut; None where nothing is said of it."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by the name of its purpose."""
    default_prompt: str = ""
    """The name of the one that is used unless another is named."""


@dataclass(frozen=True)
class SentenceModules(Prompting):
    """The directory's modules, put together."""

    transformer_dir: Path
    modes: tuple[str, ...] = ("mean",)
    """What is pooled; several are joined end to end."""
    layers: tuple[LayerFiles, ...] = ()
    normalize: bool = False
    lower_case: bool = False


def read_modules(model_dir: Path) -> SentenceModules | None:
    """The modules of `model_dir`; None when it is no sentence-transformers directory.

    Raises `CorruptFileError` for files that cannot be read, `UnsupportedError` for an unknown module.
    """
    if not (model_dir / "modules.json").is_file():
        return None
    listed = _read(model_dir / "modules.json")
    transformer, normalize = model_dir, False
    modes: tuple[str, ...] = ("mean",)
    layers: list[LayerFiles] = []
    if not isinstance(listed, list) or not listed:
        raise CorruptFileError(f"{model_dir / 'modules.json'} lists no modules.", hint="Get it again.")
    for module in listed:
        if not isinstance(module, dict):
            raise CorruptFileError(f"{model_dir / 'modules.json'} lists {module!r}.", hint="Get it again.")
        kind, folder = str(module.get("type", "")).rpartition(".")[2], model_dir / str(module.get("path") or "")
        if model_dir.resolve() not in (folder.resolve(), *folder.resolve().parents):
            raise CorruptFileError(f"{model_dir / 'modules.json'} leads out of its directory.", hint="Get it again.")
        if kind in ("Transformer", "Pooling", "Dense", "LayerNorm") and not folder.is_dir():
            raise CorruptFileError(f"{model_dir} lacks the directory {folder} of its {kind}.", hint="Get it again.")
        if kind == "Transformer":
            transformer = folder
        elif kind == "Pooling":
            modes = _modes(folder)
        elif kind in ("Dense", "LayerNorm"):
            layers.append(_layer(kind, folder))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Dropout":
            raise UnsupportedError(
                f"{model_dir} has the sentence-transformers module {kind}, which is unknown here.",
                hint="Encode with sentence-transformers itself.",
            )
    limits = _limits(transformer)
    prompts = _object(model_dir / "config_sentence_transformers.json")
    texts, default = prompts.get("prompts"), prompts.get("default_prompt_name")
    named = {str(name): str(text) for name, text in texts.items() if text} if isinstance(texts, dict) else {}
    limit = limits.get("max_seq_length")
    return SentenceModules(
        transformer,
        modes,
        tuple(layers),
        normalize,
        bool(limits.get("do_lower_case")),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
        prompts=named,
        default_prompt=default if isinstance(default, str) and default in named else "",
    )


def lower_cases(model_dir: Path) -> bool:
    """Whether texts are lower-cased before the tokenizer of the model in `model_dir` sees them."""
    return (model_dir / "modules.json").is_file() and bool(_limits(model_dir).get("do_lower_case"))


def write_pooling(model_dir: Path, pooling: str, width: int) -> None:
    """Let the files in `model_dir` say that states of `width` are pooled by `pooling`, one of `MODES`."""
    listed = model_dir / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    if not modules:
        for number, (kind, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling"))):
            kind = f"sentence_transformers.models.{kind}"
            modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
        write_json(listed, modules)
    folder = next(
        (model_dir / one["path"] for one in modules if str(one["type"]).rpartition(".")[2] == "Pooling"), None
    )
    if folder is not None:
        folder.mkdir(exist_ok=True)
        modes = {key: mode == pooling for key, mode in _OLD_MODES.items()}
        write_json(folder / "config.json", {"word_embedding_dimension": width, **modes})


def read_prompting(header: GgufHeader) -> Prompting:
    """What a GGUF file records of it."""
    metadata = header.metadata
    limit = metadata.get("edgetune.tokenizer.max_length")
    return Prompting(
        max_tokens=int(limit) if isinstance(limit, int | float) and limit > 0 else None,
        prompts={
            key.removeprefix(_PROMPT_PREFIX): str(value)
            for key, value in metadata.items()
            if key.startswith(_PROMPT_PREFIX)
        },
        default_prompt=str(metadata.get("edgetune.default_prompt", "")),
    )


def _limits(transformer_dir: Path) -> dict[str, Any]:
    found = (_object(transformer_dir / f"sentence_{name}_config.json") for name in _LIMIT_NAMES)
    return next(filter(None, found), {})


def _modes(folder: Path) -> tuple[str, ...]:
    config = _object(folder / "config.json")
    named = config.get("pooling_mode")
    if named is None:
        modes = [mode for key, mode in _OLD_MODES.items() if config.get(key)]
    else:
        modes = [_NEW_MODES.get(str(mode), str(mode)) for mode in (named if isinstance(named, list) else [named])]
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UnsupportedError(f"{folder} pools by {unknown[0]!r}, which is unknown here.")
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{folder} pools without the tokens of the prompt, which is not done here.")
    return tuple(modes) or ("mean",)


def _layer(kind: str, folder: Path) -> LayerFiles:
    if kind == "LayerNorm":
        return LayerFiles("layer_norm", folder)
    config = _object(folder / "config.json")
    function = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if function not in _ACTIVATIONS:
        raise UnsupportedError(f"{folder} has the activation {function}, which is unknown here.")
    return LayerFiles("dense", folder, _ACTIVATIONS[function])


def _object(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    found = _read(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} does not hold a JSON object.", hint="Get it again.")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint="Get it again.") from error
