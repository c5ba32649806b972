"""What a model, an adapter or a run does with a text: its task, labels, pooling, what goes before the text, its limit.

From config.json, the sentence-transformers files, a GGUF header or a run's record alone; loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.artifacts import Run
from edgetune.gguf_header import GgufHeader, LongArray, read_gguf_header
from edgetune.head import LLAMA_POOLINGS
from edgetune.sentence_modules import SentenceModules, read_modules, read_prompting
from edgetune.text_limit import positions

SOURCE_PROMPT = "source"
"""The name of what a run put before every source."""
_HEADS = ("classification", "multilabel", "regression")
_PROBLEMS = {"regression": "regression", "multi_label_classification": "multilabel"}
_UNLIMITED = 1 << 20
"""Tokenizers that know no limit give a number far above this."""


@dataclass(frozen=True)
class Duty:
    """What is done with a text."""

    task: str = ""
    """A name that `train --task` takes, "multilabel" for several labels a text; empty where it is not known."""
    labels: tuple[str, ...] = ()
    """Of a classifier, by class id."""
    pooling: str = ""
    """What a vector is made of: "mean", "cls", "last" or "max"; empty for models that give none."""
    normalize: bool = False
    """Whether vectors are brought to length 1."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by the name of its purpose."""
    default_prompt: str = ""
    """The name of the one that is used unless another is named."""
    longest_text: int | None = None
    """In tokens, those around it included; None where nothing bounds it but the context."""


def duty_of_checkpoint(model_dir: Path, inside: Path, config: Mapping[str, Any], *, writes: str) -> Duty:
    """Of the Hugging Face directory `model_dir`, whose `config` lies `inside`; `writes` is the task of a decoder.

    Raises `CorruptFileError` or `UnsupportedError` for sentence-transformers files that cannot be read.
    """
    architecture = str((config.get("architectures") or [""])[0])
    modules = read_modules(model_dir)
    if architecture.endswith("ForSequenceClassification"):
        labels = _labels(config)
        task = _PROBLEMS.get(str(config.get("problem_type")), "regression" if len(labels) == 1 else "classification")
        return Duty(
            task,
            () if task == "regression" else labels,
            longest_text=_longest(config, modules, inside),
        )
    if config.get("is_encoder_decoder") and not architecture.endswith("EncoderModel"):
        return Duty("seq2seq", prompts=_task_prefixes(config), longest_text=positions(_encoder(config)))
    if modules is None and architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return Duty(writes)
    modules = modules or SentenceModules(inside)
    return Duty(
        "embedding",
        pooling="+".join(modules.modes),
        normalize=modules.normalize,
        prompts=modules.prompts,
        default_prompt=modules.default_prompt,
        longest_text=_longest(config, modules, inside),
    )


def duty_of_gguf(header: GgufHeader, *, writes: str) -> Duty:
    """Of the GGUF model, or the adapter that brings a head; `writes` is the task of a decoder."""
    metadata = header.metadata
    labels = metadata.get("edgetune.labels")
    if isinstance(labels, LongArray):
        labels = read_gguf_header(header.path, arrays=("edgetune.labels",)).metadata["edgetune.labels"]
    is_encoder = metadata.get(f"{header.architecture}.attention.causal") is False or header.architecture == "t5encoder"
    task = str(metadata.get("edgetune.task") or ("seq2seq" if header.architecture == "t5" else ""))
    task = task or ("embedding" if is_encoder or header.number("pooling_type") else writes)
    gives_vectors = task in (*_HEADS, "embedding")
    pooling = metadata.get("edgetune.head.pooling") or LLAMA_POOLINGS.get(header.number("pooling_type") or 0, "")
    prompting = read_prompting(header)
    limits = [size for size in (prompting.max_tokens, header.number("context_length")) if size]
    return Duty(
        task,
        tuple(map(str, labels)) if isinstance(labels, list) else (),
        str(pooling or ("mean" if is_encoder else "last")) if task == "embedding" else "",
        metadata.get("edgetune.head.normalize") is True,
        prompting.prompts,
        prompting.default_prompt,
        min(limits, default=None) if gives_vectors or task == "seq2seq" else None,
    )


def duty_of_run(run: Run) -> Duty:
    """Of what `train` left."""
    labels, prefix = run.data.get("labels"), run.data.get("source_prefix")
    several = run.task == "classification" and run.data.get("multi_label")
    return Duty(
        "multilabel" if several else run.task,
        tuple(map(str, labels)) if isinstance(labels, list) else (),
        prompts={SOURCE_PROMPT: str(prefix)} if prefix else {},
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """By class id, as transformers reads them: two without a name where the config says nothing."""
    named = config.get("id2label")
    if isinstance(named, dict) and all(str(number).isdecimal() for number in named):
        return tuple(str(named[number]) for number in sorted(named, key=int))
    count = config.get("num_labels")
    return tuple(f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2))


def _task_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """What T5 learned to read as a task, where its config names it."""
    tasks = config.get("task_specific_params")
    found = {name: one.get("prefix") for name, one in (tasks or {}).items() if isinstance(one, dict)}
    return {str(name): prefix for name, prefix in found.items() if isinstance(prefix, str) and prefix}


def _encoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("encoder")
    return inner if isinstance(inner, dict) else config


def _longest(config: Mapping[str, Any], modules: SentenceModules | None, inside: Path) -> int | None:
    limit = modules.max_tokens if modules else None
    limits = [positions(config), limit if limit is not None else _tokenizer_limit(inside)]
    return min((size for size in limits if size), default=None)


def _tokenizer_limit(model_dir: Path) -> int | None:
    try:
        values = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        limit = values.get("model_max_length")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _UNLIMITED else None
