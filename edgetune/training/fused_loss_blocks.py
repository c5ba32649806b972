"""Cross entropy of a head that lies in a GGUF file's blocks: a few thousand rows of the vocabulary at a time.

Dequantized as a whole, the head would be the largest thing in memory by far: in f32 more than all of a small model's
file. Here the vocabulary is gone through twice, once for every token's softmax sum and once for the gradient, and each
time a piece of the head is dequantized, used for all learned tokens, and let go. No LoRA on the head: that is
`fused_loss`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKENS = 256
"""Tokens whose logits for one piece exist at the same time."""

_STEP = 64
"""Tokens are filled up to a multiple of this: on the CPU, kernels are compiled and kept for every shape."""


def summed_loss(
    hidden: torch.Tensor, labels: torch.Tensor, layer: Any, *, scale: float, cap: float, dtype: torch.dtype
) -> torch.Tensor:
    """The summed cross entropy of `hidden` (tokens, hidden) for the tokens `labels` (tokens,), in f32.

    Logits are cap·tanh(scale·(W·h + b) / cap) with the W of `layer`, multiplied in `dtype`.
    """
    import torch

    loss: torch.Tensor = _function()(hidden, labels, layer, scale, cap, dtype, torch.is_grad_enabled())
    return loss


class _Pieces:
    """Logits of all tokens for one piece of the vocabulary after the other."""

    def __init__(self, rows: torch.Tensor, labels: torch.Tensor, layer: Any, scale: float, cap: float) -> None:
        self.rows, self.labels, self.layer, self.scale, self.cap = rows, labels, layer, scale, cap

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Which tokens, a piece W (n, hidden), their logits (tokens, n) in f32, and their labels within the piece.

        A label outside the piece is -1.
        """
        for at, weight in self.layer.blocks.pieces(self.rows.dtype, self.rows.device):
            bias = None if self.layer.bias is None else self.layer.bias[at : at + len(weight)]
            for begin in range(0, len(self.rows), TOKENS):
                some = slice(begin, begin + TOKENS)
                logits = (self.rows[some] @ weight.t()).float()
                if bias is not None:
                    logits += bias
                if self.scale != 1.0:
                    logits *= self.scale
                if self.cap:
                    logits.div_(self.cap).tanh_().mul_(self.cap)
                places = self.labels[some] - at
                yield some, weight, logits, places.where((places >= 0) & (places < len(weight)), -1)

    def log_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token: log Σ exp(logit) over the vocabulary, and the logit of its label; (tokens,) each."""
        import torch

        highest = torch.full((len(self.rows),), -torch.inf, device=self.rows.device)
        sums, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        for some, _, logits, places in self:
            inside = (places >= 0).nonzero().squeeze(-1)
            chosen[some][inside] = logits[inside, places[inside]]
            top = torch.maximum(highest[some], logits.amax(dim=1))
            sums[some] *= (highest[some] - top).exp()
            sums[some] += logits.sub_(top[:, None]).exp_().sum(dim=1)
            highest[some] = top
        return highest + sums.log(), chosen

    def gradient(self, log_sums: torch.Tensor) -> torch.Tensor:
        """Of the summed loss with respect to the hidden states: (tokens, hidden) in f32."""
        import torch

        grad = torch.zeros_like(self.rows, dtype=torch.float32)
        for some, weight, logits, places in self:
            slope = self._slope(logits)
            logits.sub_(log_sums[some][:, None]).exp_()
            inside = (places >= 0).nonzero().squeeze(-1)
            logits[inside, places[inside]] -= 1.0
            if slope is not None:
                logits *= slope
            grad[some] += logits.to(weight.dtype) @ weight
        return grad

    def _slope(self, logits: torch.Tensor) -> Any:
        """How much a logit moves with W·h; None where it is one."""
        if self.cap:
            return (1 - (logits / self.cap) ** 2).mul_(self.scale)
        return self.scale if self.scale != 1.0 else None


@cache
def _function() -> Any:
    """The node's `apply`. Defined late because its base class is torch's."""
    import torch

    class BlocksCrossEntropy(torch.autograd.Function):
        """hidden (tokens, hidden), labels (tokens,); the head is frozen."""

        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            labels: torch.Tensor,
            layer: Any,
            scale: float,
            cap: float,
            dtype: torch.dtype,
            with_gradient: bool,
        ) -> torch.Tensor:
            tokens, filling = len(hidden), -len(hidden) % _STEP
            rows = torch.nn.functional.pad(hidden.detach().to(dtype), (0, 0, 0, filling))
            pieces = _Pieces(rows, torch.nn.functional.pad(labels, (0, filling), value=-1), layer, scale, cap)
            log_sums, chosen = pieces.log_sums()
            wanted = with_gradient and ctx.needs_input_grad[0]
            ctx.grad = pieces.gradient(log_sums)[:tokens].to(hidden.dtype) if wanted else None
            return (log_sums - chosen)[:tokens].sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            formed, ctx.grad = ctx.grad, None
            assert formed is not None, "the gradient is formed once"
            return formed.mul_(grad), None, None, None, None, None, None

    return BlocksCrossEntropy.apply
