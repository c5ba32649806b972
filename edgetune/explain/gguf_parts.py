"""What the pages of GGUF models that write have in common: guesses after every block, and the loop of choices.

From what `seen` has of llama.cpp's graph; which model it is and how it is run is for `gguf_run` and its kin to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import Candidate, LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.seq2seq import Seq2SeqEngine
from edgetune.explain.filters import softmax
from edgetune.explain.lens import Lens, LensError, divergence
from edgetune.explain.page import Guess, Lensed, Option, Step
from edgetune.explain.parts import most_guessed, with_characters
from edgetune.explain.spelling import Spelling
from edgetune.gguf_header import read_gguf_header

_TOP = 10

States = NDArray[np.float32]


class Guesser:
    """What the head says after every block; remembers the base's answers to compare with."""

    def __init__(self, engine: LlamaEngine | Seq2SeqEngine, norm: str, notes: list[str]) -> None:
        """`norm` is the name of the norm before the head."""
        self.engine, self.norm, self.notes = engine, norm, notes
        self.pieces = Spelling(engine.tokenizer).pieces
        self.base_logits: States | None = None
        """Of the base, after every block, at the last position: (blocks, vocabulary)."""

    def __call__(self, states: Sequence[States], last: States, specs: Sequence[LoraSpec]) -> list[Lensed]:
        """Of the `states` after each block, the last of which gave the logits `last`.

        Empty, with a note, where that cannot be known.
        """
        if not states:
            return []
        try:
            header = read_gguf_header(self.engine.path)
            lens = Lens(header, [(spec.path, spec.scale) for spec in specs], norm=self.norm)
            count = most_guessed(len(states), len(last), states[0].shape[-1])
            heard = lens.read(np.stack([state[-count:] for state in states]), count)
            heard.check(last)
        except LensError as error:
            self.notes.append(f"Guesses inside the stack are not shown: {error}.")
            return []
        logits = heard.last
        logits[-1] = last
        kl: list[float | None] = [None] * len(states)
        if specs and self.base_logits is not None:
            kl = divergence(self.base_logits, logits).tolist()
        else:
            self.base_logits = logits
        pieces = self.pieces
        return [
            Lensed(self._top(row), tuple(pieces(tokens.tolist())), tuple(likely.tolist()), value)
            for row, tokens, likely, value in zip(logits, heard.best, heard.shares, kl, strict=True)
        ]

    def _top(self, logits: States, count: int = 5) -> tuple[Guess, ...]:
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[:count].tolist()
        pieces = self.pieces(best)
        return tuple(Guess(token, piece, float(shares[token])) for token, piece in zip(best, pieces, strict=True))


def choose_steps(
    engine: LlamaEngine | Seq2SeqEngine, ids: Sequence[int], sampling: Sampling, count: int
) -> tuple[Step, ...]:
    """The next tokens after the prompt `ids`, each chosen by `sampling`."""
    if count < 1:
        return ()
    generation = engine.generate(ids, sampling, max_tokens=count, top=_TOP)
    for _ in generation:
        pass
    pieces = Spelling(engine.tokenizer).pieces
    steps = [
        Step(choice.id, piece, choice.probability, choice.sampled, _options(choice.alternatives, pieces))
        for choice, piece in zip(generation.choices, pieces(one.id for one in generation.choices), strict=True)
    ]
    if generation.finish_reason == "stop":
        options = engine.distribution(sampling, top=_TOP)
        end = next((one for one in options if one.id in engine.tokenizer.eog_ids), None)
        if end is not None:
            piece = pieces([end.id])[0]
            steps.append(Step(end.id, piece, end.probability, end.sampled, _options(options, pieces), ends=True))
    return with_characters(steps)


def _options(candidates: Sequence[Candidate], pieces: Callable[[list[int]], list[str]]) -> tuple[Option, ...]:
    texts = pieces([one.id for one in candidates])
    return tuple(
        Option(one.id, text, one.probability, one.sampled) for one, text in zip(candidates, texts, strict=True)
    )
