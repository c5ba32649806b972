"""How much memory a training step takes, from a model without weights: what it keeps for its backward pass is traced.

The model, with its adapter, stands on torch's meta device and goes through one forward pass there, which computes
nothing; every tensor that autograd keeps is counted once. Weights, gradients, the optimizer's moments and the head's
chunk of logits are known from shapes. What libraries, tokenizer and data take is read off this process, which has them
all by the time it is asked. The slack of the allocator alone is a share that was measured (`benchmarks/plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.training.bases import is_gguf
from edgetune.training.fused_loss import CHUNK
from edgetune.training.methods.base import Method
from edgetune.training.model import text_config

if TYPE_CHECKING:
    import torch

_TRACED = "edgetune_traced"
"""The name of the attention that keeps what a memory-saving one keeps, and computes nothing."""

_ADAPTER_BYTES = 16
"""A trained parameter: itself, its gradient and two moments, in f32."""

_LATE = 60e6
"""What a run on the CPU takes of libraries after it was planned: threads, the optimizer's code, the report."""

_SLACK = {2: 0.25, 4: 0.07}
"""What the allocator holds on the CPU, as a share of what a step allocates and frees, by the bytes of a number; for
bf16 with the kernels that oneDNN compiles for every shape."""

_GPU_SLACK = 0.1

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
    """Libraries, tokenizer, data, the allocator's slack."""
    loading: int = 0
    """By how much loading the base goes above all that: its files are mapped while their numbers are converted."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.loss + self.runtime + self.loading


@dataclass(frozen=True)
class Frozen:
    """How the base lies in memory."""

    weights: int
    """Bytes of the weights that are not trained."""
    mapped: int = 0
    """Bytes of the files that are mapped beside the weights while these are loaded."""
    piece: int = 0
    """Bytes of the largest part of a base in blocks that is dequantized at a time; 0: it is not in blocks."""


def frozen_base(model_dir: Path, method: Method, adapted: Any, dtype: torch.dtype) -> Frozen:
    """What the base in `model_dir` takes, loaded by `method` to be computed in `dtype`. `adapted` is on meta."""
    from torch.nn import Linear

    if is_gguf(model_dir):
        from edgetune.training.gguf_base.blocks import NUMBERS_AT_ONCE

        head = adapted.get_base_model().get_output_embeddings()
        largest = max(m.weight.numel() for m in adapted.modules() if isinstance(m, Linear) and m is not head)
        return Frozen(model_dir.stat().st_size, piece=max(largest, NUMBERS_AT_ONCE) * dtype.itemsize)
    files = safetensors_files(model_dir)
    stored = {str(entry["dtype"]) for path in files for entry in read_safetensors_header(path)[0].values()}
    converted = stored != {_STORED[str(method.load_dtype(dtype))]}
    mapped = sum(path.stat().st_size for path in files) if converted else 0
    return Frozen(method.frozen_bytes(adapted, dtype), mapped)


_STORED = {"torch.bfloat16": "BF16", "torch.float32": "F32"}


def estimate(
    adapted: Any,
    base: Frozen,
    *,
    rows: int,
    length: int,
    learned: int,
    checkpointing: bool,
    fused: bool,
    on_cpu: bool,
    written: int = 0,
    outputs: int | None = None,
) -> Memory:
    """Memory of a step whose largest pass has `rows` rows of `length` tokens, `learned` of them with a loss.

    `adapted` stands on the meta device. `fused`: whether head and loss are computed in chunks. `written`: tokens of a
    row that an encoder-decoder's decoder reads. `outputs`: logits of each thing learned, by default one for each token
    there is.
    """
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    kept, itemsize = kept_bytes(adapted, rows=rows, length=length, written=written, on_cpu=on_cpu)
    config = text_config(adapted.config)
    outputs = config.vocab_size if outputs is None else outputs
    if checkpointing:
        layers = config.num_hidden_layers
        # Each layer's input, and everything of the one layer that is being computed again.
        kept = rows * (length + written) * config.hidden_size * itemsize * layers + kept // layers
    if fused and base.piece:
        # The gradient of the hidden states in f32, a piece of the head, and about as much in logits for it.
        loss = learned * config.hidden_size * 4 + 2 * base.piece
    else:
        tokens = min(learned, CHUNK) if fused else learned
        loss = tokens * outputs * (itemsize + (0 if fused else 8)) + outputs * 64 + base.piece
    step = trained * _ADAPTER_BYTES + kept + loss
    slack = _LATE + process_bytes() + _SLACK[itemsize] * (kept + loss) if on_cpu else _GPU_SLACK * (kept + loss)
    loading = max(0, base.mapped - step) if on_cpu else 0
    return Memory(base.weights, trained * _ADAPTER_BYTES, kept, loss, int(slack), loading)


@cache
def process_bytes() -> int:
    """What this process had taken when it was first asked: libraries, the tokenizer, the data."""
    return int(psutil.Process().memory_info().rss)


def kept_bytes(adapted: Any, *, rows: int, length: int, written: int = 0, on_cpu: bool = True) -> tuple[int, int]:
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
    _set_traced_attention(base, on_cpu=on_cpu)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = base.base_model(input_ids=ids, use_cache=False, **decoder)
            # T5 and pairs of models have no part without the head; what their heads keep is their input alone.
            hidden = getattr(out, "last_hidden_state", None)
            hidden = out.encoder_last_hidden_state if hidden is None else hidden
    finally:
        base.config._attn_implementation = before
    return sum(storage.nbytes() for storage in kept.values()), hidden.element_size()


def _set_traced_attention(base: Any, *, on_cpu: bool) -> None:
    from transformers import AttentionInterface

    if base._can_set_attn_implementation():
        AttentionInterface.register(_TRACED, partial(_traced_attention, on_cpu=on_cpu))
        base.set_attn_implementation(_TRACED)


def _traced_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    dropout: float = 0.0,
    on_cpu: bool,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """(batch, heads, tokens, size) → (batch, tokens, heads, size); keeps inputs, output and a number a query.

    With dropout, which torch's memory-saving attention does not have on the CPU, what is seen from where is kept too:
    as it was, what is dropped of it, and what is left.
    """
    import torch

    seen = 3 * key.shape[-2] if dropout and on_cpu else 0

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(query)
            sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            ctx.save_for_backward(query, key, value, out, sums, query.new_empty(*query.shape[:-1], seen))
            return out

    out: torch.Tensor = Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None
