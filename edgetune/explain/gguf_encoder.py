"""A text through a GGUF model that ends in a vector, labels or a number: an encoder, or a decoder with such a head.

After every block the model's own pooling and head say what they would say if the stack ended there; and every token is
left out once, to see how much of the answer is its doing. States come from llama.cpp's graph (`seen`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.encoder import Encoder
from edgetune.engine.encoder_llama import open_llama_encoder
from edgetune.engine.json_tokenizer import JSON_KEY, JsonTokenizer
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.events import Progress, Sink
from edgetune.explain.encoder_parts import HEAD_IS_ADAPTERS, Work, build_run, compute, read_text
from edgetune.explain.labels import Labelled
from edgetune.explain.lens import Lens, LensError
from edgetune.explain.page import Run
from edgetune.explain.parts import Told, Vocabulary, adapter_sets
from edgetune.explain.seen import Seen
from edgetune.explain.spelling import Spelling
from edgetune.gguf_header import read_gguf_header
from edgetune.head import Pooling, pool, read_head

States = NDArray[np.float32]
_LARGEST_DIFFERENCE = 1e-2
"""Of the last block's state, normed, to the graph's own last one, as a share of its length."""


def follow_encoder(
    path: Path, prompt: str, adapters: Sequence[LoraSpec], *, threads: int, gpu_layers: int, sink: Sink
) -> Told:
    """Follow `prompt`; see `gguf_run.explain_gguf`."""
    sets = adapter_sets(adapters)
    told = Told(prompt, 0)
    if _has_other_labels(path, adapters):
        sets = sets[1:]
        told.notes.append(HEAD_IS_ADAPTERS)
    labelled = Labelled()
    for number, specs in enumerate(sets):
        sink(Progress("explain", number, len(sets), "runs"))
        seen = Seen(architecture=read_gguf_header(path).architecture)
        tap = Tap(seen.wants, seen.take)
        with open_llama_encoder(
            path, lora=specs, threads=threads, gpu_layers=gpu_layers, flash_attn="off", tap=tap
        ) as encoder:
            told.runs.append(_Follower(path, encoder, seen, specs, labelled, told)(prompt))
    sink(Progress("explain", len(sets), len(sets), "runs"))
    return told


def _has_other_labels(path: Path, adapters: Sequence[LoraSpec]) -> bool:
    """Whether an adapter brings a head whose answers are not the base's; files repeat the base's where it stays."""
    own = read_head(path)
    known = own.labels if own is not None and own.scores_texts else None
    heads = [read_head(spec.path) for spec in adapters]
    return any(head is not None and head.scores_texts and head.labels != known for head in heads)


class _Follower:
    """The text's way through one opened model."""

    def __init__(
        self, path: Path, encoder: Encoder, seen: Seen, specs: Sequence[LoraSpec], labelled: Labelled, told: Told
    ) -> None:
        self.path, self.encoder, self.seen, self.specs = path, encoder, seen, specs
        self.labelled, self.told, self.profile = labelled, told, encoder.profile

    def __call__(self, prompt: str) -> Run:
        encoder, seen = self.encoder, self.seen
        encoded = read_text(encoder, prompt, self.told)
        seen.has_unnamed = self.profile.is_encoder
        seen.clear(len(encoded.ids))
        result = compute(encoder, prompt)
        seen.is_listening = False
        states = [state for layer in range(seen.layers) if (state := seen.after(layer)) is not None]
        attention = [seen.take_attention(layer) for layer in range(len(states))]
        head = self.profile.head
        pooling = (head.pooling if head else None) or self.profile.pooling
        work = Work(encoded, seen, states, attention, pooling, partial(self._heard, states, pooling))
        with self._vocabulary() as vocabulary:
            return build_run(encoder, work, result, vocabulary, self.labelled, self.specs)

    def _heard(self, states: Sequence[States], pooling: Pooling, logits: States) -> States | None:
        """What the head says of the state after every block, (blocks, outputs); None, with a note, if unknown."""
        head, final = self.profile.head, self.seen.final()
        assert head is not None
        if not states or final is None:
            self.told.notes.append("This model's graph does not show its hidden states.")
            return None
        try:
            norm = _final_norm(self.path)
            ends = [norm(state) for state in states]
        except LensError as error:
            self.told.notes.append(f"What the head would say inside the stack is not shown: {error}.")
            return None
        rows = np.stack([pool(end, [len(end)], pooling)[0] for end in ends])
        heard = np.array(head.apply(rows))
        if np.abs(heard[-1] - logits).max() > _LARGEST_DIFFERENCE * (1 + np.abs(logits).max()):
            self.told.notes.append("What the head would say inside the stack is not shown: it is not known.")
            return None
        heard[-1] = logits
        return heard

    @contextmanager
    def _vocabulary(self) -> Iterator[Vocabulary]:
        source = read_gguf_header(self.path).metadata.get(JSON_KEY)
        if isinstance(source, str) and source:
            yield Spelling(JsonTokenizer(source))
            return
        own = GgufTokenizer.open(self.path)
        try:
            yield Spelling(own)
        finally:
            own.close()


def _final_norm(path: Path) -> Any:
    """The norm between the last block and the pooling; nothing where blocks end in theirs."""
    header = read_gguf_header(path)
    if all(tensor.name != "output_norm.weight" for tensor in header.tensors):
        return lambda states: states
    return Lens(header).norm
