"""Pooling, and what follows it in a sentence-transformers directory, for models that run or are trained in torch."""

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


def pool(states: Any, lengths: Any, mode: str) -> Any:
    """(n, width, hidden) → (n, hidden) by `mode`, one of `sentence_modules.MODES`; rows are filled up on the right."""
    import torch

    if mode == "cls":
        return states[:, 0]
    if mode == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    states = states.float()
    inside = torch.arange(states.shape[1], device=states.device)[None, :] < lengths[:, None]
    if mode == "max":
        return states.masked_fill(~inside[:, :, None], -torch.inf).amax(dim=1)
    weights = inside.float()
    if mode == "weightedmean":
        weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)
    total = (states * weights[:, :, None]).sum(dim=1)
    counted = weights.sum(dim=1, keepdim=True)
    return total / (counted.sqrt() if mode == "mean_sqrt_len" else counted)


def apply_layer(layer: HeadLayer, rows: Any) -> Any:
    """(n, in) → (n, out) in torch, on the rows' device; gradients go to the rows alone."""
    import torch

    functions: Any = torch.nn.functional
    weight, bias = (
        None if one is None else torch.from_numpy(one).to(rows.device) for one in (layer.weight, layer.bias)
    )
    if layer.kind == "dense":
        rows = functions.linear(rows, weight, bias)
    else:
        rows = functions.layer_norm(rows, rows.shape[-1:], weight, bias, layer.eps)
    return rows if layer.activation == "none" else getattr(functions, layer.activation)(rows)


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
