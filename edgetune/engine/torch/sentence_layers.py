"""The weights of what stands after the pooling in a sentence-transformers directory, for a model that runs in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import CorruptFileError
from edgetune.head import HeadLayer
from edgetune.sentence_modules import LayerFiles


def load_layer(layer: LayerFiles) -> HeadLayer:
    """`layer` with its weights. Raises `CorruptFileError` when they are not there."""
    tensors = _tensors(layer.folder)
    part = "linear" if layer.kind == "dense" else "norm"
    try:
        weight, bias = tensors[f"{part}.weight"], tensors.get(f"{part}.bias")
    except KeyError as error:
        raise CorruptFileError(f"{layer.folder} lacks the tensor {part}.weight.", hint="Get it again.") from error
    return HeadLayer(layer.kind, weight, bias, layer.activation)


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
