"""What every engine offers to the conversation and the front ends; llama.cpp's is in `llama`.

Values only: no bindings are imported here, so that an engine on another runtime can stand behind the same seam.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgetune.engine.sampling import Sampling
from edgetune.template import ChatTemplate, Rendered

FinishReason = Literal["stop", "length", "interrupted"]
""""stop": the model or a stop string ended it; "length": a token limit or the context; "interrupted": the user."""


@dataclass(frozen=True)
class LoraSpec:
    """An adapter to apply."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    id: int
    text: str
    """What it stands for; bytes that are no UTF-8 by themselves show as U+FFFD. Control characters are as they are."""
    probability: float
    """In the model's own distribution, before any sampling parameter."""
    sampled: float
    """What the sampling parameters make of it: 0 when they cut it off, 1 when it is the only one left."""


@dataclass(frozen=True)
class TokenChoice:
    """A token of a reply, and what it was chosen from."""

    id: int
    start: int
    """Where its text begins in the reply, in characters."""
    end: int
    """Where it ends; equal to `start` for bytes that only become a character with the next token's."""
    probability: float
    sampled: float
    alternatives: Sequence[Candidate] = ()
    """The likeliest tokens at this place, best first; empty for a token that was given and not chosen."""


@dataclass(frozen=True)
class EngineMemory:
    """What a loaded model takes, in bytes."""

    weights: int
    context: int
    """The KV cache, allocated for the whole context."""
    per_token: int
    """Of the KV cache, for one token."""


@dataclass(frozen=True)
class Drafted:
    """What speculation did in a reply."""

    proposed: int = 0
    """Tokens guessed and evaluated together with one that was certain."""
    accepted: int = 0
    """Of those, the ones that the model chose as well."""


@dataclass(frozen=True)
class Timings:
    """What a generation cost. Seconds are wall-clock."""

    prompt_tokens: int
    """The prompt's length with what the reply was told to begin with, evaluated or reused."""
    reused_tokens: int
    """Of those, how many were still in the KV cache."""
    prompt_seconds: float
    generated_tokens: int
    generated_seconds: float
    """From the first sampled token to the last."""
    first_token_seconds: float
    """From the request to the first token."""

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens evaluated per second; 0 when nothing was."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second; 0 for fewer than two."""
        return (self.generated_tokens - 1) / self.generated_seconds if self.generated_seconds else 0.0


class Tokenizer(Protocol):
    """A vocabulary; see `tokenizer.GgufTokenizer`."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own; None when it has none."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`, no control token made from it; `add_special` adds BOS and EOS as the model wants."""

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Token ids of a rendered template: its own control tokens as such, the messages' text as text."""

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The text of `ids` in UTF-8, possibly cut inside a character; `special` spells control tokens out."""


class Generation(Protocol):
    """A running reply: iterate over it for text; the rest is complete when the iteration has ended."""

    text: str
    """What was said so far."""
    ids: list[int]
    """The tokens sampled so far, the one that ended it not included."""
    finish_reason: FinishReason | None
    """None while it runs."""
    context_full: bool
    """Whether it ended because the context took no further token."""
    seed: int
    """The seed in use, also when a random one was asked for."""
    choices: list[TokenChoice]
    """What each of `ids` was chosen from, when `top` asked for it."""

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""

    @property
    def timings(self) -> Timings:
        """What it cost so far."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def close(self) -> None:
        """Stop here; what was said so far stays. For the thread that iterates."""

    def cancel(self) -> None:
        """Let the iteration end by itself, at the next token or in the middle of the prompt. For any thread."""

    def change_sampling(self, sampling: Sampling) -> None:
        """Choose by other parameters from the next token on. For any thread."""

    def change_adapters(self) -> None:
        """Go on under the adapters that the engine has now, from the next token on. For the thread that iterates."""


class Engine(Protocol):
    """Runs one model, with sets of adapters, on several sequences. One thread at a time may call it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary."""

    @property
    def context_size(self) -> int:
        """How many tokens prompt and reply may have together."""

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """Those that replies have unless they name their own, with scale 0 where one is switched off."""

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Apply these adapters, and no others, from the next evaluation on."""

    @property
    def cached_tokens(self) -> int:
        """How many tokens the sequence used last holds."""

    @property
    def memory(self) -> EngineMemory:
        """What the model takes, in bytes."""

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        prefix: Sequence[int] = (),
        top: int = 0,
        adapters: Sequence[LoraSpec] | None = None,
        shift: bool = False,
    ) -> Generation:
        """Continue the prompt `ids`; at most `max_tokens` new ones, -1 until the context is full.

        `prefix`: tokens that the reply begins with; they are not chosen, and do not count as new. `top`: how many
        alternatives each choice keeps. `adapters`: a set of its own for this reply. `shift`: tokens that left the
        middle of the prompt since the last time leave the cache as well, and what follows them is not evaluated again;
        an approximation, since it was computed in their presence.
        """

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies side by side: (which one, text). Each is what it would be alone."""

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""

    def save_state(self, path: Path) -> None:
        """Keep the KV cache of the sequence used last in a file. Raises `UsageError` when it is empty."""

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Take up a kept KV cache where it is the beginning of `ids`; returns how many tokens of it that are.

        0 when the file is damaged, or another model, adapters or cache types made it.
        """

    def close(self) -> None:
        """Free the model; every other call raises `UsageError` afterwards."""
