"""Causal attention within each of the sequences of a row, three ways that compute the same.

`LOOP` runs torch's own attention on one sequence after another: right everywhere, and on a CPU nothing is faster. On a
GPU the many small calls are what takes the time, so there `VARLEN` (torch's FlashAttention for rows of sequences) comes
first and `FLEX` (compiled FlexAttention, which knows soft caps) second, each only after it agreed with `LOOP` on this
machine, gradients included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

_STEP = 32
"""On a CPU, where every shape costs a kernel, `LOOP` attends to a multiple of this; none sees what follows."""


@dataclass(frozen=True)
class Asked:
    """The options of one layer."""

    dropout: float = 0.0
    scaling: float | None = None
    softcap: float | None = None
    window: int | None = None
    """How many tokens are seen, the own one included; None: all before it."""


class Kernel(Protocol):
    """Attention of (1, heads, tokens, size) within sequences of these lengths; returns (1, tokens, heads, size)."""

    @property
    def name(self) -> str:
        """What transformers calls it."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], asked: Asked
    ) -> torch.Tensor:
        """Raises `ValueError` for options it does not know."""


class Loop:
    """One sequence after another."""

    name = "edgetune_packed"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], asked: Asked
    ) -> torch.Tensor:
        """Any options."""
        import torch

        parts = zip(*(torch.split(tensor, list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._one(asked, *part).transpose(1, 2) for part in parts], dim=1)

    def _one(self, asked: Asked, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        import torch

        length = query.shape[2]
        filling = -length % _STEP if query.device.type == "cpu" else 0
        if filling:
            query, key, value = (torch.nn.functional.pad(part, (0, 0, 0, filling)) for part in (query, key, value))
        if asked.window is None or length <= asked.window:
            return attend(asked, query, key, value, None, causal=True)[:, :, :length]
        mask = torch.ones(length + filling, length + filling, dtype=torch.bool, device=query.device)
        mask = mask.tril_().triu_(1 - asked.window)
        return attend(asked, query, key, value, mask, causal=False)[:, :, :length]


class Varlen:
    """FlashAttention over the whole row: 16-bit types on CUDA."""

    name = "edgetune_packed_varlen"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], asked: Asked
    ) -> torch.Tensor:
        """No soft cap; with dropout in the attention, `LOOP` does it."""
        from torch.nn.attention.varlen import varlen_attn

        if asked.softcap is not None:
            raise ValueError("FlashAttention for rows of sequences has no soft cap")
        if asked.dropout:
            return LOOP(query, key, value, lengths, asked)
        starts, longest = _starts(lengths, query.device)
        queries, keys, values = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        # A window of (n, 0) sees n tokens before the own one.
        before = -1 if asked.window is None else asked.window - 1
        output: Any = varlen_attn(
            queries, keys, values, starts, starts, longest, longest, scale=asked.scaling, window_size=(before, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        packed: torch.Tensor = output[None]
        return packed


class Flex:
    """FlexAttention over the whole row: compiled for its mask and soft cap."""

    name = "edgetune_packed_flex"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], asked: Asked
    ) -> torch.Tensor:
        """Any options; with dropout in the attention, `LOOP` does it."""
        if asked.dropout:
            return LOOP(query, key, value, lengths, asked)
        output: torch.Tensor = _flex_attention(query.device.type)(
            query, key, value, score_mod=_capped(asked.softcap) if asked.softcap is not None else None,
            block_mask=_block_mask(lengths, asked.window, query.device),
            scale=asked.scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output.transpose(1, 2).contiguous()


LOOP, VARLEN, FLEX = Loop(), Varlen(), Flex()


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[Kernel, ...]:
    """The kernels to try, the fastest first; `LOOP` is always the last."""
    import torch

    if device.type != "cuda":
        return (LOOP,)
    return (VARLEN, FLEX, LOOP) if dtype in (torch.bfloat16, torch.float16) else (FLEX, LOOP)


_TRIED = (33, 130, 29)
"""Lengths of the sequences a kernel is tried on: whole blocks of 128 tokens and parts of them."""


def learns(kernel: Kernel, model: Any) -> bool:
    """Whether `kernel` has the output and gradients of `LOOP` here, on random values in the model's shape and type."""
    import torch

    if kernel is LOOP:
        return True
    values = _sample(model)
    asked = Asked(softcap=getattr(model.config.get_text_config(), "attn_logit_softcapping", None))
    try:
        found = _gradients(kernel, values, asked)
    except Exception:  # noqa: BLE001  (a compiler or a driver that is missing says so in a dozen types)
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.03
    return all(
        bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())
        for one, other in zip(found, _gradients(LOOP, values, asked), strict=True)
    )


def _sample(model: Any) -> list[torch.Tensor]:
    """Queries, keys and values (1, heads, tokens, size)."""
    import torch

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(_TRIED), size) for count in (heads, keys, keys)]
    return [torch.randn(shape, generator=draw).to(model.device, model.dtype) for shape in shapes]


def _gradients(kernel: Kernel, values: list[torch.Tensor], asked: Asked) -> list[torch.Tensor]:
    """The output, and the gradient of a weighted sum of it for each of `values`."""
    import torch

    query, key, value = (part.clone().requires_grad_() for part in values)
    output = kernel(query, key, value, _TRIED, asked)
    weights = torch.linspace(-1, 1, output.shape[-1], device=output.device)
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), (query, key, value))]


def attend(
    asked: Asked,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Plain attention of (batch, heads, tokens, size), grouped heads repeated; `asked.window` is not looked at."""
    import torch

    if asked.softcap is not None:
        return _attend_capped(asked, query, key, value, mask, asked.softcap, causal=causal)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=asked.dropout, is_causal=causal, scale=asked.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _attend_capped(
    asked: Asked,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """With soft-capped scores, which torch's own attention does not have."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (asked.scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril_()
    if mask is not None:
        # Not minus infinity: a query of padding sees nothing, and its not-a-number would reach the others.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, asked.dropout) @ value


# A row's layers ask for the same: made once a row.
@lru_cache(maxsize=4)
def _starts(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """(sequences + 1,) where each begins and the last one ends, and the longest length."""
    import torch

    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device), max(lengths)


@lru_cache(maxsize=8)
def _block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = sum(lengths) if window is None else window

    def mask(batch: torch.Tensor, head: torch.Tensor, to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return (number[to] == number[source]) & (to >= source) & (to - source < seen)

    return create_block_mask(mask, None, None, sum(lengths), sum(lengths), device=str(device))


@lru_cache(maxsize=1)
def _capped(softcap: float) -> Any:
    import torch

    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


@lru_cache(maxsize=2)
def _flex_attention(device: str) -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
