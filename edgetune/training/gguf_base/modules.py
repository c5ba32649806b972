"""Layers that compute with matrices in blocks: dequantized in the forward pass, let go, and again in the backward pass.

To PEFT and to everything else they are linear layers and embeddings; `weight` gives the numbers to whoever asks.
"""

from __future__ import annotations

from typing import Any

import torch

from edgetune.training.gguf_base.blocks import Blocks

_K_BLOCK = 256
_SMALL = ("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`x` (…, n) as llama.cpp rounds it before it multiplies with a matrix of type `kind`.

    To the matrix's own type where that is a float, else to 8 bits, 32 or 256 numbers with one scale.
    """
    if kind in _FLOATS:
        most = torch.finfo(_FLOATS[kind]).max
        return x.clamp(-most, most).to(_FLOATS[kind]).to(x.dtype)
    parts = x.reshape(*x.shape[:-1], -1, 32 if kind in _SMALL else _K_BLOCK)
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (torch.round(parts / scale) * scale).view(x.shape)


class _LinearFunction(torch.autograd.Function):
    """y = x·Wᵀ + b of a frozen W; keeps nothing of W, of which no more than a piece exists at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocks: Blocks, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.blocks = blocks
        out = x.new_empty(*x.shape[:-1], blocks.shape[0])
        for at, weight in blocks.pieces(x.dtype, x.device):
            out[..., at : at + len(weight)] = x @ weight.t()
        return out if bias is None else out.add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_x = grad.new_zeros(*grad.shape[:-1], ctx.blocks.columns, dtype=torch.float32)
        for at, weight in ctx.blocks.pieces(grad.dtype, grad.device):
            grad_x += grad[..., at : at + len(weight)] @ weight
        return grad_x.to(grad.dtype), None, None


class InBlocks:
    """What layers in blocks share."""

    dtype: torch.dtype
    """What their numbers are computed in."""
    device: torch.device
    rounds = False
    """Whether inputs are rounded as llama.cpp does before it multiplies."""

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype) if torch.is_autocast_enabled(self.device.type) else x

    def _product(self, x: torch.Tensor, blocks: Blocks, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x·Wᵀ + b, (…, in) → (…, out)."""
        if self.rounds:
            x = _rounded(x, blocks.kind)
        result: torch.Tensor = _LinearFunction.apply(x, blocks, bias)  # type: ignore[no-untyped-call]
        return result


class BlockLinear(InBlocks, torch.nn.Linear):
    """A frozen linear layer whose matrix stays in its blocks."""

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, *, dtype: torch.dtype, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = blocks.shape
        self.blocks, self.dtype, self.device = blocks, dtype, device
        self.bias = None if bias is None else torch.nn.Parameter(bias.to(device, dtype), requires_grad=False)  # type: ignore[assignment]

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, dequantized: (out, in)."""
        return self.blocks.matrix(dtype, self.device)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix, dequantized anew each time: (out, in)."""
        return self.numbers(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)"""
        return self._product(self._prepared(input), self.blocks, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: the matrix is the file's."""


class BlockEmbedding(InBlocks, torch.nn.Embedding):
    """A frozen embedding whose table stays in its blocks; only the rows asked for are dequantized."""

    def __init__(self, blocks: Blocks, *, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.blocks, self.scale, self.dtype, self.device = blocks, scale, dtype, device
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table, dequantized anew each time: (vocabulary, hidden)."""
        return self.blocks.matrix(self.dtype, self.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…) ids → (…, hidden)"""
        rows = self.blocks.rows(input.reshape(-1), self.dtype, self.device).view(*input.shape, -1)
        return rows * self.scale if self.scale != 1.0 else rows

    def reset_parameters(self) -> None:
        """Nothing: the table is the file's."""
