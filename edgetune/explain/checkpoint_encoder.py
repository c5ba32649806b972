"""A text through a Hugging Face model that ends in a vector, labels or a number, in torch.

What `edgetune classify` and `edgetune embed` run is what is followed. After every block the model's own pooling and
head say what they would say if the stack ended there, and every token is left out once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.encoder import Encoder
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.torch.encoder import load_backend, read_task
from edgetune.engine.torch.encoder_backend import TorchBackend
from edgetune.engine.torch.loading import load_vocabulary
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Progress, Sink
from edgetune.explain.checkpoint import read_config
from edgetune.explain.checkpoint_anatomy import build_anatomy, find_blocks
from edgetune.explain.checkpoint_order import Order, watched
from edgetune.explain.checkpoint_states import BlockStates, watch
from edgetune.explain.encoder_parts import HEAD_IS_ADAPTERS, Work, build_run, compute, read_text
from edgetune.explain.labels import Labelled
from edgetune.explain.page import Anatomy, ModelKind, Run
from edgetune.explain.parts import Told, adapter_sets
from edgetune.explain.seen import Seen
from edgetune.explain.spelling import Spelling
from edgetune.fingerprint import transformer_dir
from edgetune.head import Pooling

States = NDArray[np.float32]


def follow_encoder_checkpoint(
    model_dir: Path, prompt: str, lora: Sequence[LoraSpec], *, sink: Sink
) -> tuple[Told, Anatomy]:
    """Follow `prompt`; see `checkpoint_run.explain_checkpoint`."""
    if len(lora) > 1:
        raise UsageError("In torch a model that answers a whole text runs with one adapter.", hint="Give one of them.")
    has_labels = any(read_task(model_dir, place)[0] for place in (None, *(spec.path for spec in lora)))
    if has_labels and read_config(model_dir).is_encoder_decoder:
        raise UnsupportedError(
            f"{model_dir} is an encoder-decoder with a head for labels, which explain does not follow.",
            hint="edgetune classify says what it answers.",
        )
    sets = adapter_sets(lora)
    told = Told(prompt, 0)
    if lora and read_task(model_dir) != read_task(model_dir, lora[0].path):
        sets = sets[1:]
        told.notes.append(HEAD_IS_ADAPTERS)
    labelled = Labelled()
    for number, specs in enumerate(sets):
        sink(Progress("explain", number, len(sets), "runs"))
        adapter_dir = specs[0].path if specs else None
        backend, tokenizer = load_backend(model_dir, adapter_dir=adapter_dir, dtype="f32", device="cpu")
        with Encoder(backend, tokenizer) as encoder:
            if specs:
                _scale(backend.model, specs[0])
            with watched(backend.transformers_model) as order:
                told.runs.append(_follow(encoder, backend, prompt, specs, labelled, told))
            anatomy = _anatomy(backend, model_dir, told, order)
    sink(Progress("explain", len(sets), len(sets), "runs"))
    return told, anatomy


def _follow(
    encoder: Encoder, backend: TorchBackend, prompt: str, specs: Sequence[LoraSpec], labelled: Labelled, told: Told
) -> Run:
    import torch

    model = backend.transformers_model
    model.set_attn_implementation("eager")
    encoded = read_text(encoder, prompt, told)
    blocks = BlockStates(find_blocks(model))
    result = compute(encoder, prompt)
    with torch.inference_mode():
        watch([blocks], partial(backend.model, **backend.inputs([encoded])))
    states, attention = blocks.after, blocks.attention

    def heard(_logits: States) -> States | None:
        answers = [*blocks.heard(lambda: backend.score([encoded])[0])]
        return np.stack(answers) if answers else None

    if not states:
        told.notes.append("Where this model's blocks are is not known.")
    work = Work(encoded, Seen.of(blocks.embedded, states), states, attention, _pooling(backend), heard, blocks.added)
    vocabulary = load_vocabulary(transformer_dir(backend.profile.path), model.config.to_dict(), eog_ids=frozenset())
    assert isinstance(vocabulary, JsonTokenizer), "encoders without tokenizer files are refused above"
    return build_run(encoder, work, result, Spelling(vocabulary), labelled, specs)


def _pooling(backend: TorchBackend) -> Pooling:
    """What transformers' own head takes, or what the vector is made of."""
    profile = backend.profile
    if profile.head is None or not profile.head.scores_texts:
        return profile.pooling
    own = getattr(backend.transformers_model.config, "classifier_pooling", "cls")
    return "last" if not profile.is_encoder else "mean" if own == "mean" else "cls"


def _scale(model: Any, spec: LoraSpec) -> None:
    """Let the adapter on `model` act by `spec`'s scale. Raises `UnsupportedError` where it has whole modules."""
    if spec.scale == 1:
        return
    config = json.loads((spec.path / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or config.get("modules_to_save"):
        raise UnsupportedError(f"{spec.path} is more than LoRA, and cannot be scaled by {spec.scale:g}.", hint="Use 1.")
    for module in model.modules():
        # Attention modules have a number by that name; PEFT's layers a table of adapters.
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            for name in scaling:
                scaling[name] *= spec.scale


def _anatomy(backend: TorchBackend, model_dir: Path, told: Told, order: Order) -> Anatomy:
    model = backend.transformers_model
    kind: ModelKind = "encoder" if backend.profile.is_encoder else "decoder"
    anatomy = build_anatomy(model, model.config, kind, model_dir, positions=told.positions, order=order)
    stack = anatomy.stacks[-1]
    if told.runs[-1].vector:  # A vector is pooled from the states themselves.
        stack = replace(stack, head=tuple(part for part in stack.head if "pooler" not in part.name.split(".")))
    return replace(anatomy, kind="encoder", stacks=(*anatomy.stacks[:-1], stack))
