"""torch.compile of the layer that a model repeats, where it is asked for (`--torch-compile`).

Its code is compiled once for all layers and lengths. Attention within packed sequences stays as it is: it runs on one
sequence after another, whose lengths a compiled graph would have to be made anew for. Names of weights, checkpoints and
gradient checkpointing do not change; rounding does, so that a resumed run equals an uninterrupted one no longer bit for
bit. What cannot be compiled here runs as it is, and that is said once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from edgetune.events import Notice, Sink
from edgetune.training.fused_lora import FusedForward, fused_linear

if TYPE_CHECKING:
    import torch


def compile_layers(adapted: Any, try_step: Callable[[], None], sink: Sink) -> bool:
    """Compile the repeated layers of `adapted`; whether `try_step`, a forward and backward pass, runs with them."""
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        sink(Notice(f"The layers are not compiled: transformers names none of a {type(base).__name__}.", "warning"))
        return False
    _share_code(base)
    try:
        for layer in layers:
            layer.compile(dynamic=True)
        try_step()
        return True
    except Exception as error:  # noqa: BLE001  (a compiler that is missing says so in a dozen types)
        for layer in layers:
            layer._compiled_call_impl = None
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160].rstrip(".")
        sink(Notice(f"The layers are not compiled: {reason}.", "warning"))
        return False


def _share_code(base: Any) -> None:
    """Leave nothing in the layers that is one layer's own: each such thing would be compiled again."""
    import torch
    from transformers import AttentionInterface

    for module in base.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.forward
            module.__class__ = _fused_class()
    name = base.config._attn_implementation
    if name.startswith("edgetune_packed"):
        attention = AttentionInterface()[name]

        def outside(*args: Any, **kwargs: Any) -> Any:
            return attention(*args, **kwargs)

        AttentionInterface.register(name, torch.compiler.disable(outside))  # type: ignore[no-untyped-call]


@cache
def _fused_class() -> Any:
    """PEFT's LoRA layer, computed by the fused node. Defined late because its base class is PEFT's."""
    from peft.tuners.lora.layer import Linear

    function = fused_linear()

    class FusedLinear(Linear):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            names = self.active_adapters
            if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
                result: torch.Tensor = super().forward(x, *args, **kwargs)
                return result
            name = names[0]
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            fused: torch.Tensor = function(x, self.get_base_layer(), a, b, self.scaling[name])
            return fused

    return FusedLinear
