"""How fast a model is here: prompt and generation speed at several depths, time to the first token, adapter switches.

Everything is measured on the path chat uses: the engine's own replies, sampling, text and KV cache included. Stands
beside chat, above the engine; opens no model, knows no terminal. The tests are named as llama-bench names them.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from edgetune.engine.protocol import Drafted, LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.events import Notice, Progress, Sink, ignore

if TYPE_CHECKING:
    from edgetune.engine.generation import LlamaGeneration
    from edgetune.engine.llama import LlamaEngine

Kind = Literal["pp", "tg"]
"""Evaluating a prompt, or generating."""

TURN = 32
"""Tokens of the message that is timed to its first reply token, behind a history of the depth's length."""
_GREEDY = Sampling(temp=0, ignore_eos=True)
_TEXT = """The harbour opens at six in the morning. Boats longer than twelve metres wait at the northern pier until the
pilot has answered; shorter ones may enter along the buoys. Anchors stay up in the channel. Whoever stays overnight pays
at the office beside the crane, where fresh water and the weather report are to be had as well. At low tide the inner
basin is closed, and the light on the tower turns from green to red."""
_BEGINNINGS = {"quoting": f"{_TEXT}\n\n{_TEXT[:120]}", "free": "It was a quiet morning in the town, and"}
"""Name → what is continued: a text that begins to repeat itself has what comes next in it, another one has not."""


@dataclass(frozen=True)
class BenchPlan:
    """What to measure."""

    prompt: int = 512
    """Prompt tokens evaluated in one test; 0: none."""
    generated: int = 128
    """Tokens generated in one test; 0: none."""
    depths: tuple[int, ...] = (0, 512, 2048)
    """Tokens in the context before a test begins."""
    repetitions: int = 3
    """How often each test is run."""

    def check(self) -> None:
        """Raise `UsageError` for a plan that measures nothing."""
        if not (self.prompt or self.generated):
            raise UsageError("Neither a prompt nor a generation is to be measured.", hint="Leave out -p 0 or -n 0.")
        if self.generated == 1:
            raise UsageError("One generated token has no speed.", hint="Take -n 2 or more.")


@dataclass(frozen=True)
class Speed:
    """One test: so many tokens behind a context of so many."""

    test: str
    """"pp" (prompt) or "tg" (generation) and the number of tokens, e.g. "tg128"."""
    depth: int
    tokens: int
    samples: tuple[float, ...]
    """Tokens per second, one a repetition."""
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """What else was timed at this depth: name → seconds, one a repetition."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is to be known of it."""

    @property
    def tokens_per_second(self) -> float:
        """The median: one disturbed repetition does not move it."""
        return statistics.median(self.samples)

    def record(self) -> dict[str, Any]:
        """As JSON-ready values; medians, and all samples of the speed."""
        return {
            "test": self.test,
            "depth": self.depth,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "stddev": statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0,
            "samples": list(self.samples),
            **{f"{name}_seconds": statistics.median(values) for name, values in self.seconds.items()},
            **self.facts,
        }


def measure(engine: LlamaEngine, plan: BenchPlan, *, sink: Sink = ignore) -> Iterator[Speed]:
    """Run `plan` on `engine`, which must not speculate; adapters of the engine are applied, and switched if there.

    Tests that the context does not take are left out with a notice; where that leaves none of a kind, one is made
    shorter.
    """
    plan.check()
    tests = _fitting(plan, engine.context_size, sink)
    bench = _Bench(engine, repetitions=plan.repetitions)
    bench.warm_up()
    for done, (depth, kind, tokens) in enumerate(tests):
        sink(Progress("measure", done, len(tests), "tests", f"{kind}{tokens} behind {depth} tokens"))
        yield bench.prompt(depth, tokens) if kind == "pp" else bench.generation(depth, tokens)
    sink(Progress("measure", len(tests), len(tests), "tests"))


@dataclass(frozen=True)
class Replies:
    """Greedy replies to one prompt."""

    ids: tuple[int, ...]
    """What was said; the same each time."""
    samples: tuple[float, ...]
    """Tokens per second, one a repetition; the prompt's evaluation is not in it."""
    drafted: Drafted

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self.samples)


def measure_replies(engine: LlamaEngine, *, tokens: int, repetitions: int) -> dict[str, Replies]:
    """Continuations that quote and that do not, of `tokens` tokens: what guessing ahead gains depends on it.

    Made on engines with and without speculation, they compare. A beginning that the context does not take is left out.
    """
    found = {}
    for name, beginning in _BEGINNINGS.items():
        ids = engine.tokenizer.encode(beginning)
        if len(ids) + tokens > engine.context_size:
            continue
        runs = []
        for _ in range(repetitions):
            engine.forget()
            runs.append(_run(engine, ids, tokens))
        samples = tuple(run.timings.tokens_per_second for run in runs)
        found[name] = Replies(tuple(runs[-1].ids), samples, runs[-1].drafted)
    return found


def peak_memory() -> int:
    """The most memory this process ever had in use, in bytes; mapped weights count as far as they were read."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Bench:
    """The tests on one engine."""

    def __init__(self, engine: LlamaEngine, *, repetitions: int) -> None:
        self._engine, self._repetitions = engine, repetitions
        self._random = random.Random(0)
        self._histories: dict[int, list[int]] = {}

    def warm_up(self) -> None:
        """Let the weights be read and the buffers be made."""
        self._engine.forget()
        _run(self._engine, self._text(min(TURN, self._engine.context_size - 2)), 2)

    def prompt(self, depth: int, tokens: int) -> Speed:
        """Speed of evaluating `tokens` tokens of a prompt behind `depth` that are known."""
        history, speeds = self._history(depth), []
        for _ in range(self._repetitions):
            self._hold(history)
            timings = _run(self._engine, [*history, *self._text(tokens)], 1).timings
            speeds.append((timings.prompt_tokens - timings.reused_tokens) / timings.prompt_seconds)
        return Speed(f"pp{tokens}", depth, tokens, tuple(speeds))

    def generation(self, depth: int, tokens: int) -> Speed:
        """Speed of a reply behind `depth` tokens; and how long its first token takes, and an adapter's switch."""
        history, speeds = self._history(depth) or self._text(1), []
        for _ in range(self._repetitions):
            self._hold(history)
            speeds.append(_run(self._engine, history, tokens).timings.tokens_per_second)
        speed = Speed(f"tg{tokens}", depth, tokens, tuple(speeds))
        if depth + TURN >= self._engine.context_size:
            return speed
        seconds = self._first_token(depth)
        facts: dict[str, Any] = {}
        if self._engine.adapters:
            switches, evaluated = self._switch(depth)
            seconds |= switches
            facts["adapter_switch_back_evaluated"] = evaluated
        return replace(speed, seconds=seconds, facts=facts)

    def _first_token(self, depth: int) -> dict[str, tuple[float, ...]]:
        """To the first reply token of a message: with nothing known, and with what stands before it known."""
        history, cold, warm = self._history(depth), [], []
        for _ in range(self._repetitions):
            self._engine.forget()
            cold.append(_run(self._engine, [*history, *self._text(TURN)], 1).timings.first_token_seconds)
            self._hold(history)
            warm.append(_run(self._engine, [*history, *self._text(TURN)], 1).timings.first_token_seconds)
        return {"first_token_cold": tuple(cold), "first_token_warm": tuple(warm)}

    def _switch(self, depth: int) -> tuple[dict[str, tuple[float, ...]], int]:
        """From another scale to the next token, there and back; and the tokens evaluated on the way back."""
        engine, adapters = self._engine, self._engine.adapters
        there, back, evaluated = [], [], 0
        text = self._text(depth + TURN)
        engine.forget()
        _run(engine, text, 1)
        try:
            for number in range(self._repetitions):
                # A scale that was never used: nothing that is known under another one may help.
                there.append(self._after_switch(_scaled(adapters, 0.5 + number / 1024), text)[0])
                seconds, tokens = self._after_switch(adapters, text)
                back.append(seconds)
                evaluated = max(evaluated, tokens)
        finally:
            engine.set_adapters(adapters)
        return {"adapter_switch": tuple(there), "adapter_switch_back": tuple(back)}, evaluated

    def _after_switch(self, adapters: Sequence[LoraSpec], text: Sequence[int]) -> tuple[float, int]:
        began = time.perf_counter()
        self._engine.set_adapters(adapters)
        timings = _run(self._engine, text, 1).timings
        return time.perf_counter() - began, timings.prompt_tokens - timings.reused_tokens

    def _hold(self, text: Sequence[int]) -> None:
        """Have the context hold `text` and nothing else."""
        if not text or list(self._engine.cached_ids[: len(text)]) != list(text):
            self._engine.forget()
        if text:
            _run(self._engine, text, 1)

    def _history(self, depth: int) -> list[int]:
        """The same for every test at this depth, so that it is evaluated once."""
        return self._histories.setdefault(depth, self._text(depth))

    def _text(self, tokens: int) -> list[int]:
        """Tokens that nobody wrote: speed does not depend on what is said."""
        return [self._random.randrange(self._engine.tokenizer.n_vocab) for _ in range(tokens)]


def _run(engine: LlamaEngine, ids: Sequence[int], tokens: int) -> LlamaGeneration:
    """A greedy reply of `tokens` tokens, run to its end as chat does."""
    generation = engine.generate(ids, _GREEDY, max_tokens=tokens)
    for _ in generation:
        pass
    return generation


def _scaled(adapters: Sequence[LoraSpec], factor: float) -> list[LoraSpec]:
    return [LoraSpec(adapter.path, adapter.scale * factor) for adapter in adapters]


def _fitting(plan: BenchPlan, context: int, sink: Sink) -> list[tuple[int, Kind, int]]:
    """(Depth, kind, tokens) of the tests that a context of so many tokens takes; none fits: shorter ones."""
    kinds: tuple[tuple[Kind, int], ...] = (("pp", plan.prompt), ("tg", plan.generated))
    wanted = [(depth, kind, tokens) for depth in dict.fromkeys(plan.depths) for kind, tokens in kinds if tokens]
    fitting = [test for test in wanted if test[0] + test[2] < context]
    if len(fitting) < len(wanted):
        left_out = ", ".join(
            f"{kind}{tokens} behind {depth}" for depth, kind, tokens in wanted if depth + tokens >= context
        )
        sink(Notice(f"The context takes {context} tokens, which is too few for {left_out}; -c sets it."))
    missing = {kind for _, kind, _ in wanted} - {kind for _, kind, _ in fitting}
    shorter = {kind: (0, kind, min(tokens, context - 2)) for _, kind, tokens in wanted if kind in missing}
    return [*shorter.values(), *fitting]
