"""Puts the weights in a GGUF file into an empty transformers model: matrices stay in their blocks, vectors are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.gguf_tensors import GgufTensors
from edgetune.training.gguf_base.blocks import Blocks, join
from edgetune.training.gguf_base.experts import DOWN, GATE_UP, BlockExperts
from edgetune.training.gguf_base.modules import BlockEmbedding, BlockLinear

_HINT = "Train on the Hugging Face directory that it was made from."


class Filler:
    """Fills a model on torch's meta device from the file at `path`."""

    def __init__(
        self,
        path: Path,
        tensors: GgufTensors,
        places: Mapping[str, Sequence[Any]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`places`: a weight's name → the pieces it is made of, as the export bridge tells them."""
        self.path, self.tensors, self.places = path, tensors, places
        self.dtype, self.device = dtype, device

    def fill(self, model: Any) -> None:
        """Every weight of `model`.

        Raises `UnsupportedError` for one that cannot be used from blocks, `CorruptFileError` for one of another shape.
        """
        from transformers.pytorch_utils import Conv1D

        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and _name_of(model, head) + ".weight" not in self.places
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Embedding) and f"{name}.weight" in self.places:
                scale = float(getattr(module, "embed_scale", 1.0))
                table = self._blocks(f"{name}.weight", module.weight.shape)
                _replace(model, name, BlockEmbedding(table, scale=scale, dtype=self.dtype, device=self.device))
                if tied and module is embedding:
                    _replace(
                        model, _name_of(model, head), BlockLinear(table, None, dtype=self.dtype, device=self.device)
                    )
            elif type(module) in (torch.nn.Linear, Conv1D) and f"{name}.weight" in self.places:
                bias = self._vector(f"{name}.bias", module.bias.shape) if module.bias is not None else None
                matrix = self._blocks(f"{name}.weight", module.weight.shape)
                _replace(model, name, BlockLinear(matrix, bias, dtype=self.dtype, device=self.device))
            elif all(f"{name}.{stack}" in self.places for stack in (GATE_UP, DOWN)):
                _replace(model, name, self._experts(name, module))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                _replace(model, name, self._parameter(name, parameter))

    def _parameter(self, name: str, parameter: torch.Tensor) -> torch.nn.Parameter:
        if name not in self.places or len(parameter.shape) > 2:
            raise UnsupportedError(
                f"{name} of the model in {self.path} is neither a linear layer's nor an embedding's, and is not used "
                "from a GGUF file's blocks.",
                hint=_HINT,
            )
        if len(parameter.shape) == 2:  # a router's: small, and always kept exactly
            values = self._blocks(name, parameter.shape).matrix(self.dtype, self.device)
        else:
            values = self._vector(name, parameter.shape)
        return torch.nn.Parameter(values.to(self.device, self.dtype), requires_grad=False)

    def _experts(self, name: str, module: Any) -> BlockExperts:
        experts, hidden, inner = module.down_proj.shape
        parts = [*self.places[f"{name}.{GATE_UP}"], *self.places[f"{name}.{DOWN}"]]
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        stacks = [self._stack(name, part, experts, shape) for part, shape in zip(parts, shapes, strict=True)]
        gate, up, down = stacks
        return BlockExperts(gate, up, down, act_fn=module.act_fn, dtype=self.dtype, device=self.device)

    def _stack(self, name: str, piece: Any, experts: int, shape: tuple[int, int]) -> list[Blocks]:
        """The matrices of all experts, each of `shape`."""
        self._check(name, self.tensors.shape(piece.tensor), (experts, *shape))
        raw, kind = self.tensors.raw(piece.tensor), self.tensors.type(piece.tensor)
        return [Blocks(raw[at * shape[0] : (at + 1) * shape[0]], kind, shape[1]) for at in range(experts)]

    def _blocks(self, name: str, shape: Sequence[int]) -> Blocks:
        """The matrix `name`, which has `shape` in the model."""
        parts = []
        for piece in self.places[name]:
            if piece.factor != 1.0:
                raise UnsupportedError(f"{name} was rescaled on its way into {self.path}.", hint=_HINT)
            if len(self.tensors.shape(piece.tensor)) != 2:
                self._check(name, self.tensors.shape(piece.tensor), shape)
            raw = self.tensors.raw(piece.tensor)
            rows = np.arange(len(raw)) if piece.rows is None else piece.rows
            if rows.max() >= len(raw):
                self._check(name, self.tensors.shape(piece.tensor), shape)
            raw = raw if piece.rows is None else raw[rows]
            parts.append(Blocks(raw, self.tensors.type(piece.tensor), self.tensors.shape(piece.tensor)[-1]))
        result = join(parts)
        turned = any(piece.turned for piece in self.places[name])
        self._check(name, result.shape, tuple(reversed(shape)) if turned else shape)
        return result

    def _vector(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        parts = []
        for piece in self.places[name]:
            values = self.tensors.read(piece.tensor).reshape(-1)
            if piece.rows is not None and piece.rows.max() < len(values):
                values = values[piece.rows]
            parts.append(values * np.float32(piece.factor) + np.float32(piece.add))
        values = np.concatenate(parts)
        self._check(name, values.shape, shape)
        return torch.from_numpy(values)

    def _check(self, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            sizes = [" x ".join(map(str, shape)) for shape in (found, expected)]
            raise CorruptFileError(
                f"{name} in {self.path} is {sizes[0]}, by the model's config {sizes[1]}.",
                hint="Convert or download it again.",
            )


def _name_of(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _replace(model: Any, name: str, value: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, value)
