"""What the pages of all models that end in a vector, labels or a number have in common, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.encoder import Encoder
from edgetune.engine.encoder_tokens import Encoded
from edgetune.engine.protocol import LoraSpec
from edgetune.explain.labels import Labelled, token_effects
from edgetune.explain.page import Run, StackRun
from edgetune.explain.parts import Added, Told, Vocabulary, block_runs, check_length, run_name, stacked, tokens_of
from edgetune.explain.seen import Maps, Seen
from edgetune.head import Pooling

States = NDArray[np.float32]
HEAD_IS_ADAPTERS = "The head came with the adapter: the base by itself has nothing to say."
_POSITIONS = {"cls": 0, "last": -1}
"""Pooling → the position whose attention is told."""


@dataclass
class Work:
    """What was seen of one model at work on a text."""

    encoded: Encoded
    seen: Seen
    states: Sequence[States]
    """After each block."""
    attention: Sequence[Maps | None]
    pooling: Pooling
    """What the head, or the vector, is made of."""
    heard: Callable[[States], States | None] = field(repr=False)
    """The head's outputs → what the head makes of the state after each block, (blocks, outputs)."""
    added: Sequence[Added | None] = ()
    """What the parts of each block did, where that is known without `seen`."""


def read_text(encoder: Encoder, prompt: str, told: Told) -> Encoded:
    """The tokens of `prompt` behind what the model wants before it. Raises `UsageError` for too many or none."""
    profile = encoder.profile
    text = profile.prompts.get(profile.default_prompt, "") + prompt
    encoded = encoder.token_ids([text])[0]
    check_length(encoded.ids)
    told.rendered, told.positions = text, len(encoded.ids)
    if len(encoded.ids) == profile.max_tokens:
        told.notes.append(f"The model takes {len(encoded.ids)} tokens; what is behind them is not read.")
    return encoded


def compute(encoder: Encoder, prompt: str) -> tuple[States | None, States | None]:
    """The vector of `prompt`, or the outputs of the head on it."""
    if encoder.scores_texts:
        return None, encoder.logits([prompt])[0]
    return encoder.embed([prompt])[0], None


def build_run(
    encoder: Encoder,
    work: Work,
    result: tuple[States | None, States | None],
    vocabulary: Vocabulary,
    labelled: Labelled,
    specs: Sequence[LoraSpec],
) -> Run:
    """The run of what `compute` gave and what was seen meanwhile."""
    profile, ids, pooling = encoder.profile, work.encoded.ids, work.pooling
    vector, logits = result
    head = profile.head
    tokens = tokens_of(vocabulary, ids, work.seen)
    answer: dict[str, Any] = {}
    if vector is not None:
        answer = {"vector": tuple(vector.tolist()), "is_normalized": profile.normalize}
    guesses = []
    if logits is not None and head is not None:
        guesses = labelled.after_blocks(head, work.heard(logits), specs=specs)
        answer = labelled.answer(head, logits)
        # Control tokens are not the text's own, and stay.
        answer["effects"] = token_effects(head, logits, encoder.score_ids, ids, [one.control for one in tokens])
    place = _POSITIONS.get(pooling, -1)
    blocks = block_runs(work.seen, work.states, work.attention, guesses, added=work.added, position=place)
    name = "encoder" if profile.is_encoder else "decoder"
    stack = StackRun(name, tokens, blocks, stacked(work.attention))
    return Run(name=run_name(specs), stacks=(stack,), pooling=pooling, **answer)
