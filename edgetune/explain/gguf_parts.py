"""What the pages of all GGUF models have in common: tokens, blocks, guesses after them, and the loop of choices.

From what `seen` has of llama.cpp's graph; which model it is and how it is run is for `gguf_run` and its kin to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import Candidate, LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.seq2seq import Seq2SeqEngine
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import UsageError
from edgetune.explain.filters import softmax
from edgetune.explain.lens import Lens, LensError, divergence
from edgetune.explain.page import BlockRun, Guess, Lensed, Option, Run, Step, Token
from edgetune.explain.seen import Seen, share
from edgetune.gguf_header import read_gguf_header

MOST_TOKENS = 512
"""A longer prompt is refused: nobody looks at that many, and attention takes their square in memory."""

MOST_GUESSED = 64
"""Positions from the end for which the guesses after every block are made."""

_TOP = 10

States = NDArray[np.float32]


@dataclass
class Told:
    """What following a prompt gives."""

    rendered: str
    """The prompt as the model reads it."""
    positions: int
    """Tokens of it."""
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adapter_sets(adapters: Sequence[LoraSpec]) -> list[tuple[LoraSpec, ...]]:
    """What is run: nothing on the base, and all of `adapters` on it."""
    return [(), tuple(adapters)] if adapters else [()]


def run_name(specs: Sequence[LoraSpec]) -> str:
    """What a run under these adapters is called."""
    return " + ".join(f"{one.path.stem}" + (f":{one.scale:g}" if one.scale != 1 else "") for one in specs) or "base"


def check_length(ids: Sequence[int]) -> None:
    """Raise `UsageError` for a prompt of no tokens, or of more than are shown."""
    if not ids:
        raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
    if len(ids) > MOST_TOKENS:
        raise UsageError(
            f"The prompt has {len(ids)} tokens; explain shows up to {MOST_TOKENS}.", hint="Give a shorter one."
        )


class Guesser:
    """What the head says after every block; remembers the base's answers to compare with."""

    def __init__(self, engine: LlamaEngine | Seq2SeqEngine, norm: str, notes: list[str]) -> None:
        """`norm` is the name of the norm before the head."""
        self.engine, self.norm, self.notes = engine, norm, notes
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
            logits = lens.logits(np.stack([state[-1] for state in states]))
            lens.check(states[-1][-1:], last[None])
        except LensError as error:
            self.notes.append(f"Guesses inside the stack are not shown: {error}.")
            return []
        logits[-1] = last
        shown = [state[-MOST_GUESSED:] for state in states]
        best = lens.best(np.concatenate(shown)).reshape(len(states), -1)
        kl: list[float | None] = [None] * len(states)
        if specs and self.base_logits is not None:
            kl = divergence(self.base_logits, logits).tolist()
        else:
            self.base_logits = logits
        pieces = self.engine.tokenizer.pieces
        return [
            Lensed(self._top(row), tuple(pieces(tokens.tolist())), value)
            for row, tokens, value in zip(logits, best, kl, strict=True)
        ]

    def _top(self, logits: States, count: int = 5) -> tuple[Guess, ...]:
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[:count].tolist()
        pieces = self.engine.tokenizer.pieces(best)
        return tuple(Guess(token, piece, float(shares[token])) for token, piece in zip(best, pieces, strict=True))


def tokens_of(tokenizer: GgufTokenizer | JsonTokenizer, ids: Sequence[int], seen: Seen) -> tuple[Token, ...]:
    """The tokens `ids`, with the lengths of what the first block got of them."""
    embedded = seen.embedded()
    norms = np.linalg.norm(embedded, axis=-1).tolist() if embedded is not None else [0.0] * len(ids)
    pieces, control = tokenizer.pieces(ids), tokenizer.control_tokens
    return tuple(
        Token(token, piece, piece in control, norm) for token, piece, norm in zip(ids, pieces, norms, strict=True)
    )


def block_runs(
    seen: Seen,
    states: Sequence[States],
    attention: Sequence[States | None],
    guesses: Sequence[Lensed],
    *,
    across: Sequence[States | None] = (),
    position: int = -1,
) -> tuple[BlockRun, ...]:
    """What each block did, from the `states` after each and its attention; `position` is whose attention is told."""
    blocks, before = [], seen.embedded()
    for layer, after in enumerate(states):
        middle = seen.states(f"ffn_inp-{layer}", f"sa_out-{layer}")
        crossed = seen.states(f"cross_inp-{layer}")
        attended = middle if crossed is None else crossed
        looks, looks_across = attention[layer], across[layer] if across else None
        blocks.append(
            BlockRun(
                norm=float(np.linalg.norm(after, axis=-1).mean()),
                attention_share=share(before, _added(before, attended, seen.last(f"kqv_out-{layer}"))),
                cross_share=share(crossed, _added(crossed, middle)),
                mlp_share=share(middle, _added(middle, after, seen.last(f"ffn_out-{layer}"))),
                attends_to=tuple(looks[:, position].mean(0).tolist()) if looks is not None else (),
                attends_across=tuple(looks_across[:, -1].mean(0).tolist()) if looks_across is not None else (),
                lens=guesses[layer] if guesses else Lensed(),
            )
        )
        before = after
    return tuple(blocks)


def _added(before: States | None, after: States | None, added: States | None = None) -> States | None:
    """What a part of a block added: what the graph says, else the difference it made."""
    if added is not None:
        return added
    return after - before if before is not None and after is not None else None


def stacked(maps: Sequence[States | None]) -> States | None:
    """(blocks, heads, tokens, tokens); None unless every block tells its attention."""
    found = [one for one in maps if one is not None]
    return np.stack(found) if found and len(found) == len(maps) else None


def choose_steps(
    engine: LlamaEngine | Seq2SeqEngine, ids: Sequence[int], sampling: Sampling, count: int
) -> tuple[Step, ...]:
    """The next tokens after the prompt `ids`, each chosen by `sampling`."""
    if count < 1:
        return ()
    generation = engine.generate(ids, sampling, max_tokens=count, top=_TOP)
    for _ in generation:
        pass
    pieces = engine.tokenizer.pieces([choice.id for choice in generation.choices])
    steps = [
        Step(choice.id, piece, choice.probability, choice.sampled, _options(choice.alternatives))
        for choice, piece in zip(generation.choices, pieces, strict=True)
    ]
    if generation.finish_reason == "stop":
        options = engine.distribution(sampling, top=_TOP)
        end = next((one for one in options if one.id in engine.tokenizer.eog_ids), None)
        if end is not None:
            piece = engine.tokenizer.pieces([end.id])[0]
            steps.append(Step(end.id, piece, end.probability, end.sampled, _options(options), ends=True))
    return tuple(steps)


def _options(candidates: Sequence[Candidate]) -> tuple[Option, ...]:
    return tuple(Option(one.id, one.text, one.probability, one.sampled) for one in candidates)
