"""PEFT adapters that matter, saved by PEFT itself, and what PEFT computes with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDS = [5, 17, 130, 44, 201, 9, 77, 300, 12, 250, 33, 18, 91, 140, 6, 222]
"""Token ids for comparing logits; inside every test vocabulary."""


def write_adapter(
    directory: Path,
    base_dir: Path,
    *,
    seed: int = 0,
    strength: float = 0.3,
    resize: int = 0,
    save: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Save an adapter of `base_dir` with `LoraConfig(**settings)`; every trained value is random, none is zero.

    `strength` is the size of each LoRA's change next to a weight of the usual scale. `resize` enlarges the vocabulary.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _load(base_dir)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        peft_model = get_peft_model(
            model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **settings})
        )
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    _fill(name, parameter, strength, generator)
        peft_model.save_pretrained(directory, **(save or {}))
    return directory


def peft_logits(
    base_dir: Path, adapter_dir: Path | None, ids: Sequence[int] = IDS, *, resize: int = 0
) -> NDArray[np.float32]:
    """(len(ids), vocabulary) logits of the base with the adapter as PEFT runs it, in float32; None is no adapter."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _load(base_dir)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        if adapter_dir is not None:
            model = PeftModel.from_pretrained(model, str(adapter_dir))
        with torch.no_grad():
            return np.asarray(model.eval()(torch.tensor([list(ids)])).logits[0].float().numpy())


def gguf_logits(path: Path, lora_path: Path | None = None, ids: Sequence[int] = IDS) -> NDArray[np.float32]:
    """(len(ids), vocabulary) logits of llama.cpp with the adapter file."""
    from edgetune.engine.llama import LlamaEngine
    from edgetune.engine.protocol import LoraSpec

    with LlamaEngine.open(
        path, ctx_size=512, gpu_layers=0, threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn="off"
    ) as engine:
        if lora_path is not None:
            engine.set_adapters([LoraSpec(lora_path, 1.0)])
        return np.asarray(engine.logits(list(ids)))


def _load(base_dir: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    is_seq2seq = AutoConfig.from_pretrained(base_dir).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(base_dir, dtype=torch.float32, attn_implementation="eager")


def _fill(name: str, parameter: Any, strength: float, generator: Any) -> None:
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if "lora_magnitude" in name:
        parameter.mul_(1 + 0.3 * noise)
    elif "lora_embedding_A" in name or "lora_A" in name:
        parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if "lora_A" in name else 0.25))
    elif "lora_B" in name or "lora_embedding_B" in name:
        parameter.copy_(noise * strength * parameter.shape[-1] ** -0.5)
    else:
        parameter.add_(noise * 0.1)
