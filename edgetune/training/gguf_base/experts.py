"""A mixture's experts in blocks: one module for those of a layer, as in transformers, and LoRA on each of them.

PEFT adapts a stack of matrices by adding all of B·A to all of it, which would make the whole stack in every pass. Here
an expert's blocks are dequantized when tokens chose it, and its A and B are applied to those tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from edgetune.training.gguf_base.blocks import Blocks
from edgetune.training.gguf_base.modules import InBlocks

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""transformers' names of the stacks: gates above ups (experts, 2 · inner, hidden), downs (experts, hidden, inner)."""

Change = tuple[torch.Tensor, torch.Tensor, float]
"""LoRA of a stack: B (experts, out, rank), A (experts, rank, in), and a scale."""


class BlockExperts(InBlocks, torch.nn.Module):
    """The experts of one layer, each a gated feed-forward; only those that are chosen are dequantized."""

    def __init__(
        self,
        gate: Sequence[Blocks],
        up: Sequence[Blocks],
        down: Sequence[Blocks],
        *,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`gate` and `up` (inner, hidden) and `down` (hidden, inner), one of each for every expert."""
        torch.nn.Module.__init__(self)
        self.gate, self.up, self.down, self.act_fn = gate, up, down, act_fn
        self.dtype, self.device = dtype, device
        inner, hidden = gate[0].shape
        # PEFT takes shapes, dtype and device from parameters; these hold one number each.
        for name, shape in ((GATE_UP, (len(gate), 2 * inner, hidden)), (DOWN, (len(gate), hidden, inner))):
            stand_in = torch.zeros((), device=device).expand(shape)
            self.register_parameter(name, torch.nn.Parameter(stand_in, requires_grad=False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        changes: Mapping[str, Change] = {},
    ) -> torch.Tensor:
        """States (tokens, hidden), the experts chosen for each and their shares (tokens, chosen) → (tokens, hidden).

        `changes`: stack → what an adapter adds to it.
        """
        out = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            tokens, places = torch.where(top_k_index == expert)
            x = self._prepared(hidden_states[tokens])
            gate, up = self._product(x, self.gate[expert]), self._product(x, self.up[expert])
            if GATE_UP in changes:
                more = _changed(x, changes[GATE_UP], expert).chunk(2, dim=-1)
                gate, up = gate + more[0], up + more[1]
            inner = self.act_fn(gate) * up
            result = self._product(inner, self.down[expert])
            if DOWN in changes:
                result = result + _changed(inner, changes[DOWN], expert)
            out = out.index_add(0, tokens, (result * top_k_weights[tokens, places, None]).to(out.dtype))
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> BlockExperts:
        """Nothing is moved or cast: the stand-ins would be written out at full size."""
        return self


def _changed(x: torch.Tensor, change: Change, expert: int) -> torch.Tensor:
    b, a, scale = change
    result: torch.Tensor = (x @ a[expert].t().to(x.dtype)) @ b[expert].t().to(x.dtype) * scale
    return result


def adapt_experts(adapted: Any) -> None:
    """Let the adapter that PEFT put on experts in blocks compute expert by expert."""
    from peft.tuners.lora.layer import ParamWrapper

    for module in adapted.modules():
        if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), BlockExperts):
            module.forward = _Forward(module)


class _Forward:
    """In place of the forward of PEFT's wrapper of a stack, which may stand in another one."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def __call__(self, x: torch.Tensor, *args: Any, changes: Mapping[str, Change] = {}) -> torch.Tensor:
        one = self.wrapper
        if not one.disable_adapters:
            (name,) = one.active_adapters
            changes = {**changes, one.parameter_name: one.get_delta_factors(name)}
        result: torch.Tensor = one.base_layer(x, *args, changes=changes)
        return result
