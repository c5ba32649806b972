"""What every engine offers to the conversation and the front ends; llama.cpp's is in `llama`.

Values only: no bindings are imported here, so that an engine on another runtime can stand behind the same seam.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class Timings:
    """What a generation cost. Seconds are wall-clock."""

    prompt_tokens: int
    """The prompt's length, evaluated or reused."""
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
    def chat_template(self) -> ChatTemplate | None: ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...

    def encode_rendered(self, rendered: Rendered) -> list[int]: ...


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

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""

    @property
    def timings(self) -> Timings: ...

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def close(self) -> None:
        """Stop here; what was said so far stays."""


class Engine(Protocol):
    """Runs one model with a set of adapters on one sequence."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_size(self) -> int:
        """How many tokens prompt and reply may have together."""

    @property
    def adapters(self) -> tuple[LoraSpec, ...]: ...

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Apply these adapters, and no others, from the next evaluation on."""

    def generate(
        self, ids: Sequence[int], sampling: Sampling, *, max_tokens: int = -1, stop: Sequence[str] = ()
    ) -> Generation:
        """Continue the prompt `ids`; at most `max_tokens` new ones, -1 until the context is full."""

    def close(self) -> None: ...
