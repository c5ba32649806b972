"""A prompt through a Hugging Face model, in torch: any decoder, encoder or encoder-decoder that transformers knows.

For models that llama.cpp has no graph for, and to look at a checkpoint before it is converted. Weights are read from
safetensors alone, and no code that comes with a model is run. torch is imported where it is used.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.engine.torch.encoder import read_task
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Progress, Sink, ignore
from edgetune.explain.checkpoint import Loaded, kind_of, load, read_config
from edgetune.explain.checkpoint_anatomy import build_anatomy, find_blocks
from edgetune.explain.checkpoint_encoder import follow_encoder_checkpoint
from edgetune.explain.checkpoint_guesses import Guesser, last_only
from edgetune.explain.checkpoint_order import watched
from edgetune.explain.checkpoint_states import BlockStates, watch
from edgetune.explain.filters import build_distribution, entropy, iter_filters, softmax
from edgetune.explain.page import Anatomy, Explanation, Lensed, Option, Run, StackRun, Step
from edgetune.explain.parts import (
    Told,
    Vocabulary,
    adapter_sets,
    block_runs,
    run_name,
    stacked,
    tokens_of,
    with_characters,
)
from edgetune.explain.seen import Seen

_TOP = 10
_SOURCE, _TARGET = "encoder", "decoder"

States = NDArray[np.float32]


def explain_checkpoint(
    model_dir: Path,
    prompt: str,
    *,
    lora: Sequence[LoraSpec] = (),
    chat: bool = False,
    system: str = "",
    sampling: Sampling | None = None,
    steps: int = 8,
    threads: int = 0,
    sink: Sink = ignore,
) -> Explanation:
    """Follow `prompt` through the model in `model_dir`; with PEFT directories in `lora`, without and with them.

    Raises `UsageError` for a prompt that is empty or too long, `UnsupportedError` for a model that transformers does
    not know by itself, `CorruptFileError` for a broken one.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    sampling = sampling or Sampling()
    if sampling.seed == RANDOM_SEED:
        sampling = replace(sampling, seed=random.randrange(1 << 31))
    if not prompt.strip():
        raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
    adapters = [spec for spec in lora if spec.scale]
    sink(Progress("load", 0, 1, "models"))
    if _answers_texts(model_dir, adapters):
        if chat or system:
            raise UsageError(f"{model_dir} has no chat template.", hint="Leave out --chat and --system.")
        told, anatomy = follow_encoder_checkpoint(model_dir, prompt, adapters, sink=sink)
    else:
        told, anatomy = _follow(model_dir, prompt, adapters, sampling, steps, chat=chat, system=system, sink=sink)
    return Explanation(
        anatomy=anatomy,
        engine="torch",
        prompt=prompt,
        rendered=told.rendered,
        sampling=asdict(sampling),
        runs=tuple(told.runs),
        notes=tuple(dict.fromkeys(told.notes)),
    )


def _answers_texts(model_dir: Path, lora: Sequence[LoraSpec]) -> bool:
    """Whether the model ends in labels, a number or a vector for the whole text, and not in tokens."""
    if (model_dir / "modules.json").is_file() or kind_of(read_config(model_dir)) is None:
        return True
    return any(read_task(model_dir, spec.path)[1] != "embedding" for spec in lora)


def _follow(
    model_dir: Path,
    prompt: str,
    lora: Sequence[LoraSpec],
    sampling: Sampling,
    steps: int,
    *,
    chat: bool,
    system: str,
    sink: Sink,
) -> tuple[Told, Anatomy]:
    loaded = load(model_dir, lora)
    ids, rendered = loaded.encode(prompt, chat=chat, system=system)
    told = Told(rendered, len(ids))
    runner = _Runner(loaded, ids, sampling, steps, told.notes)
    sets = adapter_sets(lora)
    with watched(loaded.base) as order:
        for number, specs in enumerate(sets):
            sink(Progress("explain", number, len(sets), "runs"))
            told.runs.append(runner(specs))
    sink(Progress("explain", len(sets), len(sets), "runs"))
    anatomy = build_anatomy(loaded.base, loaded.config, loaded.kind, model_dir, positions=len(ids), order=order)
    return told, anatomy


class _Runner:
    """Runs the prompt without and with the adapters."""

    def __init__(self, loaded: Loaded, ids: list[int], sampling: Sampling, steps: int, notes: list[str]) -> None:
        self.loaded, self.ids, self.sampling, self.steps = loaded, ids, sampling, steps
        self.guesser = Guesser(loaded, notes)

    def __call__(self, specs: Sequence[LoraSpec]) -> Run:
        import torch

        self.loaded.adapters.apply(self.loaded.active if specs else ())
        with torch.inference_mode():
            return self._seq2seq(specs) if self.loaded.kind == "encoder-decoder" else self._one_stack(specs)

    def _one_stack(self, specs: Sequence[LoraSpec]) -> Run:
        import torch

        blocks = BlockStates(find_blocks(self.loaded.base))
        given = {"input_ids": torch.tensor([self.ids])}
        known = last_only(self.loaded.base, 1)
        if self.loaded.kind == "decoder":
            known["use_cache"] = True
        out = watch([blocks], partial(self.loaded.model, **given, **known))
        place = self.loaded.place(self.ids)
        logits = out.logits[0, place - len(self.ids)].float()
        guesses = self.guesser(blocks, given, logits, specs, place=place - len(self.ids))
        name = _TARGET if self.loaded.kind == "decoder" else _SOURCE
        stack = _stack(name, self.loaded, self.ids, blocks, guesses, position=place)
        if self.loaded.kind == "encoder":
            return Run(name=run_name(specs), stacks=(stack,), gap=place)
        return self._run(specs, (stack,), self.ids, out, {})

    def _seq2seq(self, specs: Sequence[LoraSpec]) -> Run:
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        loaded, targets = self.loaded, self._first_targets()
        source, target = (BlockStates(find_blocks(loaded.base, side)) for side in (_SOURCE, _TARGET))
        ids, mask = torch.tensor([self.ids]), torch.ones(1, len(self.ids), dtype=torch.long)
        written = {"decoder_input_ids": torch.tensor([targets])}
        out = watch([source, target], partial(loaded.model, input_ids=ids, **written))
        for blocks, tokens in ((source, self.ids), (target, targets)):
            _check_follows(blocks, tokens)
        states: Any = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        states.router_logits = None  # Switch asks for them
        encoded = {"encoder_outputs": states, "attention_mask": mask}
        guesses = self.guesser(target, {**encoded, **written}, out.logits[0, -1].float(), specs)
        stacks = (
            _stack(_SOURCE, loaded.source, self.ids, source, []),
            _stack(_TARGET, loaded, targets, target, guesses),
        )
        return self._run(specs, stacks, targets, out, encoded)

    def _run(
        self,
        specs: Sequence[LoraSpec],
        stacks: tuple[StackRun, ...],
        ids: Sequence[int],
        out: Any,
        encoded: dict[str, Any],
    ) -> Run:
        logits = out.logits[0, -1].float().numpy()
        return Run(
            name=run_name(specs),
            stacks=stacks,
            filters=tuple(iter_filters(logits, self.sampling)),
            steps=self._loop(ids, out, encoded),
            entropy=entropy(logits),
            distribution=build_distribution(logits, self.loaded.pieces),
        )

    def _first_targets(self) -> list[int]:
        """What the decoder of an encoder-decoder begins with."""
        config = self.loaded.base.generation_config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(self.loaded.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(self.loaded.config, "bos_token_id", None) or 0
        forced = getattr(config, "forced_bos_token_id", None)
        return [int(start)] if forced is None or forced == start else [int(start), int(forced)]

    def _loop(self, ids: Sequence[int], out: Any, encoded: dict[str, Any]) -> tuple[Step, ...]:
        """The next tokens, each chosen by the settings' filters.

        `out` is what the model said after `ids`, with its cache; a model without one reads the whole text each time.
        """
        import torch

        randomness = np.random.default_rng(self.sampling.seed)
        ends = _end_ids(self.loaded.base.generation_config, self.loaded.config)
        steps: list[Step] = []
        name = "decoder_input_ids" if self.loaded.kind == "encoder-decoder" else "input_ids"
        given = list(ids)
        while len(steps) < self.steps:
            step = self._choose(out.logits[0, -1].float().numpy(), randomness, ends)
            steps.append(step)
            if step.ends or len(steps) == self.steps:
                break
            cache = getattr(out, "past_key_values", None)
            given = [step.id] if cache is not None else [*given, step.id]
            read = {name: torch.tensor([given]), **encoded}
            out = self.loaded.model(**read, past_key_values=cache, use_cache=True)
        return with_characters(steps)

    def _choose(self, logits: States, randomness: np.random.Generator, ends: set[int]) -> Step:
        own, sampled = softmax(logits), sampled_shares(logits, self.sampling)
        greedy = self.sampling.temp <= 0
        wide = sampled.astype(np.float64)
        token = int(own.argmax()) if greedy else int(randomness.choice(len(own), p=wide / wide.sum()))
        best = np.argsort(-own, kind="stable")[:_TOP].tolist()
        pieces = self.loaded.pieces([token, *best])
        options = tuple(
            Option(one, piece, float(own[one]), float(sampled[one]))
            for one, piece in zip(best, pieces[1:], strict=True)
        )
        return Step(token, pieces[0], float(own[token]), float(sampled[token]), options, ends=token in ends)


def sampled_shares(logits: States, sampling: Sampling) -> States:
    """The distribution that the filters and the temperature of `sampling` leave: (vocabulary,)."""
    from edgetune.explain.filters import kept_tokens

    result = np.zeros_like(logits)
    kept = kept_tokens(logits, sampling)
    if sampling.temp <= 0:
        result[kept] = 1.0
        return result
    result[kept] = softmax(logits[kept] / np.float32(sampling.temp))
    return result


def _check_follows(blocks: BlockStates, tokens: Sequence[int]) -> None:
    """Refuse a model that fills its texts up (LED), or guesses several tokens ahead (ProphetNet)."""
    embedded = blocks.embedded
    if embedded is not None and len(embedded) != len(tokens):
        raise UnsupportedError(
            f"explain does not follow this model: its blocks see {len(embedded)} places of a text of {len(tokens)} "
            "tokens.",
            hint="Its answers: edgetune generate",
        )


def _stack(
    name: str,
    vocabulary: Vocabulary,
    ids: Sequence[int],
    blocks: BlockStates,
    guesses: Sequence[Lensed],
    *,
    position: int = -1,
) -> StackRun:
    states = blocks.after
    seen = Seen.of(blocks.embedded, states)
    own, across = blocks.attention, blocks.cross_attention
    runs = block_runs(seen, states, own, guesses, across=across, added=blocks.added, position=position)
    return StackRun(name, tokens_of(vocabulary, ids, seen), runs, stacked(own), stacked(across))


def _end_ids(*configs: Any) -> set[int]:
    found: set[int] = set()
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    return {int(one) for one in found}
