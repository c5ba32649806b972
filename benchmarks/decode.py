"""Single-stream decoding: edgetune's engine against llama-bench, on the same file, threads and number of tokens.

The two take turns in one run, so that a busy machine slows both. Prints one JSON object; the ratio is the median of the
rounds'.

    python -m benchmarks.decode [MODEL.gguf …] [--build-dir DIR] [--rounds 5] [--tokens 128] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampling import Sampling
from edgetune.hardware import physical_cores

QWEN_0_5B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


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
    models = options.models or default_models(options.build_dir)
    results = [measure(path, llama_bench, options) for path in models]
    print(json.dumps(results, indent=2))
    worst = min(result["ratio"] for result in results)
    print(f"slowest ratio {worst:.3f}", file=sys.stderr)


def measure(path: Path, llama_bench: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both, in turn; tokens per second."""
    ours, theirs = [], []
    sampled: list[float] = []
    with LlamaEngine.open(path, ctx_size=2048, threads=options.threads) as engine:
        decode_ours(engine, 16, Sampling(temp=0, ignore_eos=True))
        for number in range(options.rounds):
            theirs.append(decode_theirs(path, llama_bench, options))
            ours.append(decode_ours(engine, options.tokens, Sampling(temp=0, ignore_eos=True)))
            sampled.append(decode_ours(engine, options.tokens, Sampling(seed=number, ignore_eos=True)))
            print(
                f"{path.name}: {ours[-1]:.1f}, sampling {sampled[-1]:.1f}, llama-bench {theirs[-1]:.1f} t/s",
                file=sys.stderr,
            )
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "model": str(path),
        "threads": options.threads,
        "tokens": options.tokens,
        "edgetune_tokens_per_second": statistics.median(ours),
        "edgetune_sampling_tokens_per_second": statistics.median(sampled),
        "llama_bench_tokens_per_second": statistics.median(theirs),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "sampling_ratio": statistics.median(mine / other for mine, other in zip(sampled, theirs, strict=True)),
    }


def decode_ours(engine: LlamaEngine, tokens: int, sampling: Sampling) -> float:
    """Tokens per second from an empty context, text and all, as chat makes them."""
    engine.forget()
    start = engine.tokenizer.bos_id or engine.tokenizer.eos_id or 0
    generation = engine.generate([start], sampling, max_tokens=tokens)
    for _ in generation:
        pass
    assert len(generation.ids) == tokens
    return generation.timings.tokens_per_second


def decode_theirs(path: Path, llama_bench: Path, options: argparse.Namespace) -> float:
    """Tokens per second of `llama-bench -n TOKENS`, its default settings otherwise."""
    command = [llama_bench, "-m", path, "-p", "0", "-n", options.tokens, "-t", options.threads, "-r", "1", "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, check=True, text=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def default_models(build_dir: Path) -> list[Path]:
    """A random Q4_K_M of Qwen2.5-0.5B's shape, made once in `build_dir`, and the embedded model."""
    from edgetune.export import export_base
    from edgetune.library import embedded_model_dir

    random_path, pocket_path = build_dir / "qwen2.5-0.5b-shaped-Q4_K_M.gguf", build_dir / "pocket-F16.gguf"
    if not random_path.is_file():
        with tempfile.TemporaryDirectory(dir=build_dir) as scratch:
            export_base(write_random_qwen(Path(scratch) / "model"), random_path, quant="Q4_K_M")
    if not pocket_path.is_file():
        export_base(embedded_model_dir(), pocket_path, outtype="f16")
    return [random_path, pocket_path]


def write_random_qwen(directory: Path) -> Path:
    """A random checkpoint of Qwen2.5-0.5B's shape in bf16, with a small tokenizer padded to its vocabulary."""
    import torch
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**QWEN_0_5B, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
