"""What the pages of all models have in common: tokens, what blocks did, and how runs are named.

From what `seen` has of a model at work; which model it is and what runs it is for others to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.protocol import LoraSpec
from edgetune.errors import UsageError
from edgetune.explain.page import BlockRun, HeadRun, Lensed, Run, Step, Token
from edgetune.explain.seen import Maps, Seen, share
from edgetune.explain.spelling import completed

MOST_TOKENS = 512
"""A longer prompt is refused: nobody looks at that many, and attention takes their square in memory."""

_MOST_SOURCES = 5
"""Tokens a head looks at most that are told one by one."""
_MOST_GUESSED, _FEWEST_GUESSED = 64, 16
_MOST_PRODUCTS = 10**11
"""Multiplications that the guesses after all blocks may cost: some seconds on a small machine."""

States = NDArray[np.float32]


@dataclass(frozen=True)
class Added:
    """What the parts of one block added, each as a share of the state it was added to; the mean over tokens."""

    attention: float | None = None
    mlp: float | None = None
    cross: float | None = None
    is_normed: bool = False
    """Whether a norm follows each addition, as in BERT."""


def most_guessed(blocks: int, vocabulary: int, hidden: int) -> int:
    """Positions from the end for which the guesses after every block are made; fewer for a large head."""
    affordable = _MOST_PRODUCTS // max(1, blocks * vocabulary * hidden)
    return max(_FEWEST_GUESSED, min(_MOST_GUESSED, affordable))


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
    names = [one.path.resolve().name if one.path.is_dir() else one.path.stem for one in specs]
    scales = [f":{one.scale:g}" if one.scale != 1 else "" for one in specs]
    return " + ".join(map(str.__add__, names, scales)) or "base"


def check_length(ids: Sequence[int]) -> None:
    """Raise `UsageError` for a prompt of no tokens, or of more than are shown."""
    if not ids:
        raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
    if len(ids) > MOST_TOKENS:
        raise UsageError(
            f"The prompt has {len(ids)} tokens; explain shows up to {MOST_TOKENS}.", hint="Give a shorter one."
        )


class Vocabulary(Protocol):
    """What tokens look like."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of those that no text is made of."""

    def pieces(self, ids: Sequence[int], /) -> list[str]:
        """Each token as text for people."""


def tokens_of(vocabulary: Vocabulary, ids: Sequence[int], seen: Seen) -> tuple[Token, ...]:
    """The tokens `ids`, with the lengths of what the first block got of them."""
    embedded = seen.embedded()
    norms = np.linalg.norm(embedded, axis=-1).tolist() if embedded is not None else [0.0] * len(ids)
    pieces, control = vocabulary.pieces(ids), vocabulary.control_tokens
    rows = zip(ids, pieces, norms, completed(pieces), strict=True)
    return tuple(Token(token, piece, piece in control, norm, whole) for token, piece, norm, whole in rows)


def with_characters(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The tokens of a text one after the other, with the characters that they end."""
    whole = completed([step.piece for step in steps])
    return tuple(replace(step, completes=one) for step, one in zip(steps, whole, strict=True))


def block_runs(
    seen: Seen,
    states: Sequence[States],
    attention: Sequence[Maps | None],
    guesses: Sequence[Lensed],
    *,
    across: Sequence[Maps | None] = (),
    added: Sequence[Added | None] = (),
    position: int = -1,
) -> tuple[BlockRun, ...]:
    """What each block did, from the `states` after each and its attention.

    `added` is what its parts did, where that is known without `seen`; `position` is whose attention is told.
    """
    blocks, before = [], seen.embedded()
    for layer, after in enumerate(states):
        shares = (added[layer] or Added()) if added else _added_in(seen, layer, before, after)
        looks, looks_across = attention[layer], across[layer] if across else None
        blocks.append(
            BlockRun(
                norm=float(np.linalg.norm(after, axis=-1).mean()),
                attention_share=shares.attention,
                cross_share=shares.cross,
                mlp_share=shares.mlp,
                is_normed=shares.is_normed,
                attends_to=_mean_row(looks, position),
                attends_across=_mean_row(looks_across, -1),
                heads=_head_runs(looks, position),
                heads_across=_head_runs(looks_across, -1),
                lens=guesses[layer] if guesses else Lensed(),
            )
        )
        before = after
    return tuple(blocks)


def _added_in(seen: Seen, layer: int, before: States | None, after: States) -> Added:
    """What the parts of a block in llama.cpp's graph added to the state `before` it."""
    middle = seen.between(layer)
    crossed = seen.states(f"cross_inp-{layer}")
    told = seen.last(f"kqv_out-{layer}"), seen.last(f"ffn_out-{layer}")
    attended = _change(before, middle if crossed is None else crossed)
    changed = _change(middle, after)
    return Added(
        attention=share(before, attended if told[0] is None else told[0]),
        cross=share(crossed, _change(crossed, middle)),
        mlp=share(middle, changed if told[1] is None else told[1]),
        # A norm makes the change another than what the graph says was added.
        is_normed=told[1] is not None and changed is not None and not np.allclose(told[1], changed, atol=1e-2),
    )


def _change(before: States | None, after: States | None) -> States | None:
    return after - before if before is not None and after is not None else None


def _mean_row(maps: Maps | None, position: int) -> tuple[float, ...]:
    """The mean over heads of what one position looks at."""
    return tuple(maps[:, position].astype(np.float32).mean(0).tolist()) if maps is not None else ()


def _head_runs(maps: Maps | None, position: int) -> tuple[HeadRun, ...]:
    """What one position looks at by every head."""
    if maps is None:
        return ()
    shares = maps[:, position].astype(np.float32)  # (heads, tokens)
    entropies = -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :_MOST_SOURCES]
    return tuple(
        HeadRun(max(0.0, entropy), tuple((token, float(row[token])) for token in tokens))
        for row, entropy, tokens in zip(shares, entropies.tolist(), best.tolist(), strict=True)
    )


def stacked(maps: Sequence[Maps | None]) -> Maps | None:
    """(blocks, heads, tokens, tokens); None unless every block tells its attention."""
    found = [one for one in maps if one is not None]
    return np.stack(found) if found and len(found) == len(maps) else None
