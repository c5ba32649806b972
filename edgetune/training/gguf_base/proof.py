"""Whether a GGUF base with its new GGUF adapter computes in llama.cpp what the trained model computed in torch.

Both sides use the very same quantized weights; what differs is that llama.cpp rounds activations. How much of a
difference that makes is measured by rounding them in torch, and what the adapter changes is compared by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from edgetune.artifacts import LogitsParity, ParityCheck, ParityReport
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.events import Progress, Sink, ignore
from edgetune.training.gguf_base.config import read_gguf_config
from edgetune.training.gguf_base.experts import adapt_experts
from edgetune.training.gguf_base.load import PROBE, divergence, load_gguf_base, rounding

_MARGIN = 4.0
"""Allowed mean KL, as a multiple of what rounding activations causes in torch."""
_LEAST_KL = 1e-3
_EFFECT = (0.7, 1.4)
"""Allowed size of the adapter's effect, as a multiple of the one in torch."""
_SCALES = (1.0, 4.0, 16.0, 64.0)
"""How strong the adapter is made, to see what it does."""
_CLEAR = 3.0
"""How many times what rounding changes the adapter has to change, to be seen."""


def prove_adapter(base_path: Path, adapter_dir: Path, lora_path: Path, *, sink: Sink = ignore) -> ParityReport:
    """Compare the GGUF model at `base_path` with `lora_path` in llama.cpp, and with the PEFT adapter in torch.

    Raises what loading them raises.
    """
    import peft
    import transformers

    config = transformers.AutoConfig.for_model(**read_gguf_config(base_path))
    tokenizer = GgufTokenizer.open(base_path)
    try:
        ids = tokenizer.encode(PROBE)
    finally:
        tokenizer.close()
    base = load_gguf_base(base_path, config, dtype=torch.float32, device=torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    adapt_experts(model)
    sink(Progress("torch", 1, 2, label="comparing"))
    adapted, rounded = _torch_logits(model, ids), _torch_logits(model, ids, rounds=True)
    found = _llama_logits(base_path, ids, lora_path)
    kl = divergence(adapted.log_softmax(-1), found.log_softmax(-1))
    noise = divergence(adapted.log_softmax(-1), rounded.log_softmax(-1))
    bound = max(_LEAST_KL, _MARGIN * float(noise.mean()))
    same = (adapted.argmax(-1) == found.argmax(-1)).float().mean()
    logits = LogitsParity(len(ids), float(kl.mean()), float(kl.max()), float(same), bound, "mean_kl")
    check = _check_effect(model, ids, base_path, lora_path)
    sink(Progress("torch", 2, 2, label="comparing"))
    return ParityReport(base_path, lora_path, (check,), logits)


def _check_effect(model: Any, ids: list[int], base_path: Path, lora_path: Path) -> ParityCheck:
    """Whether llama.cpp's change of the logits is torch's, in direction and size.

    A weak adapter drowns in what rounding does; it is made stronger on both sides until it does not. How much that is
    tells the base alone: 16-bit weights are multiplied with rounded activations in llama.cpp, and not in torch.
    """
    with model.disable_adapter():
        plain, rounded = _torch_logits(model, ids), _torch_logits(model, ids, rounds=True)
    theirs = _llama_logits(base_path, ids, None)
    noise = max(_centred(other - plain).norm() for other in (rounded, theirs))
    for scale in _SCALES:
        with _scaled(model, scale):
            expected = _centred(_torch_logits(model, ids) - plain)
        if expected.norm() > _CLEAR * noise:
            break
    else:
        return ParityCheck("adapter", 0, 0, skipped="what it changes is lost in rounding, however strong it is made")
    change = _llama_logits(base_path, ids, lora_path, scale) - theirs
    ratio = float((expected * _centred(change)).sum() / (expected * expected).sum())
    good = _EFFECT[0] <= ratio <= _EFFECT[1]
    difference = "" if good else f"the adapter changes {ratio:.2f} times what it changes in torch"
    return ParityCheck("adapter", 1, int(good), difference)


def _centred(change: torch.Tensor) -> torch.Tensor:
    return change - change.mean(-1, keepdim=True)


@contextmanager
def _scaled(model: Any, scale: float) -> Iterator[None]:
    """The adapter made stronger for a while."""
    tables = [one for module in model.modules() if isinstance(one := getattr(module, "scaling", None), dict)]
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({name: value * scale for name, value in table.items()})
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)


def _torch_logits(model: Any, ids: list[int], *, rounds: bool = False) -> torch.Tensor:
    with torch.no_grad(), rounding(model) if rounds else nullcontext():
        result: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return result


def _llama_logits(base_path: Path, ids: list[int], lora_path: Path | None, scale: float = 1.0) -> torch.Tensor:
    lora = [LoraSpec(lora_path, scale)] if lora_path else []
    kept = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    with LlamaEngine.open(base_path, ctx_size=256, gpu_layers=0, lora=lora, **kept) as engine:  # type: ignore[arg-type]
        return torch.from_numpy(engine.logits(ids))
