"""What makes the chat instant: kept sessions, two settings side by side, guessing ahead, another adapter scale.

The peer is the engine without the feature, in the same run, taking turns: evaluating a session again, one reply alone,
decoding token by token, evaluating the context again. Prints JSON. Ratios are medians of the rounds'.

    python -m benchmarks.chat [resume sides draft scale …] [--build-dir DIR] [--rounds 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import llama_cpp
from benchmarks.models import QWEN_0_5B, random_adapter, random_qwen, reciting_qwen
from edgetune.bench import BenchPlan, measure
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.hardware import physical_cores

GREEDY = Sampling(temp=0, ignore_eos=True)


def main() -> None:
    """Run the benchmarks named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--build-dir", type=Path, default=llama_cpp.BUILD_DIR)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    results = {name: BENCHMARKS[name](options) for name in options.names or BENCHMARKS}
    print(json.dumps(results, indent=2))
    for name, result in results.items():
        ratios = {key: value for key, value in result.items() if key.endswith("ratio")}
        print(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in ratios.items())}", file=sys.stderr)


def resume(options: argparse.Namespace, tokens: int = 2000) -> dict[str, Any]:
    """First token of a session of `tokens` tokens: its state from a file, against evaluating it."""
    evaluated, resumed = [], []
    with _random_engine(options, ctx_size=4096) as engine, tempfile.TemporaryDirectory() as scratch:
        path, ids = Path(scratch) / "session.kv", _random_text(tokens)
        for _ in range(options.rounds):
            engine.forget()
            evaluated.append(_reply(engine, ids, 1).timings.first_token_seconds)
            engine.save_state(path)
            engine.forget()
            began = time.perf_counter()
            assert engine.load_state(path, ids) == tokens
            reply = _reply(engine, ids, 1)
            resumed.append(time.perf_counter() - began)
            assert reply.timings.reused_tokens == tokens - 1
        size = path.stat().st_size
    return {
        "evaluated_seconds": statistics.median(evaluated),
        "resumed_seconds": statistics.median(resumed),
        "state_bytes": size,
        "ratio": _ratio(resumed, evaluated),
    }


def sides(options: argparse.Namespace, tokens: int = 96) -> dict[str, Any]:
    """The same prompt with the base and with an adapter, side by side, against one of the replies alone.

    With the model that is sure of what it says: of a random one, rounding decides what the likeliest token is.
    """
    alone, together, firsts = [], [], []
    with LlamaEngine.open(reciting_qwen(options.build_dir), ctx_size=2048, threads=options.threads) as engine:
        settings: list[list[LoraSpec]] = [[], [LoraSpec(random_adapter(options.build_dir), 0.05)]]
        # From here on, what is said are tokens that stand for characters.
        prompt = [*_random_text(199), 60]
        _reply(engine, prompt, 2, adapters=settings[1])
        before = psutil.Process().memory_info().rss
        for _ in range(options.rounds):
            solo = []
            for adapters in settings:
                engine.forget()
                began = time.perf_counter()
                solo.append(_reply(engine, prompt, tokens, adapters=adapters))
                alone.append(time.perf_counter() - began)
            engine.forget()
            began = time.perf_counter()
            pair = [engine.generate(prompt, GREEDY, max_tokens=tokens, adapters=adapters) for adapters in settings]
            first: dict[int, float] = {}
            for which, _ in engine.run_together(pair):
                first.setdefault(which, time.perf_counter() - began)
            together.append(time.perf_counter() - began)
            firsts.append(max(first.values()))
            assert [one.ids for one in pair] == [one.ids for one in solo]
        grown = psutil.Process().memory_info().rss - before
        weights = engine.memory.weights
    means = [statistics.mean(pair) for pair in zip(alone[::2], alone[1::2], strict=True)]
    return {
        "alone_seconds": {"base": statistics.median(alone[::2]), "adapter": statistics.median(alone[1::2])},
        "together_seconds": statistics.median(together),
        "both_started_after_seconds": statistics.median(firsts),
        "memory_grown_bytes": grown,
        "weights_bytes": weights,
        "ratio": _ratio(together, means),
    }


def draft(options: argparse.Namespace, tokens: int = 128) -> dict[str, Any]:
    """Greedy decoding with `draft="ngram"` against without, and the same tokens.

    The model recites a sequence. "edit": the prompt has the sequence with every 40th token another one, which the reply
    puts right. "nothing": the prompt has nothing of it. "misleading": it has every three tokens of it, and then others.
    """
    start = 1000
    said = list(range(start, start + tokens + 32))
    others = random.Random(1)
    texts = {
        "edit": [token if at % 40 else others.randrange(90000, 150000) for at, token in enumerate(said, 20)],
        "nothing": [others.randrange(90000, 150000) for _ in said],
        "misleading": [
            token
            for at in range(0, len(said) - 3, 2)
            for token in (*said[at : at + 3], others.randrange(90000, 150000))
        ],
    }
    path = reciting_qwen(options.build_dir)
    settings: dict[str, Any] = {"ctx_size": 2048, "threads": options.threads}
    result: dict[str, Any] = {}
    with LlamaEngine.open(path, **settings) as plain, LlamaEngine.open(path, **settings, draft="ngram") as guessing:
        for name, text in texts.items():
            ids = [*text, start]
            rates: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.rounds):
                replies = []
                for engine, into in zip((plain, guessing), rates, strict=True):
                    engine.forget()
                    replies.append(_reply(engine, ids, tokens))
                    into.append(replies[-1].timings.tokens_per_second)
                assert replies[0].ids == replies[1].ids == said[1 : tokens + 1]
            drafted = replies[1].drafted
            result[name] = {
                "plain_tokens_per_second": statistics.median(rates[0]),
                "tokens_per_second": statistics.median(rates[1]),
                "guessed": drafted.proposed,
                "guessed_right": drafted.accepted,
            }
            result[f"{name}_ratio"] = _ratio(rates[1], rates[0])
        result["step_costs"] = {count: guessing.costs.ratio(count) for count in (2, 4, 8, 16)}
    return result


def scale(options: argparse.Namespace, depth: int = 480) -> dict[str, Any]:
    """Another adapter scale to the next token, against evaluating the context; and the old scale again."""
    lora = [LoraSpec(random_adapter(options.build_dir), 0.05)]
    with _random_engine(options, ctx_size=2048, lora=lora) as engine:
        plan = BenchPlan(prompt=0, generated=2, depths=(depth,), repetitions=options.rounds)
        (speed,) = measure(engine, plan)
    times = speed.seconds
    return {
        "evaluate_seconds": statistics.median(times["first_token_cold"]),
        "switch_seconds": statistics.median(times["adapter_switch"]),
        "switch_back_seconds": statistics.median(times["adapter_switch_back"]),
        "switch_back_evaluated_tokens": speed.facts["adapter_switch_back_evaluated"],
        "ratio": _ratio(times["adapter_switch"], times["first_token_cold"]),
        "back_ratio": _ratio(times["adapter_switch_back"], times["first_token_cold"]),
    }


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "resume": resume,
    "sides": sides,
    "draft": draft,
    "scale": scale,
}


def _random_engine(options: argparse.Namespace, **settings: Any) -> LlamaEngine:
    return LlamaEngine.open(random_qwen(options.build_dir), threads=options.threads, **settings)


def _random_text(tokens: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randrange(QWEN_0_5B["vocab_size"]) for _ in range(tokens)]


def _reply(engine: LlamaEngine, ids: Sequence[int], tokens: int, **settings: Any) -> Any:
    generation = engine.generate(ids, GREEDY, max_tokens=tokens, **settings)
    for _ in generation:
        pass
    return generation


def _ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, others, strict=True))


if __name__ == "__main__":
    main()
