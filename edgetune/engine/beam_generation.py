"""A reply found by beam search: its text is there at the end, at once, since until then another beam may win.

The search is `beam`'s and the evaluation the engine's; this stands between them and is a `protocol.Generation`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.beam import BeamSearch, BeamSettings
from edgetune.engine.protocol import FinishReason, Timings, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.engine.stepping import Stepped
from edgetune.errors import UsageError


class BeamRunner(Protocol):
    """What a beam search needs of an engine."""

    tokenizer: Any

    def evaluate_beams(self, generations: Sequence[BeamGeneration]) -> None:
        """Give each its `logits`, after `tokens` that go on from what were its beams `parents`."""

    def log_probs(self, generation: BeamGeneration, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Log-probabilities of its `logits`, under what the model's own settings demand of each of `texts`."""

    def release(self, slot: Any) -> None:
        """The search has ended; what it took is freed."""


class BeamGeneration(Stepped):
    """See `protocol.Generation`."""

    def __init__(
        self,
        engine: BeamRunner,
        source: Sequence[int],
        settings: BeamSettings,
        *,
        slot: Any,
        max_new: int,
        stop: Sequence[str] = (),
    ) -> None:
        """Nothing is evaluated before the iteration; `max_new` tokens at most. `slot` is the engine's."""
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.context_full = False
        self.seed = 0
        self.choices: list[TokenChoice] = []
        self.score = float("-inf")
        """The text's score: its log-probability under the length penalty."""
        self.source, self.num_beams, self.max_new = list(source), settings.num_beams, max_new
        self.slot = slot
        """Where the engine keeps it; None after the end."""
        self.parents: list[int] = []
        """Of each beam, which one it was before; none at the first evaluation."""
        self.tokens: list[int] = []
        """Of each beam, the token that has to be evaluated."""
        self.logits: NDArray[np.float32] | None = None
        """What came of it: (beams, vocabulary), or the one row that all of them begin with."""
        """Whether it has to be evaluated before the next step."""
        self._engine, self._settings = engine, settings
        self._stop = [text for text in stop if text]
        self._is_cancelled = self._is_cut = False
        self._started = time.perf_counter()
        self._evaluated = self._first = self._last = self._started
        self._steps = self._run()

    def _evaluate_alone(self) -> None:
        self._engine.evaluate_beams([self])

    @property
    def source_tokens(self) -> int:
        """How many tokens the source has."""
        return len(self.source)

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""
        return not self._is_cut

    @property
    def timings(self) -> Timings:
        """What it cost so far."""
        return Timings(
            prompt_tokens=len(self.source),
            reused_tokens=0,
            prompt_seconds=self._evaluated - self._started,
            generated_tokens=len(self.ids),
            generated_seconds=self._last - self._first,
            first_token_seconds=self._first - self._started,
        )

    def close(self) -> None:
        """Stop here."""
        self._steps.close()
        self.is_waiting = False
        self.finish_reason = self.finish_reason or "interrupted"
        self._free()

    def cancel(self) -> None:
        """Let the iteration end by itself; for any thread."""
        self._is_cancelled = True

    def change_sampling(self, sampling: Sampling) -> None:
        """A beam search does not sample. Raises `UsageError`."""
        raise UsageError("A beam search follows the likeliest texts; it has no sampling to change.")

    def change_adapters(self) -> None:
        """What was found under one set of adapters is no beginning under another. Raises `UsageError`."""
        raise UsageError("A beam search ends under the adapters it began with.")

    def _run(self) -> Generator[str | None, None, None]:
        try:
            yield from self._search()
        finally:
            self._free()

    def _search(self) -> Iterator[str | None]:
        engine, eog_ids = self._engine, self._engine.tokenizer.eog_ids
        self._started = time.perf_counter()
        search = BeamSearch(self._settings, end_ids=eog_ids, max_new=self.max_new)
        if not search.is_done:
            yield None
            self._evaluated = self._first = time.perf_counter()
        while not search.is_done and not self._is_cancelled:
            log_probs = engine.log_probs(self, search.running)
            if len(log_probs) < self.num_beams:
                log_probs = np.repeat(log_probs, self.num_beams, axis=0)
            self.parents, self.tokens = search.step(log_probs)
            self._last = time.perf_counter()
            if not search.is_done:
                yield None
        best = search.best
        self.score = best.score
        self.ids = [token for token in best.ids if token not in eog_ids]
        self.finish_reason = "interrupted" if self._is_cancelled else "stop" if best.ended else "length"
        text = engine.tokenizer.decode(self.ids).decode(errors="replace")
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            text, self._is_cut, self.finish_reason = text[: min(ends)], True, "stop"
        self.text = text
        if text:
            yield text

    def _free(self) -> None:
        if self.slot is not None:
            self._engine.release(self.slot)
            self.slot = self.logits = None
