"""What training would take on this machine: memory by length from the config alone, speed from twenty seconds of it.

`edgetune plan` asks here before there is any data. What a run with data takes is `prepare.plan`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.data import Tokenized
from edgetune.errors import UnsupportedError
from edgetune.events import Progress, Sink, ignore
from edgetune.training.bases import find_base, load_base_tokenizer, read_config
from edgetune.training.device import choose_device, choose_dtype, free_memory_bytes, is_out_of_memory
from edgetune.training.fused_lora import fuse_lora
from edgetune.training.layout_lean import start_checkpointing
from edgetune.training.loss import prompt_length
from edgetune.training.memory import HEADROOM, Memory, estimate, frozen_base
from edgetune.training.methods import find_method
from edgetune.training.model import context_length, text_config
from edgetune.training.prepare import choose_max_length
from edgetune.training.speed import speed_up
from edgetune.training.tasks import find_task

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lengths looked at, up to the model's context."""

EFFECTIVE_BATCH = 8
"""Sequences in a step of the proposal."""

_PROBE_SECONDS = 20.0
_LEARNED = 0.5
"""Share of the tokens that have a loss in the forecast: about that of a question with its answer."""


@dataclass(frozen=True)
class Case:
    """One way to train, and what it takes."""

    length: int
    """Tokens in a row: of the longest sequence, and of several short ones packed."""
    grad_checkpointing: bool
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """What `edgetune plan` says."""

    model_dir: Path
    device: str
    dtype: str
    method: str
    trainable_parameters: int
    all_parameters: int
    free_bytes: int
    cases: Sequence[Case]
    proposal: TrainSettings | None
    """The settings given, with what makes them fit; None when nothing does."""


def forecast(settings: TrainSettings) -> Forecast:
    """Memory by length and checkpointing for `settings`' model and method. Raises what checking a base raises.

    `settings.max_length` 0 means: propose one. Only decoders are forecast: `UnsupportedError` for other bases.
    """
    import torch

    settings.check()
    model_dir = find_base(settings.model)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    config, adapted = _without_weights(settings, model_dir, dtype)
    choose_max_length(settings, model_dir, config)
    if prompt_length(adapted):
        raise UnsupportedError(
            f"The memory of --method {settings.method} is not forecast.",
            hint="edgetune train … --dry-run makes a guess.",
        )
    context = context_length(config) or LENGTHS[-1]
    lengths = sorted({*(length for length in LENGTHS if length <= context), settings.max_length or min(2048, context)})
    free = free_memory_bytes(device)
    base = frozen_base(model_dir, find_method(settings.method), adapted, dtype)
    # Training has it as well, and large vocabularies are hundreds of megabytes.
    tokenizer = load_base_tokenizer(model_dir, chat_template=None, now=None)
    cases = []
    for length in lengths:
        for checkpointing in (False, True):
            memory = estimate(
                adapted,
                base,
                rows=1,
                length=length,
                learned=int(length * _LEARNED),
                checkpointing=checkpointing,
                fused=True,
                on_cpu=device.type == "cpu",
            )
            cases.append(Case(length, checkpointing, memory, memory.total <= free * HEADROOM))
    del tokenizer
    trained = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    return Forecast(
        model_dir,
        device.type,
        "bf16" if dtype == torch.bfloat16 else "f32",
        settings.method,
        sum(trained),
        sum(parameter.numel() for parameter in adapted.parameters()),
        free,
        cases,
        propose(settings, cases, most=min(2048, context)),
    )


def fitting_forecast(settings: TrainSettings) -> Forecast:
    """`forecast`; of QLoRA where LoRA, which was not asked for, fits at no length. Raises as `forecast` does."""
    found = forecast(settings)
    if found.proposal is not None or settings.method != "lora":
        return found
    try:
        lean = forecast(replace(settings, method="qlora"))
    except UnsupportedError:
        return found  # in blocks already, or nothing here to quantize with
    return lean if lean.proposal is not None else found


def propose(settings: TrainSettings, cases: Sequence[Case], *, most: int) -> TrainSettings | None:
    """The longest rows that fit, up to `most` tokens or just those asked for; checkpointing only where it is needed."""
    wanted = settings.max_length
    fitting = [case for case in cases if case.fits and (case.length == wanted if wanted else case.length <= most)]
    if not fitting:
        return None
    best = max(fitting, key=lambda case: (case.length, not case.grad_checkpointing))
    # Packed rows hold what fits into them, whatever the batch: its size is a matter of learning, not of memory.
    return replace(
        settings,
        max_length=best.length,
        batch_size=EFFECTIVE_BATCH,
        grad_accum=1,
        grad_checkpointing="on" if best.grad_checkpointing else settings.grad_checkpointing,
    )


def probe(settings: TrainSettings, *, seconds: float = _PROBE_SECONDS, sink: Sink = ignore) -> float:
    """Tokens a second of training as `settings` say, on sequences of random tokens, measured for `seconds`.

    0.0 when memory does not suffice after all.
    """
    import torch

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    method, task, model_dir = find_method(settings.method), find_task("completion"), find_base(settings.model)
    config = read_config(model_dir, task)
    model = method.load_base(model_dir, config, task, dtype=dtype, device=device)
    if settings.grad_checkpointing == "on":
        start_checkpointing(model)
    adapted = method.attach(model, settings, model_dir, task, sink=ignore)
    length = settings.max_length
    task.max_length = length  # type: ignore[attr-defined]
    layout = speed_up(adapted, settings, task, lengths=[length], max_length=length, device=device, sink=ignore)
    rows = _random_rows(length, text_config(config).vocab_size)
    adapted.train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    begun, speeds = time.perf_counter(), list[float]()
    try:
        # The first step also compiles kernels: it counts only when there is time for no other.
        while len(speeds) < 2 or (spent := time.perf_counter() - begun) < seconds:
            started, tokens = time.perf_counter(), 0
            for batch in layout.batches([rows]):
                with autocast:
                    loss: Any = task.summed_loss(adapted, batch)
                loss.backward()
                tokens += batch.tokens
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            speeds.append(tokens / (time.perf_counter() - started))
            spent = time.perf_counter() - begun
            sink(Progress("probe", min(int(spent), int(seconds)), int(seconds), "seconds"))
            if spent > seconds:
                break
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0
    return float(np.median(speeds[1:] or speeds))


def _without_weights(settings: TrainSettings, model_dir: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The config, and the model with its adapter on the meta device."""
    import torch
    import transformers

    task = find_task("completion")
    config = read_config(model_dir, task)
    if getattr(config, "num_experts_per_tok", None):
        raise UnsupportedError(
            f"{model_dir} is a mixture of experts, whose memory cannot be foretold: the data say which are computed.",
            hint="Begin with edgetune train … --batch-size 1 --grad-checkpointing.",
        )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.requires_grad_(False)
        method = find_method(settings.method)
        adapted = method.attach(model, settings, model_dir, task, sink=ignore)
    if method.fuses:
        fuse_lora(adapted)
    if model.base_model is model:
        raise UnsupportedError(f"{model_dir} is a {type(model).__name__}, whose memory cannot be foretold.")
    return config, adapted


def _random_rows(length: int, vocabulary: int) -> list[Tokenized]:
    """As many sequences of a usual length as fill a row."""
    random = np.random.default_rng(0)
    size = min(length, 256)
    return [
        Tokenized(random.integers(0, vocabulary, size).astype(np.int32), np.arange(size) >= size * (1 - _LEARNED))
        for _ in range(max(1, length // size))
    ]
