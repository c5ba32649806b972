"""LoRA on a frozen linear layer as one autograd node: y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.

PEFT composes this of five nodes, which keep copies of x in other types and cast them back and forth. This one keeps x
and x·Aᵀ alone, in the type the base computes in, and forms no gradient that nobody asked for. The adapter itself stays
in f32. Layers it does not compute exactly (dropout, DoRA and other variants, quantized bases) keep PEFT's own forward.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def fuse_lora(adapted: Any) -> int:
    """Let every plain LoRA layer of `adapted` compute through the fused node; returns how many there are."""
    from peft.tuners.lora.layer import Linear

    layers = [module for module in adapted.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = FusedForward(layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """Whether `layer` computes nothing but W, b, A, B and a scale, now and in training."""
    import torch

    (name, *others) = layer.active_adapters
    base = layer.get_base_layer()
    return (
        not others
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and is_plain_linear(base)
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def is_plain_linear(layer: Any) -> bool:
    """Whether `layer` is x·Wᵀ + b with a W of numbers, kept as such or in a GGUF file's blocks."""
    import torch

    if type(layer) is torch.nn.Linear:
        return bool(layer.weight.is_floating_point())
    return isinstance(layer, torch.nn.Linear) and hasattr(layer, "blocks")


class FusedForward:
    """The forward of one layer; PEFT's own where the adapter is switched off, merged or mixed."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original = layer, layer.forward
        self.name = layer.active_adapters[0]
        self.function = fused_linear()

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, name = self.layer, self.name
        base = layer.get_base_layer()
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            result: torch.Tensor = self.original(x, *args, **kwargs)
            return result
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        fused: torch.Tensor = self.function(x, base, a, b, layer.scaling[name])
        return fused


@cache
def fused_linear() -> Any:
    """The node's `apply`. Defined late because its base class is torch's."""
    import torch

    class LoraLinear(torch.autograd.Function):
        """x (…, in), a linear layer with W (out, in), A (rank, in), B (out, rank).

        W is asked for twice and not kept: a base in quantized blocks makes it anew each time.
        """

        @staticmethod
        def forward(
            ctx: Any,
            x: torch.Tensor,
            base: Any,
            a: torch.Tensor,
            b: torch.Tensor,
            scale: float,
        ) -> torch.Tensor:
            weight = base.weight
            dtype = weight.dtype
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            low = rows @ a.to(dtype).t()  # (tokens, rank)
            out = torch.nn.functional.linear(rows, weight, base.bias)
            out.addmm_(low, b.to(dtype).t(), alpha=scale)
            ctx.save_for_backward(rows, low, a, b)
            ctx.base, ctx.scale, ctx.shape, ctx.dtype, ctx.computed = base, scale, x.shape, x.dtype, dtype
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            rows, low, a, b = ctx.saved_tensors
            dtype = ctx.computed
            grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
            grad_low = (grad @ b.to(dtype)).mul_(ctx.scale)  # (tokens, rank)
            grad_a = (grad_low.t() @ rows).to(a.dtype) if ctx.needs_input_grad[2] else None
            grad_b = (grad.t() @ low).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ ctx.base.weight).addmm_(grad_low, a.to(dtype)).to(ctx.dtype).view(ctx.shape)
            return grad_x, None, grad_a, grad_b, None

    return LoraLinear.apply
