"""A QLoRA run merged into the weights it was trained beside: those of its base, to 4 bits and back.

The adapter made up for what the 4 bits lost; on the original weights it answers a little differently. Writes a Hugging
Face checkpoint in f32, which converts as any other. Trains nothing.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from edgetune.artifacts import Run
from edgetune.errors import UnsupportedError, UsageError
from edgetune.training.device import choose_device, choose_dtype
from edgetune.training.methods.qlora import quantization_config, require_bitsandbytes
from edgetune.training.model import copy_tokenizer

_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


def write_dequantized(run: Run, base_dir: Path, out_dir: Path) -> None:
    """Write `run`'s model into `out_dir`. Raises `UsageError` for another method, `UnsupportedError` for some tasks."""
    if run.method != "qlora":
        raise UsageError(f"{run.path} was trained with {run.method}, on weights that are not quantized.")
    require_bitsandbytes()
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = _load(run, base_dir)
        adapted = peft.PeftModel.from_pretrained(plain, str(run.path))
        _check_tied(run, plain)
        merged = adapted.merge_and_unload()
        merged.save_pretrained(out_dir)
    copy_tokenizer(base_dir, out_dir)
    copy_tokenizer(run.path, out_dir)


def _load(run: Run, base_dir: Path) -> Any:
    """The base in f32, its linear layers with the values that 4 bits stand for."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    kind = peft.PeftConfig.from_pretrained(str(run.path)).task_type
    if kind not in _CLASSES:
        raise UnsupportedError(
            f"{run.path} is for {run.task}; only models that write text are merged at 4 bits.",
            hint="Convert it without --dequantized.",
        )
    auto = getattr(transformers, _CLASSES[kind])
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    plain = auto.from_pretrained(base_dir, dtype=torch.float32, **options)
    head = plain.get_output_embeddings()
    dtype = choose_dtype(str(run.settings.get("dtype", "auto")), choose_device(str(run.settings.get("device", "auto"))))
    quantization = quantization_config(dtype, skip=[name for name, module in plain.named_modules() if module is head])
    held = auto.from_pretrained(base_dir, dtype=dtype, quantization_config=quantization, **options)
    for name, module in held.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = values.float().cpu()
    return plain


def _check_tied(run: Run, model: Any) -> None:
    from peft.tuners.lora.layer import LoraLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if tied and any(isinstance(module, LoraLayer) for module in ends):
        raise UnsupportedError(
            f"{run.path} changes a head or an embedding that share their weights; merging would change both.",
            hint="Convert it without --dequantized.",
        )
