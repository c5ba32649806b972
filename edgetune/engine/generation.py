"""One running reply: tokens become text as they come, until a stop token, a stop string, a limit or the user ends it.

Text is never cut inside a character, and what may be the beginning of a stop string is held back until it is known not
to be one.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from edgetune.engine.protocol import FinishReason, Timings

if TYPE_CHECKING:
    from edgetune.engine.llama import LlamaEngine
    from edgetune.engine.sampler import Sampler


class LlamaGeneration:
    """See `protocol.Generation`."""

    def __init__(
        self, engine: LlamaEngine, sampler: Sampler, prompt: list[int], *, max_tokens: int, stop: Sequence[str]
    ) -> None:
        """Nothing is evaluated before the first step of the iteration."""
        self.text = ""
        """What was said so far; stop strings are not part of it."""
        self.ids: list[int] = []
        """The tokens sampled so far, the one that ended it not included."""
        self.finish_reason: FinishReason | None = None
        """None while it runs."""
        self.context_full = False
        """Whether it ended because the context took no further token."""
        self.seed = sampler.seed
        """The seed in use, also when a random one was asked for."""
        self.reused_tokens = 0
        """How many tokens of the prompt the KV cache held already."""
        self._engine, self._sampler, self._prompt = engine, sampler, prompt
        self._max_tokens, self._stop = max_tokens, _StopStrings(stop)
        self._strip_space = engine.tokenizer.swallows_space_after(prompt[-1])
        self._started = time.perf_counter()
        self._evaluated = self._first = self._last = self._started
        self._steps = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._steps)

    def close(self) -> None:
        """Stop here, as by the user; what was said so far stays."""
        self._steps.close()
        self._sampler.close()
        self._finish("interrupted")

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""
        return not self._stop.found

    @property
    def timings(self) -> Timings:
        """What it cost so far."""
        return Timings(
            prompt_tokens=len(self._prompt),
            reused_tokens=self.reused_tokens,
            prompt_seconds=self._evaluated - self._started,
            generated_tokens=len(self.ids),
            generated_seconds=self._last - self._first,
            first_token_seconds=self._first - self._started,
        )

    def _run(self) -> Generator[str, None, None]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for raw in self._pieces():
                if text := self._stop.feed(decoder.decode(raw)):
                    self.text += text
                    yield text
                if self._stop.found:
                    self._finish("stop")
                    return
            if text := self._stop.feed(decoder.decode(b"", True)) + self._stop.rest():
                self.text += text
                yield text
        except BaseException:
            # What was held back was said; nothing can be yielded any more.
            self.text += self._stop.rest()
            self._finish("interrupted")
            raise
        finally:
            self._sampler.close()

    def _pieces(self) -> Iterator[bytes]:
        engine, sampler, eog_ids = self._engine, self._sampler, self._engine.tokenizer.eog_ids
        piece, clock, ids = engine.tokenizer.piece, time.perf_counter, self.ids
        if self._max_tokens == 0:
            self._finish("length")
            return
        self.reused_tokens = engine.evaluate(self._prompt)
        self._evaluated = self._first = self._last = clock()
        strip_space = self._strip_space
        while True:
            token = engine.sample(sampler)
            self._last = clock()
            if not ids:
                self._first = self._last
            if token is None or token in eog_ids:
                self._finish("stop")
                return
            ids.append(token)
            yield piece(token).removeprefix(b" ") if strip_space else piece(token)
            strip_space = False
            if len(ids) == self._max_tokens or engine.is_full:
                self.context_full = engine.is_full
                self._finish("length")
                return
            engine.evaluate_next(token)

    def _finish(self, reason: FinishReason) -> None:
        if self.finish_reason is None:
            self.finish_reason = reason


class _StopStrings:
    """Passes text on but for what is, or may become, a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What can be shown after `text` was added."""
        if not self.stop:
            return text
        self.held += text
        ends = [self.held.find(stop) for stop in self.stop]
        if found := [end for end in ends if end >= 0]:
            shown, self.held, self.found = self.held[: min(found)], "", True
            return shown
        longest = max(map(len, self.stop)) - 1
        keep = next(
            (
                size
                for size in range(min(longest, len(self.held)), 0, -1)
                if any(stop.startswith(self.held[-size:]) for stop in self.stop)
            ),
            0,
        )
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self.held = self.held, ""
        return held
