"""A text through a T5 in GGUF: what the encoder makes of it, and how the decoder chooses its first tokens from that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.seq2seq import Seq2SeqEngine
from edgetune.engine.tap import Tap
from edgetune.events import Progress, Sink
from edgetune.explain.filters import build_distribution, entropy, iter_filters
from edgetune.explain.gguf_parts import Guesser, choose_steps
from edgetune.explain.page import Run, StackRun
from edgetune.explain.parts import Told, adapter_sets, block_runs, check_length, run_name, stacked, tokens_of
from edgetune.explain.seen import Seen
from edgetune.explain.spelling import Spelling

States = NDArray[np.float32]
_DECODER_NORM = "dec.output_norm"


def follow_seq2seq(
    path: Path,
    prompt: str,
    adapters: Sequence[LoraSpec],
    sampling: Sampling,
    steps: int,
    *,
    threads: int,
    gpu_layers: int,
    sink: Sink,
) -> Told:
    """Follow `prompt`, the source; see `gguf_run.explain_gguf`."""
    seen = _Sides()
    tap = Tap(seen.wants, seen.take)
    sets = adapter_sets(adapters)
    with Seq2SeqEngine.open(path, threads=threads, gpu_layers=gpu_layers, tap=tap) as engine:
        ids = engine.tokenizer.encode(prompt)
        check_length(ids)
        told = Told(prompt, len(ids))
        guesser = Guesser(engine, _DECODER_NORM, told.notes)
        for number, specs in enumerate(sets):
            sink(Progress("explain", number, len(sets), "runs"))
            told.runs.append(_run(engine, seen, ids, specs, guesser, sampling, steps))
        sink(Progress("explain", len(sets), len(sets), "runs"))
    return told


class _Sides:
    """Tensors of the encoder's graph, and then of the decoder's: both begin with an embedding."""

    def __init__(self) -> None:
        self.encoder, self.decoder = Seen(), Seen(has_source=True)
        self._side: Seen | None = None
        self.is_listening = False

    def clear(self, source: int, target: int) -> None:
        self.encoder.clear(source)
        self.decoder.clear(target)
        self._side, self.is_listening = None, True

    def wants(self, name: str) -> bool:
        return self.is_listening and self.encoder.wants(name)

    def take(self, name: str, values: States) -> None:
        if name == "embd":
            self._side = self.encoder if self._side is None else self.decoder
        if self._side is not None:
            self._side.take(name, values)


def _run(
    engine: Seq2SeqEngine,
    seen: _Sides,
    ids: list[int],
    specs: tuple[LoraSpec, ...],
    guesser: Guesser,
    sampling: Sampling,
    steps: int,
) -> Run:
    engine.set_adapters(specs)
    target = [engine.start_id]
    seen.clear(len(ids), len(target))
    last = engine.logits(ids, target)[-1].copy()
    seen.is_listening = False
    return Run(
        name=run_name(specs),
        stacks=(_encoder(engine, seen.encoder, ids), _decoder(engine, seen.decoder, target, last, specs, guesser)),
        filters=tuple(iter_filters(last, sampling)),
        steps=choose_steps(engine, ids, sampling, steps),
        entropy=entropy(last),
        distribution=build_distribution(last, Spelling(engine.tokenizer).pieces),
    )


def _encoder(engine: Seq2SeqEngine, seen: Seen, ids: list[int]) -> StackRun:
    states = _states(seen)
    attention = [seen.take_attention(layer) for layer in range(len(states))]
    blocks = block_runs(seen, states, attention, [])
    return StackRun("encoder", tokens_of(Spelling(engine.tokenizer), ids, seen), blocks, stacked(attention))


def _decoder(
    engine: Seq2SeqEngine,
    seen: Seen,
    target: list[int],
    last: States,
    specs: tuple[LoraSpec, ...],
    guesser: Guesser,
) -> StackRun:
    states = _states(seen)
    guesses = guesser(states, last, specs)
    own, across = [], []
    for layer in range(len(states)):
        # First a block looks at what was written, and then at the source.
        maps = seen.pieces.get(f"kq_soft_max-{layer}", [])
        is_whole = len(maps) == 2
        own.append(maps[0][:, :, : len(target)] if is_whole else None)
        across.append(maps[1] if is_whole else None)
    blocks = block_runs(seen, states, own, guesses, across=across)
    return StackRun(
        "decoder", tokens_of(Spelling(engine.tokenizer), target, seen), blocks, stacked(own), stacked(across)
    )


def _states(seen: Seen) -> list[States]:
    return [state for layer in range(seen.layers) if (state := seen.after(layer)) is not None]
