"""One running reply: tokens become text as they come, until a stop token, a stop string, a limit or the user ends it.

Text is never cut inside a character, and what may be the beginning of a stop string is held back until it is known not
to be one. A reply does not evaluate anything itself: where it needs the model it says so and waits, so that one loop
can drive a single reply, several in turn, or several in one batch.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgetune.engine.choices import as_choice
from edgetune.engine.native import AdapterKey
from edgetune.engine.protocol import Drafted, FinishReason, Timings, TokenChoice
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.speculation import Speculation
from edgetune.engine.stepping import Stepped

if TYPE_CHECKING:
    from edgetune.engine.cache import Slot
    from edgetune.engine.llama import LlamaEngine


class LlamaGeneration(Stepped):
    """See `protocol.Generation`."""

    def __init__(
        self,
        engine: LlamaEngine,
        sampler: Sampler,
        prompt: list[int],
        *,
        adapters: AdapterKey,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        prefix: Sequence[int] = (),
        top: int = 0,
        shift: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        """Nothing is evaluated before the first step of the iteration."""
        self.text = ""
        """What was said so far; stop strings are not part of it."""
        self.ids: list[int] = []
        """The tokens of the reply so far, the one that ended it not included."""
        self.choices: list[TokenChoice] = []
        """What each of `ids` was chosen from, when `top` asked for it."""
        self.finish_reason: FinishReason | None = None
        """None while it runs."""
        self.context_full = False
        """Whether it ended because the context took no further token."""
        self.seed = sampler.seed
        """The seed in use, also when a random one was asked for."""
        self.reused_tokens = 0
        """How many tokens of the prompt the KV cache held already."""
        self.adapters, self.shift = adapters, shift
        self.pending: list[int] = [*prompt, *prefix]
        """What has to be evaluated before the next token can be chosen."""
        self.row = 0
        """Where the outputs for `pending` begin in the last evaluation."""
        self.slot: Slot | None = None
        """The sequence it runs on; none before the first evaluation and after the end."""
        """Whether `pending` has to be evaluated before the next step."""
        self.is_cancelled = False
        self._engine, self._sampler = engine, sampler
        self._prompt, self._prefix = prompt, list(prefix)
        self._max_tokens, self._stop, self._top = max_tokens, _StopStrings(stop), top
        self._next_sampling: Sampling | None = None
        self._next_adapters: AdapterKey | None = None
        self._seen: Seen | None = None
        self._speculation, self._guesses = speculation, list[int]()
        self._history = [*prompt, *prefix]
        self._spell = engine.tokenizer.speller(after=prompt[-1])
        self._started = time.perf_counter()
        self._evaluated = self._first = self._last = self._started
        self._steps = self._run()

    def _evaluate_alone(self) -> None:
        self._engine.evaluate([self])

    def close(self) -> None:
        """Stop here, as by the user; what was said so far stays."""
        self._steps.close()
        self.is_waiting = False
        self._finish("interrupted")
        self._free()

    def cancel(self) -> None:
        """Let the iteration end by itself; for any thread."""
        self.is_cancelled = True

    def change_sampling(self, sampling: Sampling) -> None:
        """Choose by other parameters from the next token on; for any thread."""
        self._next_sampling = sampling

    def change_adapters(self) -> None:
        """Go on under the adapters that the engine has now, from the next token on.

        What was said stays; it is evaluated again under them, but for what the cache holds of it.
        """
        self._next_adapters = self._engine.adapter_key

    @property
    def source_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self._prompt)

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all that was said with `ids`: no stop string cut it."""
        return not self._stop.found

    @property
    def drafted(self) -> Drafted:
        """What speculation did."""
        return self._speculation.drafted if self._speculation else Drafted()

    @property
    def timings(self) -> Timings:
        """What it cost so far."""
        return Timings(
            prompt_tokens=len(self._prompt) + len(self._prefix),
            reused_tokens=self.reused_tokens,
            prompt_seconds=self._evaluated - self._started,
            generated_tokens=self._new_tokens,
            generated_seconds=self._last - self._first,
            first_token_seconds=self._first - self._started,
        )

    def _run(self) -> Generator[str | None, None, None]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        length = 0
        # It may have waited for others.
        self._started = time.perf_counter()
        try:
            for raw in self._pieces():
                if raw is None:
                    yield None
                    continue
                decoded = decoder.decode(raw)
                end = length + len(decoded)
                if self._top:
                    piece = self._engine.tokenizer.piece
                    self.choices.append(as_choice(self.ids[-1], self._seen, piece, start=length, end=end))
                length = end
                if text := self._stop.feed(decoded):
                    self.text += text
                    yield text
                if self._stop.found:
                    self._finish("stop")
                    return
            if (cut := decoder.decode(b"", True)) and self._top:
                self.choices[-1] = replace(self.choices[-1], end=length + len(cut))
            if text := self._stop.feed(cut) + self._stop.rest():
                self.text += text
                yield text
        except BaseException:
            # What was held back was said; nothing can be yielded any more.
            self.text += self._stop.rest()
            self._finish("interrupted")
            raise
        finally:
            self._free()

    @property
    def _new_tokens(self) -> int:
        return max(0, len(self.ids) - len(self._prefix))

    def _pieces(self) -> Iterator[bytes | None]:
        """The bytes of each token of the reply; None where `pending` has to be evaluated."""
        if self._max_tokens == 0:
            self._finish("length")
            return
        yield None
        self._evaluated = self._first = self._last = time.perf_counter()
        for token in self._prefix:
            if token in self._engine.tokenizer.eog_ids:
                self._finish("stop")
                return
            yield self._say(token, None)
        while True:
            # A row of logits for the token that was certain, and one more for each guess that turns out right.
            for right in range(len(self._guesses) + 1):
                choice = self._choose(self.row + right)
                if choice is None:
                    return
                token, seen = choice
                yield self._say(token, seen)
                if self._is_at_limit(unsure=len(self._guesses) - right):
                    return
                if token not in self._guesses[right : right + 1] or self._next_adapters is not None:
                    break
            self._prepare(token, right)
            yield None

    def _choose(self, row: int) -> tuple[int, Seen | None] | None:
        """The next token; None when there is none."""
        if self.is_cancelled:
            self._finish("interrupted")
            return None
        if self._next_sampling is not None:
            # Taken out first: another change may come in meanwhile, and has to count.
            sampling, self._next_sampling = self._next_sampling, None
            self._sampler.close()
            self._sampler = self._engine.build_sampler(sampling, self._history)
        token, seen = self._engine.choose(self._sampler, row, self._top)
        self._last = time.perf_counter()
        if not self._new_tokens:
            self._first = self._last
        if token is None or token in self._engine.tokenizer.eog_ids:
            self._finish("stop")
            return None
        return token, seen

    def _say(self, token: int, seen: Seen | None) -> bytes:
        self.ids.append(token)
        self._seen = seen
        if self._new_tokens:
            self._history.append(token)
        return self._spell(token)

    def _is_at_limit(self, *, unsure: int) -> bool:
        full = self._engine.is_full(unsure=unsure)
        if full or self._new_tokens == self._max_tokens:
            self.context_full = full
            self._finish("length")
            return True
        return False

    def _prepare(self, token: int, right: int) -> None:
        """Have the chosen `token` evaluated, and what may follow it; drop the entries of guesses that were wrong."""
        assert self.slot is not None
        if wrong := len(self._guesses) - right:
            self._engine.drop_last(self.slot, wrong)
        self._guesses = []
        if self._speculation:
            self._speculation.settle(token, right)
            limit = self._engine.guess_limit()
            if self._max_tokens > 0:
                limit = min(limit, self._max_tokens - self._new_tokens - 1)
            self._guesses = self._speculation.guess(self._history, limit)
        self.pending = [token, *self._guesses]
        if self._next_adapters is not None:
            self._change_adapters(self._next_adapters)

    def _change_adapters(self, wanted: AdapterKey) -> None:
        """Leave the sequence, whose entries were made under other adapters, and have everything evaluated."""
        self._next_adapters = None
        if wanted == self.adapters or self.slot is None:
            return
        self._engine.release(self.slot)
        self.adapters, self.slot = wanted, None
        self.pending, self._guesses = list(self._history), []

    def _free(self) -> None:
        self._sampler.close()
        if self.slot is not None:
            self._engine.release(self.slot)
            self.slot = None

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
