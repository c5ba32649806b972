"""How much memory a training step takes, from a model without weights: what it keeps for its backward pass is traced.

The model, with its adapter, stands on torch's meta device and goes through one forward pass there, which computes
nothing; every tensor that autograd keeps is counted once. Weights, gradients, the optimizer's moments and the head's
chunk of logits are known from shapes. The rest, which torch and its libraries take by themselves, is what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetune.training.fused_loss import CHUNK
from edgetune.training.model import text_config

if TYPE_CHECKING:
    import torch

_TRACED = "edgetune_traced"
"""The name of the attention that keeps what a memory-saving one keeps, and computes nothing."""

_ADAPTER_BYTES = 16
"""A trained parameter: itself, its gradient and two moments, in f32."""

_RUNTIME = 800e6
"""torch, transformers, PEFT and their libraries in a process that trains on the CPU."""

_KERNELS = 0.25
"""What the allocator and oneDNN's compiled kernels hold on the CPU, as a share of what a step allocates and frees."""


HEADROOM = 0.9
"""Share of the free memory that a run may be meant to take."""


@dataclass(frozen=True)
class Memory:
    """Bytes at a step's highest point, by what they are for."""

    weights: int
    """The frozen base."""
    adapter: int
    """What is trained, with gradients and moments."""
    activations: int
    """Kept for the backward pass."""
    loss: int
    """Logits and their gradient."""
    runtime: int
    """Libraries, their buffers, the allocator's slack."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.loss + self.runtime


def estimate(
    adapted: Any,
    *,
    rows: int,
    length: int,
    learned: int,
    checkpointing: bool,
    fused: bool,
    on_cpu: bool,
    frozen_bytes: int | None = None,
    written: int = 0,
    outputs: int | None = None,
) -> Memory:
    """Memory of a step whose largest pass has `rows` rows of `length` tokens, `learned` of them with a loss.

    `adapted` stands on the meta device. `fused`: whether head and loss are computed in chunks. `frozen_bytes`: of the
    base where it is not kept as it computes (in quantized blocks). `written`: tokens of a row that an
    encoder-decoder's decoder reads. `outputs`: logits of each thing learned, by default one for each token there is.
    """
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    kept, itemsize = kept_bytes(adapted, rows=rows, length=length, written=written)
    config = text_config(adapted.config)
    outputs = config.vocab_size if outputs is None else outputs
    if checkpointing:
        layers = config.num_hidden_layers
        # Each layer's input, and everything of the one layer that is being computed again.
        kept = rows * (length + written) * config.hidden_size * itemsize * layers + kept // layers
    tokens = min(learned, CHUNK) if fused else learned
    loss = tokens * outputs * (itemsize + (0 if fused else 8)) + outputs * 64
    weights = frozen_bytes if frozen_bytes is not None else sum(p.numel() * p.itemsize for p in frozen)
    slack = int(_RUNTIME + _KERNELS * (kept + loss)) if on_cpu else int(0.1 * (kept + loss))
    return Memory(weights, trained * _ADAPTER_BYTES, kept, loss, slack)


def kept_bytes(adapted: Any, *, rows: int, length: int, written: int = 0) -> tuple[int, int]:
    """Bytes that autograd keeps of a pass through the model without its head, and the bytes of one of its numbers."""
    import torch

    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    own = {parameter.untyped_storage()._cdata for parameter in adapted.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The storage is held, so that its address is not another one's later.
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    decoder = {"decoder_input_ids": ids.new_zeros(rows, written)} if written else {}
    before = base.config._attn_implementation
    _set_traced_attention(base)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = base.base_model(input_ids=ids, use_cache=False, **decoder)
            # T5 and pairs of models have no part without the head; what their heads keep is their input alone.
            hidden = getattr(out, "last_hidden_state", None)
            hidden = out.encoder_last_hidden_state if hidden is None else hidden
    finally:
        base.config._attn_implementation = before
    return sum(storage.nbytes() for storage in kept.values()), hidden.element_size()


def _set_traced_attention(base: Any) -> None:
    from transformers import AttentionInterface

    if base._can_set_attn_implementation():
        AttentionInterface.register(_TRACED, _traced_attention)
        base.set_attn_implementation(_TRACED)


def _traced_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """(batch, heads, tokens, size) → (batch, tokens, heads, size); keeps inputs, output and a number a query."""
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(query)
            sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            ctx.save_for_backward(query, key, value, out, sums)
            return out

    out: torch.Tensor = Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None
