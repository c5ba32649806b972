"""Converts a checkpoint of Qwen2.5-0.5B's shape to GGUF, against llama.cpp's own converter in the same run.

    python -m benchmarks.convert [--llama-cpp DIR] [--tokenizer DIR] [--work DIR] [--runs N]

Prints, as ratios to the peer, the time and the peak memory of → f16, and the time of → Q4_K_M against converter plus
quantizer. Each run is a process of its own: interpreter start and imports count, for both. The weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks import llama_cpp

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QUANTIZER = """
import sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings))
"""
REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY.parent / "shared" / "data" / "tokenizers" / "qwen2.5"


def main() -> None:
    """Measure and print; see the module's own words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="a llama.cpp source tree; downloaded by default")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a directory with Qwen2.5's tokenizer.json")
    parser.add_argument("--work", type=Path, help="where the checkpoint and the outputs go")
    parser.add_argument("--runs", type=int, default=1, help="the best of so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        peer = options.llama_cpp or llama_cpp.source_tree()
        print(json.dumps(measure(Path(scratch), peer, options.tokenizer, runs=options.runs), indent=2))


def measure(work_dir: Path, peer_dir: Path, tokenizer_dir: Path, *, runs: int) -> dict[str, float]:
    """Times in seconds, memory in MiB, and the ratios of ours to the peer's."""
    # In a process of its own: what the parent once held would count as its children's peak.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        model_dir = pool.submit(write_model, work_dir / "model", tokenizer_dir).result()
    ours, peer, quantized = (work_dir / f"{name}.gguf" for name in ("ours", "peer", "quantized"))
    edgetune = [sys.executable, "-m", "edgetune", "convert", str(model_dir), "--no-verify"]
    converter = [sys.executable, str(peer_dir / "convert_hf_to_gguf.py"), str(model_dir), "--outtype", "f16"]
    quantizer = [sys.executable, "-c", QUANTIZER, str(peer), str(quantized)]
    f16 = best(runs, [*edgetune, "--outtype", "f16", "-o", str(ours)])
    peer_f16 = best(runs, [*converter, "--outfile", str(peer)])
    peer_quantize = best(runs, quantizer)
    q4 = best(runs, [*edgetune, "-q", "Q4_K_M", "-o", str(quantized)])
    return {
        "f16_seconds": f16[0],
        "f16_peak_mib": f16[1],
        "peer_f16_seconds": peer_f16[0],
        "peer_f16_peak_mib": peer_f16[1],
        "q4_k_m_seconds": q4[0],
        "peer_q4_k_m_seconds": peer_f16[0] + peer_quantize[0],
        "f16_time_ratio": f16[0] / peer_f16[0],
        "f16_memory_ratio": f16[1] / peer_f16[1],
        "q4_k_m_time_ratio": q4[0] / (peer_f16[0] + peer_quantize[0]),
    }


def best(runs: int, command: Sequence[str]) -> tuple[float, float]:
    """The shortest time (seconds) and the smallest peak memory (MiB) of `command` as a process of its own."""
    results = [run(command) for _ in range(runs)]
    return min(seconds for seconds, _ in results), min(memory for _, memory in results)


def run(command: Sequence[str]) -> tuple[float, float]:
    """Time (seconds) and peak memory (MiB) of one run of `command`."""
    os.sync()  # neither side waits for what was written before it
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    log = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.decode(errors='replace')[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 2**20


def write_model(model_dir: Path, tokenizer_dir: Path) -> Path:
    """A checkpoint of Qwen2.5-0.5B's shape with random bfloat16 weights."""
    model_dir.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_dir / name).write_bytes((tokenizer_dir / name).read_bytes())
    (model_dir / "config.json").write_text(json.dumps(CONFIG))
    shapes = dict(tensors())
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    packed = json.dumps(header).encode()
    noise = (np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    with (model_dir / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for shape in shapes.values():
            file.write(np.resize(noise.astype(np.uint16), int(np.prod(shape))).data)
    return model_dir


def tensors() -> Iterator[tuple[str, list[int]]]:
    """The checkpoint's tensors with their shapes."""
    hidden, inner, rows = 896, 4864, 128
    yield "model.embed_tokens.weight", [151936, hidden]
    yield "model.norm.weight", [hidden]
    for layer in range(24):
        here = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{here}.{norm}.weight", [hidden]
        for name, size in (("q", hidden), ("k", rows), ("v", rows)):
            yield f"{here}.self_attn.{name}_proj.weight", [size, hidden]
            yield f"{here}.self_attn.{name}_proj.bias", [size]
        yield f"{here}.self_attn.o_proj.weight", [hidden, hidden]
        yield f"{here}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{here}.mlp.up_proj.weight", [inner, hidden]
        yield f"{here}.mlp.down_proj.weight", [hidden, inner]


if __name__ == "__main__":
    main()
