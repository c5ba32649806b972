"""QLoRA (arXiv:2305.14314): LoRA on a base held in 4 bits (NF4, the scales quantized again) by bitsandbytes.

The optimizer keeps its moments in 8 bits, in paged memory on a GPU. The adapter is saved as any LoRA; it was trained
beside the dequantized weights, not the original ones: `training.dequantize` merges it into those.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import UnsupportedError
from edgetune.events import Sink
from edgetune.training.device import sparing_heap
from edgetune.training.methods.base import Method
from edgetune.training.methods.lora import Lora
from edgetune.training.model import load_base
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task

if TYPE_CHECKING:
    import torch

_BITS = 4.127
"""A weight's: 4, an 8-bit scale for 64 of them, and a 32-bit one for 256 of those."""


class Qlora(Lora):
    """LoRA beside 4-bit weights."""

    fuses = False

    def load_base(self, model_dir: Path, config: Any, task: Task, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The base with its linear layers in NF4; the head and embeddings stay as they are."""
        require_bitsandbytes()
        quantization = quantization_config(dtype, skip=_unquantized(config, task))
        with sparing_heap():
            model = load_base(model_dir, config, task=task, dtype=dtype, device=device, quantization=quantization)
        for module in model.modules():
            # On the CPU, bitsandbytes would repack the weights at the first evaluation and round their scales: the
            # base would change in the middle of the run, and not in a resumed one.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """A fresh adapter."""
        require_bitsandbytes()
        if model_dir.is_file():
            raise UnsupportedError(
                f"{model_dir} is quantized already, and is trained on as it is.", hint="Use --method lora."
            )
        return super().attach(model, settings, model_dir, task, sink=sink)

    def make_optimizer(self, adapted: Any, settings: TrainSettings, device: torch.device) -> Any:
        """AdamW with moments in 8 bits where they are many."""
        import bitsandbytes

        groups = self.parameter_groups(adapted, settings)
        paged = device.type == "cuda"
        kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
        return kind(groups, lr=settings.lr, weight_decay=settings.weight_decay)

    def frozen_bytes(self, adapted: Any, dtype: torch.dtype) -> int:
        """Linear layers but the head at 4 bits, the rest as it is."""
        import torch

        base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        head = base.get_output_embeddings()
        linear = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        packed = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)
        return super().frozen_bytes(adapted, dtype) - int(packed * (dtype.itemsize - _BITS / 8))


def quantization_config(dtype: torch.dtype, *, skip: list[str]) -> Any:
    """How transformers is told; the modules in `skip` stay as they are."""
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _unquantized(config: Any, task: Task) -> list[str]:
    """The heads: what the task trains in full, and what makes logits."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, task.auto_class).from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return [*task.head_modules(model), *(name for name, module in model.named_modules() if module is head)]


def require_bitsandbytes() -> None:
    """Raise `UnsupportedError` unless bitsandbytes can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"--method qlora takes bitsandbytes, which cannot be imported: {error}.",
            hint='pip install "edgetune[train]", or use --method lora',
        ) from error
    del bitsandbytes


QLORA: Method = Qlora()
