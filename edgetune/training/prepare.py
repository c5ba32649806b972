"""From settings to everything a run needs before torch: the base checked, the data read, masked and counted.

Cheap checks come first, so that a wrong flag, path or row is told at once. `--dry-run` ends after `plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data import Dataset, Split, TextTokenizer, TrainingSequence
from edgetune.errors import UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.paths import bytes_text
from edgetune.text_limit import bounds_positions
from edgetune.training.bases import (
    find_base,
    load_base_tokenizer,
    read_config,
    read_raw_config,
    read_template,
    weight_names,
)
from edgetune.training.device import choose_device, choose_dtype, free_memory_bytes, memory_bytes
from edgetune.training.fused_lora import fuse_lora
from edgetune.training.fused_loss import has_known_head
from edgetune.training.layout_lean import can_checkpoint
from edgetune.training.loop import count_steps
from edgetune.training.loss import prompt_length
from edgetune.training.memory import HEADROOM, Frozen, Memory, estimate, frozen_base
from edgetune.training.methods import find_method
from edgetune.training.mixing import Mix, mix
from edgetune.training.model import context_length, text_config
from edgetune.training.processes import launcher_splits, world_size
from edgetune.training.settings import LEAST_LENGTH, TrainSettings
from edgetune.training.speed import row_capacity
from edgetune.training.split import check_splittable, layers_share
from edgetune.training.tasks import Task, find_task
from edgetune.training.tasks.choose import choose_task

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Prepared:
    """A run's inputs, read and checked."""

    model_dir: Path
    """The base: a Hugging Face directory, or a GGUF file."""
    config: Any
    """The base's transformers config."""
    tokenizer: TextTokenizer
    chat_template: str | None
    """Jinja source given by the user in place of the model's own; None otherwise."""
    task: Task
    dataset: Dataset
    splits: Mapping[str, Split[Any]]
    max_length: int
    mix: Mix
    """How often each training sequence comes in an epoch."""

    @property
    def train(self) -> Sequence[TrainingSequence]:
        """Sequences to train on."""
        return self.splits["train"].sequences

    @property
    def valid(self) -> Sequence[TrainingSequence]:
        """Sequences to evaluate on; empty when there are none."""
        return self.splits["valid"].sequences if "valid" in self.splits else ()

    def data_record(self) -> dict[str, Any]:
        """What the run record says of the data."""
        return {
            "paths": [str(path.resolve()) for paths in self.dataset.files.values() for path in paths],
            "format": ", ".join(self.dataset.formats),
            "sha256": self.dataset.sha256,
            "max_length": self.max_length,
            **({"mix": weighted} if (weighted := self.mix.record()) else {}),
            "skipped_rows": len(self.dataset.skipped.problems),
            "splits": {name: split.summary() for name, split in self.splits.items()},
            **self.task.data_record(),
        }


@dataclass(frozen=True)
class Plan:
    """What a run would do, for `--dry-run`."""

    steps: int
    steps_per_epoch: int
    trainable_parameters: int
    all_parameters: int
    device: str
    dtype: str
    memory_bytes: int | None
    """What training takes at most, weights and libraries included; None for a model whose passes cannot be traced."""
    memory: Memory | None
    """The same, by what it is for."""
    free_memory_bytes: int
    grad_checkpointing: bool
    """Whether activations are computed again from the start."""


def prepare(settings: TrainSettings, *, now: datetime | None = None, sink: Sink = ignore) -> Prepared:
    """Check the base and read the data. Raises `UsageError`, `DataError`, `CorruptFileError`, `UnsupportedError`.

    `now` is when the run was started, for chat templates that write the date.
    """
    settings.check()
    model_dir = find_base(settings.model)
    template = _read_template(settings.chat_template)
    if not settings.data:
        raise UsageError("No data to train on.", hint="Give a file or a directory with -d.")
    task = find_task(choose_task(settings, read_raw_config(model_dir), model_dir))
    has_template = template is not None or read_template(model_dir) is not None
    _check_options(settings, task)
    dataset = task.read(settings, model_dir, has_template=has_template, sink=sink)
    config = read_config(model_dir, task)
    max_length = choose_max_length(settings, model_dir, config, sink=sink)
    tokenizer = load_base_tokenizer(model_dir, chat_template=template, now=now)
    _check_metric(settings, task, has_valid="valid" in dataset.examples)
    splits = task.tokenize(dataset, tokenizer, max_length=max_length, sink=sink)
    _check_vocabulary(splits, text_config(config).vocab_size, model_dir)
    mixed = mix(settings.data_weights, dataset, splits["train"])
    return Prepared(model_dir, config, tokenizer, template, task, dataset, splits, max_length, mixed)


def plan(settings: TrainSettings, prepared: Prepared, *, sink: Sink = ignore) -> Plan:
    """What training would take; warns when that is more memory than is free. Builds the model without its weights."""
    import torch
    import transformers

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    with torch.device("meta"):
        auto = getattr(transformers, prepared.task.auto_class)
        model = auto.from_config(prepared.config, dtype=dtype, trust_remote_code=False)
        model.requires_grad_(False)
        method = find_method(settings.method)
        adapted = method.attach(model, settings, prepared.model_dir, prepared.task, sink=ignore)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in adapted.parameters() if not parameter.requires_grad)
    per_epoch, total = count_steps(prepared.mix.size, settings)
    _tell_stopping(settings, total, per_epoch, sink)
    base = frozen_base(prepared.model_dir, method, adapted, dtype)
    if settings.fsdp or launcher_splits():
        check_splittable(adapted, prepared.model_dir, settings.method)
        elsewhere = int(base.weights * layers_share(adapted) * (1 - 1 / world_size()))
        base = replace(base, weights=base.weights - elsewhere)
    if method.fuses:
        fuse_lora(adapted)

    def step_memory(checkpointing: bool) -> Memory | None:
        on_cpu = device.type == "cpu"
        return _step_memory(settings, prepared, adapted, base, on_cpu=on_cpu, checkpointing=checkpointing)

    free = free_memory_bytes(device)
    checkpointing = settings.grad_checkpointing == "on"
    memory = step_memory(checkpointing)
    needed = _needed(memory, device)
    if settings.grad_checkpointing == "auto" and needed > free * HEADROOM and can_checkpoint(model):
        lean = step_memory(True)
        if (less := _needed(lean, device)) < needed:
            sink(
                Notice(
                    f"Gradient checkpointing is on: without it, training would take about {bytes_text(needed)} of "
                    f"memory, {bytes_text(free)} are free."
                )
            )
            checkpointing, memory, needed = True, lean, less
    if needed > free:
        sink(
            Notice(
                f"Training may take about {bytes_text(needed)} of memory, {bytes_text(free)} are free. "
                "--batch-size 1 with --grad-accum, --grad-checkpointing or a smaller --max-length take less.",
                "warning",
            )
        )
    return Plan(
        steps=total,
        steps_per_epoch=per_epoch,
        trainable_parameters=trainable,
        all_parameters=trainable + frozen,
        device=device.type,
        dtype="bf16" if dtype == torch.bfloat16 else "f32",
        memory_bytes=memory.total if memory else None,
        memory=memory,
        free_memory_bytes=free,
        grad_checkpointing=checkpointing,
    )


def _tell_stopping(settings: TrainSettings, steps: int, per_epoch: int, sink: Sink) -> None:
    """Say so where early stopping was asked for and cannot happen."""
    measured = -(-steps // (settings.eval_every or per_epoch))
    if settings.early_stopping >= measured:
        often = f"--early-stopping {settings.early_stopping} cannot stop a run that is measured {measured} times."
        sink(Notice(f"{often} --eval-every {max(1, per_epoch // 4)} measures it four times an epoch.", "warning"))


def _needed(memory: Memory | None, device: torch.device) -> int:
    """What of `memory` is still to be taken: of the libraries', this process has its part by now."""
    return memory.total - min(memory.runtime, memory_bytes(device)) if memory else 0


def _step_memory(
    settings: TrainSettings,
    prepared: Prepared,
    adapted: Any,
    base: Frozen,
    *,
    on_cpu: bool,
    checkpointing: bool,
) -> Memory | None:
    """What a step of the longest sequences takes; None where the model cannot be traced without its weights."""
    task, train = prepared.task, prepared.train
    lengths = sorted((len(sequence.ids) for sequence in train), reverse=True)
    counts = sorted((sequence.learned_count for sequence in train), reverse=True)
    rows, longest, written = min(settings.batch_size, len(train)), lengths[0] + prompt_length(adapted), 0
    packs, packs_batches = getattr(task, "packs", False), getattr(task, "packs_batches", False)
    packed = settings.packing and (packs or packs_batches) and not prompt_length(adapted)
    learned = sum(counts[:rows])
    if packed:
        together = rows if packs_batches else rows * settings.grad_accum
        most = sum(lengths[:together])
        capacity = row_capacity(settings.batch_size, longest=longest, max_length=prepared.max_length)
        rows, longest = 1, most if packs_batches else min(most, capacity)
        learned = min(longest, sum(counts[:together]))
    elif getattr(prepared.config, "is_encoder_decoder", False):
        written = counts[0]
        longest = max(len(sequence.ids) - sequence.learned_count for sequence in train)
    try:
        return estimate(
            adapted,
            base,
            rows=rows,
            length=longest,
            learned=learned,
            checkpointing=checkpointing,
            fused=packed or (packs and has_known_head(adapted)),
            on_cpu=on_cpu,
            written=written,
            outputs=None if packs or written else getattr(prepared.config, "num_labels", 0),
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None  # data decide the shapes of its passes, as in some mixtures of experts


def _read_template(path: str) -> str | None:
    if not path:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The chat template {path} cannot be read: {error}.") from error


def _check_metric(settings: TrainSettings, task: Task, *, has_valid: bool) -> None:
    known = ("loss", *task.metrics)
    if settings.metric and settings.metric not in known:
        hint = "Texts are compared with --eval-texts N." if task.name in ("chat", "completion", "seq2seq") else ""
        raise UsageError(
            f"--metric {settings.metric} is not measured for {task.name}, only {', '.join(known)}.", hint=hint
        )
    if (settings.metric or settings.early_stopping) and not has_valid:
        raise UsageError(
            "There are no validation rows to choose the best adapter by.",
            hint="Put a file valid.jsonl beside the training data (fewer than 40 rows are not split by themselves), "
            "or leave out --metric and --early-stopping.",
        )


def _check_options(settings: TrainSettings, task: Task) -> None:
    """Raise `UsageError` for an option that neither the task nor the method says it has."""
    known = {**getattr(task, "options", {}), **getattr(find_method(settings.method), "options", {})}
    for name in settings.option:
        if name not in known:
            of = f"the task {settings.task} with the method {settings.method}"
            told = "; ".join(f"{key}: {about}" for key, about in known.items())
            raise UsageError(f"--option {name} is not known to {of}.", hint=told or "It has no options.")


def choose_max_length(settings: TrainSettings, model_dir: Path, config: Any, *, sink: Sink = ignore) -> int:
    """The length asked for, or the usual one. Raises `UsageError` for more tokens than the model has positions for."""
    wanted, context = settings.max_length, context_length(config)
    prompt = settings.prompt_tokens if settings.method == "prompt" else 0
    is_bound = bool(context) and bounds_positions(config.model_type, weight_names(model_dir))
    room = context - prompt if is_bound else context
    if is_bound and room < max(wanted, LEAST_LENGTH):
        beside = f", {prompt} of them for the trained prompt" if prompt else ""
        raise UsageError(
            f"--max-length is {wanted or LEAST_LENGTH}, but {model_dir} has {context} positions for tokens{beside}.",
            hint=f"Use --max-length {room} or less." if room >= LEAST_LENGTH else "Use fewer --prompt-tokens.",
        )
    if not wanted:
        return min(DEFAULT_MAX_LENGTH, room or DEFAULT_MAX_LENGTH)
    if room and wanted > room:
        sink(Notice(f"--max-length {wanted} is more than the model's context of {context} tokens.", "warning"))
    return wanted


def _check_vocabulary(splits: Mapping[str, Split[Any]], vocab_size: int, model_dir: Path) -> None:
    highest = max(int(sequence.ids.max()) for split in splits.values() for sequence in split.sequences)
    if highest >= vocab_size:
        raise UsageError(
            f"The tokenizer in {model_dir} makes token {highest}, the model has only {vocab_size}.",
            hint="Tokenizer and model do not belong together.",
        )
