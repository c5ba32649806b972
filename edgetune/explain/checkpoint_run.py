"""A prompt through a Hugging Face model, in torch: any decoder, encoder or encoder-decoder that transformers knows.

For models that llama.cpp has no graph for, and to look at a checkpoint before it is converted. Weights are read from
safetensors alone, and no code that comes with a model is run. torch is imported where it is used.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.events import Progress, Sink, ignore
from edgetune.explain.checkpoint import Loaded, load
from edgetune.explain.checkpoint_anatomy import blocks_of, build_anatomy, final_norm_of, stack_module
from edgetune.explain.filters import entropy, iter_filters, softmax
from edgetune.explain.lens import divergence
from edgetune.explain.page import BlockRun, Explanation, Guess, Lensed, Option, Run, StackRun, Step, Token

_MOST_GUESSED = 64
_TOP = 10
_LARGEST_KL = 1e-3
_SOURCE, _TARGET = "encoder", "decoder"

States = NDArray[np.float32]


def explain_checkpoint(
    model_dir: Path,
    prompt: str,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    chat: bool = False,
    system: str = "",
    sampling: Sampling | None = None,
    steps: int = 8,
    sink: Sink = ignore,
) -> Explanation:
    """Follow `prompt` through the model in `model_dir`; with PEFT directories in `adapters`, without and with them.

    Raises `UsageError` for a prompt that is empty or too long, `UnsupportedError` for a model that transformers does
    not know by itself, `CorruptFileError` for a broken one.
    """
    sampling = sampling or Sampling()
    if sampling.seed == RANDOM_SEED:
        sampling = replace(sampling, seed=random.randrange(1 << 31))
    sink(Progress("load", 0, 1, "models"))
    loaded = load(model_dir, adapters)
    ids, rendered = loaded.encode(prompt, chat=chat, system=system)
    notes: list[str] = []
    names = [""] if not adapters else ["", " + ".join(path.resolve().name for path, _ in adapters)]
    if loaded.head_is_adapters:
        names = names[1:]
        notes.append("The head came with the adapter: the base by itself has nothing to say.")
    runner = _Runner(loaded, ids, sampling, steps, notes)
    runs = []
    for number, name in enumerate(names):
        sink(Progress("explain", number, len(names), "runs"))
        runs.append(runner(name))
    sink(Progress("explain", len(names), len(names), "runs"))
    anatomy = build_anatomy(loaded.base, loaded.config, loaded.kind, model_dir, positions=len(ids))
    return Explanation(
        anatomy=anatomy,
        engine="torch",
        prompt=prompt,
        rendered=rendered,
        sampling=asdict(sampling),
        runs=tuple(runs),
        notes=tuple(dict.fromkeys(notes)),
    )


class _Runner:
    """Runs the prompt without and with the adapters; remembers the base's guesses to compare with."""

    def __init__(self, loaded: Loaded, ids: list[int], sampling: Sampling, steps: int, notes: list[str]) -> None:
        self.loaded, self.ids, self.sampling, self.steps, self.notes = loaded, ids, sampling, steps, notes
        self.base_logits: States | None = None

    def __call__(self, name: str) -> Run:
        import contextlib

        import torch

        model = self.loaded.model
        off = model.disable_adapter() if not name and hasattr(model, "disable_adapter") else contextlib.nullcontext()
        with torch.no_grad(), off:
            return self._run(name or "base")

    def _run(self, name: str) -> Run:
        import torch

        source = torch.tensor([self.ids])
        arguments: dict[str, Any] = {"input_ids": source}
        targets: list[int] = []
        if self.loaded.kind == "encoder-decoder":
            targets = self._first_targets()
            arguments["decoder_input_ids"] = torch.tensor([targets])
        with _last_block(self.loaded) as last_block:
            out = self.loaded.model(**arguments, output_hidden_states=True, output_attentions=True)
        if self.loaded.kind == "encoder":
            return self._encoder(name, out)
        seq2seq = self.loaded.kind == "encoder-decoder"
        stacks = []
        if seq2seq:
            stacks.append(
                self._stack(_SOURCE, self.ids, out.encoder_hidden_states, out.encoder_attentions, guesses=None)
            )
        hidden = list(out.decoder_hidden_states if seq2seq else out.hidden_states)
        # transformers hands out the last state normed already; the hook has it as it left the block.
        hidden[-1] = last_block[0] if last_block else hidden[-1]
        attentions = out.decoder_attentions if seq2seq else out.attentions
        across = out.cross_attentions if seq2seq else None
        logits = out.logits[0, -1].float().numpy()
        guesses = self._guesses(hidden, logits, adapted=name != "base")
        target_ids = targets if seq2seq else self.ids
        stacks.append(self._stack(_TARGET, target_ids, hidden, attentions, guesses=guesses, across=across))
        return Run(
            name=name,
            stacks=tuple(stacks),
            filters=tuple(iter_filters(logits, self.sampling)),
            steps=self._loop(target_ids, out),
            entropy=entropy(logits),
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

    def _encoder(self, name: str, out: Any) -> Run:
        scores: dict[str, float] = {}
        guesses: list[Lensed] | None = None
        logits = getattr(out, "logits", None)
        if logits is not None and logits.dim() == 2:
            scores = _scores(logits[0].float().numpy(), self.loaded.config)
        elif logits is not None:
            last = self._top(logits[0, -1].float().numpy())
            best = tuple(self.loaded.pieces(logits[0].argmax(-1).tolist()))
            layers = len(out.hidden_states) - 1
            guesses = [Lensed()] * (layers - 1) + [Lensed(last, best)]
        stack = self._stack(_SOURCE, self.ids, out.hidden_states, out.attentions, guesses=guesses)
        return Run(name=name, stacks=(stack,), scores=scores)

    def _stack(
        self,
        name: str,
        ids: Sequence[int],
        hidden: Sequence[Any],
        attentions: Sequence[Any] | None,
        *,
        guesses: list[Lensed] | None,
        across: Sequence[Any] | None = None,
    ) -> StackRun:
        maps = _stacked(attentions)
        cross = _stacked(across)
        blocks = [
            BlockRun(
                norm=float(states[0].norm(dim=-1).mean()),
                attends_to=tuple(maps[layer, :, -1].mean(0).tolist()) if maps is not None else (),
                attends_across=tuple(cross[layer, :, -1].mean(0).tolist()) if cross is not None else (),
                lens=guesses[layer] if guesses else Lensed(),
            )
            for layer, states in enumerate(hidden[1:])
        ]
        norms = hidden[0][0].norm(dim=-1).tolist()
        pieces = self.loaded.source_pieces(ids) if name == _SOURCE else self.loaded.pieces(ids)
        tokens = tuple(
            Token(token, piece, self.loaded.is_control(piece), float(norm))
            for token, piece, norm in zip(ids, pieces, norms, strict=True)
        )
        return StackRun(name, tokens, tuple(blocks), maps, cross)

    def _guesses(self, hidden: Sequence[Any], logits: States, *, adapted: bool) -> list[Lensed]:
        """What the head says after every block; empty, with a note, where that cannot be known."""
        norm, base = final_norm_of(self.loaded.base, self.loaded.kind), self.loaded.base
        head = self.loaded.model.get_output_embeddings()
        shown = [_to_logits(base, head, norm, state[0, -_MOST_GUESSED:]) for state in hidden[1:]]
        if divergence(logits[None], shown[-1][-1:])[0] > _LARGEST_KL:
            self.notes.append("Guesses inside the stack are not shown: this model's head is not one that is known.")
            return []
        rows = np.stack([one[-1] for one in shown])
        kl: list[float | None] = [None] * len(rows)
        if adapted and self.base_logits is not None:
            kl = divergence(self.base_logits, rows).tolist()
        else:
            self.base_logits = rows
        return [
            Lensed(self._top(row), tuple(self.loaded.pieces(one.argmax(-1).tolist())), value)
            for row, one, value in zip(rows, shown, kl, strict=True)
        ]

    def _top(self, logits: States, count: int = 5) -> tuple[Guess, ...]:
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[:count].tolist()
        return tuple(
            Guess(token, piece, float(shares[token]))
            for token, piece in zip(best, self.loaded.pieces(best), strict=True)
        )

    def _loop(self, ids: Sequence[int], out: Any) -> tuple[Step, ...]:
        """The next tokens, each chosen by the settings' filters from what the model says; evaluated with its cache."""
        import torch

        randomness = np.random.default_rng(self.sampling.seed)
        ends = _end_ids(self.loaded.base.generation_config, self.loaded.config)
        steps: list[Step] = []
        known: dict[str, Any] = {"use_cache": True}
        if self.loaded.kind == "encoder-decoder":
            from transformers.modeling_outputs import BaseModelOutput

            known["encoder_outputs"] = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
            known["attention_mask"] = torch.ones(1, len(self.ids), dtype=torch.long)
        name = "decoder_input_ids" if self.loaded.kind == "encoder-decoder" else "input_ids"
        given, cache = list(ids), None
        for _ in range(self.steps):
            out = self.loaded.model(**{name: torch.tensor([given])}, past_key_values=cache, **known)
            step = self._choose(out.logits[0, -1].float().numpy(), randomness, ends)
            steps.append(step)
            if step.ends:
                break
            given, cache = [step.id], out.past_key_values
        return tuple(steps)

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


def _to_logits(base: Any, head: Any, norm: Any, states: Any) -> States:
    config = base.config.get_text_config(decoder=True)
    states = norm(states) if norm is not None else states
    if config.model_type in ("t5", "mt5", "umt5") and getattr(base.config, "scale_decoder_outputs", False):
        states = states * config.d_model**-0.5
    logits = head(states)
    bias = getattr(base, "final_logits_bias", None)
    logits = logits + bias if bias is not None else logits
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = (logits / cap).tanh() * cap
    result: States = logits.float().numpy()
    return result


class _last_block:
    """What the last block gives while the model runs, as a list of one tensor."""

    def __init__(self, loaded: Loaded) -> None:
        stack = stack_module(loaded.base, _TARGET if loaded.kind == "encoder-decoder" else "")
        blocks = blocks_of(stack) if stack is not None else None
        self.block = blocks[-1] if blocks is not None else None
        self.kept: list[Any] = []

    def __enter__(self) -> list[Any]:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self.kept[:] = [output[0] if isinstance(output, tuple) else output]

        self.hook = self.block.register_forward_hook(keep) if self.block is not None else None
        return self.kept

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            self.hook.remove()


def _stacked(maps: Sequence[Any] | None) -> States | None:
    """(blocks, heads, tokens, tokens)"""
    if not maps or any(one is None for one in maps):
        return None
    return np.stack([one[0].float().numpy() for one in maps])


def _scores(logits: States, config: Any) -> dict[str, float]:
    if len(logits) == 1:
        return {"value": float(logits[0])}
    names = [str(config.id2label.get(index, index)) for index in range(len(logits))]
    if config.problem_type == "multi_label_classification":
        return dict(zip(names, (1 / (1 + np.exp(-logits))).tolist(), strict=True))
    return dict(zip(names, softmax(logits).tolist(), strict=True))


def _end_ids(*configs: Any) -> set[int]:
    found: set[int] = set()
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    return {int(one) for one in found}
