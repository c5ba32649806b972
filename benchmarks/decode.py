"""Single-stream decoding: edgetune's engine against llama-bench, on the same file, threads and number of tokens.

Ours is measured plain, sampling, and with what the token view shows (each token's alternatives). All take turns in one
run, so that a busy machine slows each of them. Prints JSON; a ratio is the median of the rounds'.

    python -m benchmarks.decode [MODEL.gguf …] [--build-dir DIR] [--rounds 5] [--tokens 128] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp
from benchmarks.models import pocket, random_qwen
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampling import Sampling
from edgetune.hardware import physical_cores

GREEDY = Sampling(temp=0, ignore_eos=True)
TOP = 20
"""Alternatives that each choice keeps where the tokens are looked at."""


def main() -> None:
    """Measure every model given, or a random one of Qwen2.5-0.5B's shape and the embedded one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--build-dir", type=Path, default=llama_cpp.BUILD_DIR)
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench that is built already")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args()
    llama_bench = options.llama_bench or llama_cpp.llama_bench(options.build_dir)
    models = options.models or [random_qwen(options.build_dir), pocket(options.build_dir)]
    results = [measure(path, llama_bench, options) for path in models]
    print(json.dumps(results, indent=2))
    for name in ("plain", "view"):
        print(f"slowest ratio, {name}: {min(result['ratio'][name] for result in results):.3f}", file=sys.stderr)


def measure(path: Path, llama_bench: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both, in turn; tokens per second."""
    rates: dict[str, list[float]] = {"llama_bench": [], "plain": [], "sampling": [], "view": [], "sampling_view": []}
    with LlamaEngine.open(path, ctx_size=2048, threads=options.threads) as engine:
        decode_ours(engine, 16, GREEDY)
        for number in range(options.rounds):
            sampling = Sampling(seed=number, ignore_eos=True)
            rates["llama_bench"].append(decode_theirs(path, llama_bench, options))
            rates["plain"].append(decode_ours(engine, options.tokens, GREEDY))
            rates["sampling"].append(decode_ours(engine, options.tokens, sampling))
            rates["view"].append(decode_ours(engine, options.tokens, GREEDY, top=TOP))
            rates["sampling_view"].append(decode_ours(engine, options.tokens, sampling, top=TOP))
            newest = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
            print(f"{path.name}: {newest} t/s", file=sys.stderr)
    theirs = rates.pop("llama_bench")
    return {
        "model": str(path),
        "threads": options.threads,
        "tokens": options.tokens,
        "llama_bench_tokens_per_second": statistics.median(theirs),
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {
            name: statistics.median(mine / other for mine, other in zip(values, theirs, strict=True))
            for name, values in rates.items()
        },
    }


def decode_ours(engine: LlamaEngine, tokens: int, sampling: Sampling, *, top: int = 0) -> float:
    """Tokens per second from an empty context, text and all, as chat makes them."""
    engine.forget()
    start = engine.tokenizer.bos_id or engine.tokenizer.eos_id or 0
    generation = engine.generate([start], sampling, max_tokens=tokens, top=top)
    for _ in generation:
        pass
    assert len(generation.ids) == tokens
    return generation.timings.tokens_per_second


def decode_theirs(path: Path, llama_bench: Path, options: argparse.Namespace) -> float:
    """Tokens per second of `llama-bench -n TOKENS`, its default settings otherwise."""
    command = [llama_bench, "-m", path, "-p", "0", "-n", options.tokens, "-t", options.threads, "-r", "1", "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, check=True, text=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


if __name__ == "__main__":
    main()
