"""A reply found by beam search: its text is there at the end, at once, since until then another beam may win.

The search is `beam`'s and the evaluation the engine's; this stands between them and is a `protocol.Generation`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.beam import BeamSearch, BeamSettings
from edgetune.engine.protocol import FinishReason, Timings, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError


class BeamRunner(Protocol):
    """What a beam search needs of an engine."""

    tokenizer: Any

    def begin_beams(self, source: Sequence[int], beams: int, adapters: Any) -> NDArray[np.float32]:
        """Logits of the first token after `source`, (1, vocabulary)."""

    def advance_beams(self, parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Let beam i continue what was beam `parents[i]` with `tokens[i]`; logits of the next, (beams, vocabulary)."""

    def log_probs(self, logits: NDArray[np.float32], texts: Sequence[Sequence[int]], *, max_new: int) -> Any:
        """Log-probabilities under what the model's own settings demand of each of `texts`."""


class BeamGeneration:
    """See `protocol.Generation`."""

    def __init__(
        self,
        engine: BeamRunner,
        source: Sequence[int],
        settings: BeamSettings,
        *,
        adapters: Any,
        max_new: int,
        stop: Sequence[str] = (),
    ) -> None:
        """Nothing is evaluated before the iteration; `max_new` tokens at most."""
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.context_full = False
        self.seed = 0
        self.choices: list[TokenChoice] = []
        self.score = float("-inf")
        """The text's score: its log-probability under the length penalty."""
        self._engine, self._source, self._settings = engine, list(source), settings
        self._adapters, self._max_new = adapters, max_new
        self._stop = [text for text in stop if text]
        self._is_cancelled = self._is_cut = False
        self._started = time.perf_counter()
        self._evaluated = self._first = self._last = self._started
        self._steps = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._steps)

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""
        return not self._is_cut

    @property
    def timings(self) -> Timings:
        """What it cost so far."""
        return Timings(
            prompt_tokens=len(self._source),
            reused_tokens=0,
            prompt_seconds=self._evaluated - self._started,
            generated_tokens=len(self.ids),
            generated_seconds=self._last - self._first,
            first_token_seconds=self._first - self._started,
        )

    def close(self) -> None:
        """Stop here."""
        self._steps.close()  # type: ignore[attr-defined]
        self.finish_reason = self.finish_reason or "interrupted"

    def cancel(self) -> None:
        """Let the iteration end by itself; for any thread."""
        self._is_cancelled = True

    def change_sampling(self, sampling: Sampling) -> None:
        """A beam search does not sample. Raises `UsageError`."""
        raise UsageError("A beam search follows the likeliest texts; it has no sampling to change.")

    def _run(self) -> Iterator[str]:
        engine, eog_ids = self._engine, self._engine.tokenizer.eog_ids
        search = BeamSearch(self._settings, end_ids=eog_ids, max_new=self._max_new)
        if not search.is_done:
            first = engine.begin_beams(self._source, self._settings.num_beams, self._adapters)
            logits = np.repeat(first, self._settings.num_beams, axis=0)
            self._evaluated = self._first = time.perf_counter()
        while not search.is_done and not self._is_cancelled:
            parents, tokens = search.step(engine.log_probs(logits, search.running, max_new=self._max_new))
            self._last = time.perf_counter()
            if not search.is_done:
                logits = engine.advance_beams(parents, tokens)
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
