"""What an explanation says: a prompt's way through a model, as values that any front end can show.

Six steps: the prompt, its tokens, their embeddings, the blocks, the head, and the choice of the next token, which is
where the loop begins again. `record` is the JSON, which has what heads look at most: all their attention goes with the
square of the tokens. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.spelling import named

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]

_NOT_IN_JSON = {"json": False}


@dataclass(frozen=True)
class Part:
    """A weight of the model."""

    name: str
    """As the file calls it, without the block's number."""
    role: str
    """What it does, for people; the name again where nothing is known."""
    shape: tuple[int, ...]
    """(out, in) of a matrix, as torch writes it."""
    type: str
    """How it is stored: "F16", "Q4_K", "bfloat16"."""
    parameters: int
    adapted: tuple[int, ...] = ()
    """Ranks of the adapters on it."""


@dataclass(frozen=True)
class Rope:
    """What rotary positions do to queries and keys."""

    dimensions: int
    """Numbers of each head that are rotated, in pairs."""
    base: float
    scaling: str = ""
    """"linear", "yarn" …; empty for none."""
    wavelengths: tuple[float, ...] = ()
    """For every pair: tokens until it has turned once around."""
    angles: tuple[float, ...] = ()
    """For every pair: degrees it is turned by at the prompt's last position, 0 to 360."""
    window_base: float = 0.0
    """The base in blocks with a sliding window, where it is another; else 0."""


@dataclass(frozen=True)
class Stack:
    """A column of equal blocks: a decoder, an encoder, or one side of an encoder-decoder."""

    name: str
    """"decoder" or "encoder"."""
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    positions: str
    """How it knows a token's place: "rotary", "learned", "sinusoidal", "relative", …"""
    embedding: tuple[Part, ...]
    """Everything before the first block."""
    blocks: tuple[tuple[Part, ...], ...]
    head: tuple[Part, ...] = ()
    """Everything after the last block."""
    rope: Rope | None = None
    window: int = 0
    """Tokens that blocks with a sliding window look at; 0 where every block looks at all of them."""


@dataclass(frozen=True)
class Anatomy:
    """What the model is made of."""

    name: str
    path: Path
    architecture: str
    kind: ModelKind
    parameters: int
    context: int
    """Tokens it was made for; 0 when the file does not say."""
    vocabulary: int
    """Tokens it knows."""
    file_type: str
    stacks: tuple[Stack, ...]
    tied: bool
    """Whether the head is the embedding table."""


@dataclass(frozen=True)
class Token:
    """A token of the prompt (or, in an encoder-decoder, of what the decoder begins with)."""

    id: int
    piece: str
    control: bool = False
    norm: float = 0.0
    """Length of its embedding vector."""
    completes: str = ""
    """The character whose last byte it brings, of one that is spread over several tokens."""


@dataclass(frozen=True)
class Guess:
    """A token, or a label by its number, and how likely it is."""

    id: int
    piece: str
    probability: float


@dataclass(frozen=True)
class Lensed:
    """What the head would say if the stack ended after a block."""

    guesses: tuple[Guess, ...] = ()
    """At the last position, or at the gap, best first; empty where it cannot be known."""
    by_token: tuple[str, ...] = ()
    """The best guess at every position, for the last positions of a long prompt."""
    by_token_shares: tuple[float, ...] = ()
    """How likely each of them is."""
    kl_from_base: float | None = None
    """KL(base ‖ adapter) at the last position, in nats."""


@dataclass(frozen=True)
class HeadRun:
    """Where one head of a block looks from the last position, or from the gap."""

    entropy: float
    """Of its shares, in nats: 0 where it looks at one token alone."""
    looks_at: tuple[tuple[int, float], ...]
    """The few tokens it looks at most, best first: (index, share)."""


@dataclass(frozen=True)
class BlockRun:
    """What one block did, at the last position unless it says otherwise."""

    norm: float
    """Length of the hidden state after the block; the mean over tokens."""
    attention_share: float | None = None
    """Length of what attention added, as a share of the hidden state's before it; the mean over tokens."""
    cross_share: float | None = None
    """The same of the decoder's attention to the source."""
    mlp_share: float | None = None
    """The same of the feed-forward part."""
    is_normed: bool = False
    """Whether a norm follows each of these additions, as in BERT; the shares are of what was added before it."""
    lens: Lensed = Lensed()
    attends_to: tuple[float, ...] = ()
    """How much the last position looks at each token, the mean over heads."""
    attends_across: tuple[float, ...] = ()
    """Of a decoder: how much it looks at each token of the source."""
    heads: tuple[HeadRun, ...] = ()
    """Empty where the engine does not tell."""
    heads_across: tuple[HeadRun, ...] = ()
    """Of a decoder: the same heads' attention to the source."""


@dataclass(frozen=True)
class StackRun:
    """A stack at work on its tokens."""

    name: str
    tokens: tuple[Token, ...]
    blocks: tuple[BlockRun, ...]
    attention: NDArray[np.float16] | None = field(default=None, repr=False, metadata=_NOT_IN_JSON)
    """(blocks, heads, tokens, tokens); None where the engine does not tell."""
    cross_attention: NDArray[np.float16] | None = field(default=None, repr=False, metadata=_NOT_IN_JSON)
    """(blocks, heads, tokens, source tokens)"""


@dataclass(frozen=True)
class Option:
    """A candidate for the next token."""

    id: int
    piece: str
    probability: float
    """By the model alone."""
    sampled: float
    """After the sampling settings."""


@dataclass(frozen=True)
class Distribution:
    """What may come next, by the model alone, before any setting."""

    likeliest: tuple[Guess, ...] = ()
    """The first few hundred tokens, best first."""
    tail: tuple[tuple[float, int], ...] = ()
    """All other tokens, likeliest first: (natural logarithm of a probability, tokens that have about it)."""


@dataclass(frozen=True)
class Filter:
    """One sampling setting, at work after those before it."""

    name: str
    setting: float
    kept: int
    """Tokens left."""
    mass: float
    """What they had together in the model's own distribution."""


@dataclass(frozen=True)
class Step:
    """One turn of the loop: a token chosen."""

    id: int
    piece: str
    probability: float
    sampled: float
    options: tuple[Option, ...] = ()
    ends: bool = False
    """Whether it ends the text."""
    completes: str = ""
    """The character whose last byte it brings."""


@dataclass(frozen=True)
class Run:
    """The prompt's way through the model under one set of adapters."""

    name: str
    """"base", or the adapters' names."""
    stacks: tuple[StackRun, ...]
    filters: tuple[Filter, ...] = ()
    steps: tuple[Step, ...] = ()
    """The first is the choice after the prompt."""
    entropy: float = 0.0
    """Of the next token's distribution, in nats."""
    distribution: Distribution = Distribution()
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of a model with a classification head: label → probability, or "value"."""
    logits: Mapping[str, float] = field(default_factory=dict)
    """What the head gives before they become probabilities, by label."""
    gap: int = -1
    """Of a model that fills gaps, the token whose place is told of: the first gap, else the last word; else -1."""
    pooling: str = ""
    """How a model without a next token makes one vector of its tokens: "cls", "mean", "last", "max"."""
    vector: tuple[float, ...] = ()
    """That vector, of a model that ends in it."""
    is_normalized: bool = False
    """Whether it was brought to length 1."""
    effects: tuple[float, ...] = ()
    """For every token: by how much its presence raises the likeliest label's probability, or the value."""


@dataclass(frozen=True)
class Explanation:
    """Everything there is to show."""

    anatomy: Anatomy
    engine: Literal["llama.cpp", "torch"]
    prompt: str
    rendered: str
    """The prompt as the model reads it: inside the chat template, or as it is."""
    sampling: Mapping[str, Any]
    runs: tuple[Run, ...]
    """One, or the base's and the adapted model's."""
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON-ready values, without the attention maps; bytes that are no text as "<0xE2>"."""
        values: dict[str, Any] = _plain(self)
        return values

    def attention_maps(self) -> dict[str, Any]:
        """All attention, float16, by place in `record`: "runs.0.stacks.1.attention"; empty where it is not told."""
        return {
            f"runs.{number}.stacks.{place}.{name}": maps
            for number, run in enumerate(self.runs)
            for place, stack in enumerate(run.stacks)
            for name, maps in (("attention", stack.attention), ("cross_attention", stack.cross_attention))
            if maps is not None
        }


def is_in_json(one: Field[Any]) -> bool:
    """Whether `record` has the field of a value of this module."""
    return bool(one.metadata.get("json", True))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if is_in_json(one)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        return named(value)
    return str(value) if isinstance(value, Path) else value
