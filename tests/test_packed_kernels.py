"""Attention within packed sequences: every kernel computes what one sequence alone would have."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.training.packed_kernels import FLEX, LOOP, VARLEN, Asked, Kernel, kernels_for, learns
from edgetune.training.packing import start_packing
from tests.speed_models import PACKED, adapted_model

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (5, 140, 1, 37)
OPTIONS = [Asked(), Asked(window=7), Asked(scaling=0.5, window=64), Asked(softcap=2.0), Asked(softcap=2.0, window=9)]


def row(heads: int = 4, keys: int = 2, size: int = 16) -> list[Any]:
    import torch

    draw = torch.Generator().manual_seed(3)
    return [torch.randn((1, count, sum(LENGTHS), size), generator=draw) for count in (heads, keys, keys)]


def alone(values: list[Any], asked: Asked) -> Any:
    """Written out: softmax over the tokens of the same sequence that may be seen."""
    import torch

    query, key, value = values
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (asked.scaling or query.shape[-1] ** -0.5)
    if asked.softcap:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.arange(len(number))
    back = at[:, None] - at
    seen = (number[:, None] == number) & (back >= 0) & (back < (asked.window or len(at)))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def documented_varlen(
    query: Any, key: Any, value: Any, starts: Any, _starts: Any, longest: int, _longest: int, *, scale: float | None,
    window_size: tuple[int, int], enable_gqa: bool,
) -> Any:  # fmt: skip
    """What torch documents of `varlen_attn`, which has no kernel for a CPU."""
    import torch

    before, after = window_size
    assert after == 0
    outputs = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - begin <= longest
        at = torch.arange(end - begin)
        back = at[:, None] - at
        mask = (back >= 0) & ((back <= before) | (before < 0))
        q, k, v = (tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", documented_varlen)


@pytest.mark.parametrize("asked", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", [LOOP, VARLEN, FLEX], ids=lambda kernel: kernel.name)
def test_every_kernel_attends_within_each_sequence(kernel: Kernel, asked: Asked, varlen: None) -> None:
    import torch

    query, key, value = values = row()
    if kernel is VARLEN and asked.softcap is not None:
        with pytest.raises(ValueError, match="no soft cap"):
            kernel(query, key, value, LENGTHS, asked)
        return
    with torch.no_grad():
        torch.testing.assert_close(
            kernel(query, key, value, LENGTHS, asked), alone(values, asked), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma2", "gpt2"])
@pytest.mark.usefixtures("varlen")
def test_a_gpu_would_take_the_first_kernel_that_agrees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.training import packing

    monkeypatch.setattr(packing, "kernels_for", lambda device, dtype: (VARLEN, LOOP))
    model = adapted_model(*PACKED[family]).get_base_model()
    assert start_packing(model, model.base_model, longest=64)
    assert model.config._attn_implementation == (LOOP if family == "gemma2" else VARLEN).name


def test_a_kernel_that_sees_other_sequences_or_learns_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crossing:
        name = "crossing"

        def __call__(self, query: Any, key: Any, value: Any, lengths: tuple[int, ...], asked: Asked) -> Any:
            return LOOP(query, key, value, (sum(lengths),), asked)

    class NoGradientForKeys:
        name = "no gradient for keys"

        def __call__(self, query: Any, key: Any, value: Any, lengths: tuple[int, ...], asked: Asked) -> Any:
            return LOOP(query, key.detach() + 0 * key, value, lengths, asked)

    model = adapted_model(*PACKED["llama"]).get_base_model()
    assert learns(LOOP, model)
    assert not learns(Crossing(), model)
    assert not learns(NoGradientForKeys(), model)
    assert not learns(FLEX, model), "FlexAttention learns nothing on a CPU"
    assert not learns(VARLEN, model), "FlashAttention has no kernel for a CPU"


def test_the_kernels_of_a_device() -> None:
    import torch

    assert kernels_for(torch.device("cpu"), torch.bfloat16) == (LOOP,)
    assert kernels_for(torch.device("cuda"), torch.bfloat16) == (VARLEN, FLEX, LOOP)
    assert kernels_for(torch.device("cuda"), torch.float32) == (FLEX, LOOP)
