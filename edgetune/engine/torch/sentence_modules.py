"""What a sentence-transformers directory says beside the model in it: pooling, dense layers, limits, prompts.

Read for the model that runs in torch, which does more of it than a GGUF file can say. Refuses modules it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.head import HeadLayer

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
MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")
"""Poolings that sentence-transformers has."""


@dataclass(frozen=True)
class SentenceModules:
    """The directory's modules, put together."""

    transformer_dir: Path
    modes: tuple[str, ...] = ("mean",)
    """What is pooled; several are joined end to end."""
    layers: tuple[HeadLayer, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""


def read_modules(model_dir: Path) -> SentenceModules | None:
    """The modules of `model_dir`; None when it is no sentence-transformers directory.

    Raises `CorruptFileError` for files that cannot be read, `UnsupportedError` for an unknown module.
    """
    if not (model_dir / "modules.json").is_file():
        return None
    listed = _read(model_dir / "modules.json")
    transformer, normalize = model_dir, False
    modes: tuple[str, ...] = ("mean",)
    layers: list[HeadLayer] = []
    for module in listed if isinstance(listed, list) else []:
        kind, folder = str(module.get("type", "")).rpartition(".")[2], model_dir / str(module.get("path") or "")
        if model_dir.resolve() not in (folder.resolve(), *folder.resolve().parents):
            raise CorruptFileError(f"{model_dir / 'modules.json'} leads out of its directory.", hint="Get it again.")
        if kind == "Transformer":
            transformer = folder
        elif kind == "Pooling":
            modes = _modes(folder)
        elif kind in ("Dense", "LayerNorm"):
            layers.append(_layer(kind, folder))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Dropout":
            raise UnsupportedError(f"{model_dir} has the sentence-transformers module {kind}, which is unknown here.")
    limits = _read(transformer / "sentence_bert_config.json") or {}
    prompts = _read(model_dir / "config_sentence_transformers.json") or {}
    named = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items() if text}
    limit = limits.get("max_seq_length")
    return SentenceModules(
        transformer,
        modes,
        tuple(layers),
        normalize,
        limit if isinstance(limit, int) and limit > 0 else None,
        bool(limits.get("do_lower_case")),
        named,
        str(prompts.get("default_prompt_name") or "") if prompts.get("default_prompt_name") in named else "",
    )


def _modes(folder: Path) -> tuple[str, ...]:
    config = _read(folder / "config.json") or {}
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


def _layer(kind: str, folder: Path) -> HeadLayer:
    config = _read(folder / "config.json") or {}
    function = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if kind == "Dense" and function not in _ACTIVATIONS:
        raise UnsupportedError(f"{folder} has the activation {function}, which is unknown here.")
    tensors = _tensors(folder)
    part = "linear" if kind == "Dense" else "norm"
    try:
        weight, bias = tensors[f"{part}.weight"], tensors.get(f"{part}.bias")
    except KeyError as error:
        raise CorruptFileError(f"{folder} lacks the tensor {part}.weight.", hint="Get it again.") from error
    if kind == "Dense":
        return HeadLayer("dense", weight, bias, _ACTIVATIONS[function])
    return HeadLayer("layer_norm", weight, bias)


def _tensors(folder: Path) -> dict[str, Any]:
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        found = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        import torch

        found = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise CorruptFileError(f"{folder} holds no weights.", hint="Get it again.")
    return {name: np.asarray(tensor.float().numpy(), np.float32) for name, tensor in found.items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint="Get it again.") from error
