"""A prompt through a GGUF model, in llama.cpp itself: what every block does, with the very weights that serve it.

Hidden states and attention are read out of llama.cpp's own graph (`engine.tap`, `seen`); what the head would say of
them is computed by `lens` from the same file. Decoders are followed here, encoders by `gguf_encoder`, encoder-decoders
by `gguf_seq2seq`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.engine.seq2seq import SEQ2SEQ_ARCHITECTURES
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_writes_text
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Progress, Sink, ignore
from edgetune.explain.anatomy import KINDS, read_anatomy
from edgetune.explain.filters import build_distribution, entropy, iter_filters
from edgetune.explain.gguf_parts import Guesser, choose_steps
from edgetune.explain.page import Explanation, ModelKind, Run, StackRun
from edgetune.explain.parts import Told, adapter_sets, block_runs, check_length, run_name, stacked, tokens_of
from edgetune.explain.seen import Seen
from edgetune.explain.spelling import Spelling
from edgetune.gguf_header import read_gguf_header


def explain_gguf(
    path: Path,
    prompt: str,
    *,
    lora: Sequence[LoraSpec] = (),
    chat: bool = False,
    system: str = "",
    sampling: Sampling | None = None,
    steps: int = 8,
    threads: int = 0,
    gpu_layers: int = -1,
    sink: Sink = ignore,
) -> Explanation:
    """Follow `prompt` through the model at `path`; with `lora`, through the base and through the adapted model.

    `chat` puts it into the model's template as a user's turn. `steps` is how often the loop goes round. Raises
    `UsageError` for a prompt that is empty or too long, and what opening the model raises.
    """
    sampling = sampling or Sampling()
    if sampling.seed == RANDOM_SEED:
        sampling = replace(sampling, seed=random.randrange(1 << 31))
    if not prompt.strip():
        raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
    adapters = [spec for spec in lora if spec.scale]
    kind = _kind(path)
    if kind != "decoder" and (chat or system):
        raise UsageError(f"{path} has no chat template.", hint="Leave out --chat and --system.")
    options = {"threads": threads, "gpu_layers": gpu_layers, "sink": sink}
    if kind == "encoder":
        from edgetune.explain.gguf_encoder import follow_encoder

        told = follow_encoder(path, prompt, adapters, **options)  # type: ignore[arg-type]
    elif kind == "encoder-decoder":
        from edgetune.explain.gguf_seq2seq import follow_seq2seq

        told = follow_seq2seq(path, prompt, adapters, sampling, steps, **options)  # type: ignore[arg-type]
    else:
        ids, rendered = _encode(path, prompt, chat=chat, system=system)
        told = Told(rendered, len(ids))
        told.runs = _follow_decoder(path, ids, adapters, sampling, steps, told.notes, **options)  # type: ignore[arg-type]
    anatomy = read_anatomy(path, positions=told.positions, adapters=[spec.path for spec in adapters])
    if any(stack.rope is not None and stack.rope.scaling == "longrope" for stack in anatomy.stacks):
        told.notes.append(
            "This model turns positions by other factors (LongRoPE) in a context longer than it was first trained for, "
            "as chat may open; here are those of a short one."
        )
    return Explanation(
        anatomy=replace(anatomy, kind=kind),
        engine="llama.cpp",
        prompt=prompt,
        rendered=told.rendered,
        sampling=asdict(sampling),
        runs=tuple(told.runs),
        notes=tuple(dict.fromkeys(told.notes)),
    )


def _kind(path: Path) -> ModelKind:
    """What the model at `path` is used as: a decoder with a classifier on it is followed as an encoder is."""
    header = read_gguf_header(path)
    if header.architecture in SEQ2SEQ_ARCHITECTURES:
        return "encoder-decoder"
    try:
        check_writes_text(header)
    except UnsupportedError:
        return "encoder"
    return KINDS.get(header.architecture, "decoder")


def _follow_decoder(
    path: Path,
    ids: list[int],
    adapters: Sequence[LoraSpec],
    sampling: Sampling,
    steps: int,
    notes: list[str],
    *,
    threads: int,
    gpu_layers: int,
    sink: Sink,
) -> list[Run]:
    seen = Seen(architecture=read_gguf_header(path).architecture)
    tap = Tap(seen.wants, seen.take)
    context = -(-(len(ids) + steps + 1) // 256) * 256
    sets = adapter_sets(adapters)
    runs = []
    with LlamaEngine.open(
        path, ctx_size=context, flash_attn="off", threads=threads, gpu_layers=gpu_layers, tap=tap
    ) as engine:
        run = _Runner(engine, seen, ids, sampling, steps, notes)
        for number, specs in enumerate(sets):
            sink(Progress("explain", number, len(sets), "runs"))
            runs.append(run(specs))
        sink(Progress("explain", len(sets), len(sets), "runs"))
    return runs


def _encode(path: Path, prompt: str, *, chat: bool, system: str) -> tuple[list[int], str]:
    tokenizer = GgufTokenizer.open(path)
    try:
        if chat:
            template = tokenizer.chat_template
            if template is None:
                raise UsageError(f"{path} has no chat template.", hint="Leave out --chat.")
            turns = [{"role": "system", "content": system}] if system else []
            rendered = template.render([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True)
            ids, text = tokenizer.encode_rendered(rendered), rendered.text
        else:
            ids, text = tokenizer.encode(prompt), prompt
    finally:
        tokenizer.close()
    check_length(ids)
    return ids, text


class _Runner:
    """Runs the prompt under one set of adapters after the other."""

    def __init__(
        self, engine: LlamaEngine, seen: Seen, ids: list[int], sampling: Sampling, steps: int, notes: list[str]
    ) -> None:
        self.engine, self.seen, self.ids, self.sampling, self.steps = engine, seen, ids, sampling, steps
        self.notes = notes
        self.spelling = Spelling(engine.tokenizer)
        self.guesser = Guesser(engine, "output_norm", notes)

    def __call__(self, specs: tuple[LoraSpec, ...]) -> Run:
        self.engine.set_adapters(specs)
        seen = self.seen
        length = len(self.ids)
        seen.clear(length)
        # All of them are computed: else the last block would go on with the last token alone.
        for _, rows in self.engine.iter_logits(self.ids, keep=True):
            last = rows[-1].copy()
        seen.is_listening = False
        states = [state for layer in range(seen.layers) if (state := seen.after(layer)) is not None]
        if not states:
            self.notes.append("This model's graph does not show its hidden states.")
        guesses = self.guesser(states, last, specs)
        attention = [seen.take_attention(layer) for layer in range(len(states))]
        blocks = block_runs(seen, states, attention, guesses)
        stack = StackRun("decoder", tokens_of(self.spelling, self.ids, seen), blocks, stacked(attention))
        seen.pieces = {}
        return Run(
            name=run_name(specs),
            stacks=(stack,),
            filters=tuple(iter_filters(last, self.sampling)),
            steps=choose_steps(self.engine, self.ids, self.sampling, self.steps),
            entropy=entropy(last),
            distribution=build_distribution(last, self.spelling.pieces),
        )
