"""The losses of preference tuning, from log-probabilities of whole replies; each gives one number a pair (or a reply).

Pure functions of tensors: no model, no settings. "Sum" is the log-probability of a reply, "mean" that of a token of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    base_chosen: torch.Tensor,
    base_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-log σ(β·Δ), Δ how much more of the chosen than of the rejected reply's sum the adapter gained on the base.

    Rafailov et al. 2023, eq. 7. `label_smoothing`: the share of pairs taken to be the wrong way round (Mitchell 2023).
    """
    return _smoothed(beta * ((chosen - base_chosen) - (rejected - base_rejected)), label_smoothing)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    base_chosen: torch.Tensor,
    base_rejected: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """(Δ - 1 / 2β)², Azar et al. 2023, eq. 17; of means, as its authors advise for replies of different lengths."""
    delta = (chosen - base_chosen) - (rejected - base_rejected)
    return (delta - 1 / (2 * beta)) ** 2


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, *, weight: float) -> torch.Tensor:
    """-mean(chosen) - λ·log σ(log odds of chosen - log odds of rejected), odds p / (1 - p) of p = exp(mean).

    Hong et al. 2024, eq. 6 and 7.
    """
    import torch

    odds = (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return -chosen - weight * torch.nn.functional.logsigmoid(odds)


def simpo(
    chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log σ(β·(mean of chosen - mean of rejected) - γ), Meng et al. 2024, eq. 6."""
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def kto(
    gain: torch.Tensor, good: torch.Tensor, zero: torch.Tensor, *, beta: float, good_weight: float, bad_weight: float
) -> torch.Tensor:
    """λ·(1 - σ(±β·(gain - zero))), Ethayarajh et al. 2024, eq. 8.

    `gain` (replies,): the sum's gain on the base; `good` (replies,): + where true; `zero`: the estimate of how far the
    adapter is from the base, at least 0, without a gradient.
    """
    import torch

    side = torch.where(good, 1.0, -1.0).to(gain.dtype)
    weight = torch.where(good, good_weight, bad_weight).to(gain.dtype)
    return weight * (1 - torch.sigmoid(side * beta * (gain - zero)))


def _smoothed(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    import torch

    right = torch.nn.functional.logsigmoid(logits)
    if not label_smoothing:
        return -right
    return -(1 - label_smoothing) * right - label_smoothing * torch.nn.functional.logsigmoid(-logits)


def _log_one_minus_exp(logarithm: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Mächler 2012)."""
    import torch

    # A reply the model is certain of has x = 0, whose odds are infinite.
    x = logarithm.clamp(max=-torch.finfo(torch.float32).eps)
    near = x > -0.6931471805599453
    # Both branches get a gradient; each is fed a number at which it has one.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
