"""Vectors of 1,000 texts of mixed length: edgetune against sentence-transformers and llama.cpp's own `embed`.

A random model of MiniLM's shape (6 layers of 384). sentence-transformers runs with its defaults (float32, batches of
32) in an environment of its own, made on first use in the build directory; transformers does the same work where it
cannot be installed. Every peer runs in a process of its own, in turn with the others, and all vectors are compared.
Prints JSON; a ratio is the median of the rounds'. `f32_limit` is the ratio that nothing but the model's matrix products
would reach in float32, at the rate at which torch multiplies them here: what lies above it needs bf16 in hardware.

    python -m benchmarks.embed [--build-dir DIR] [--rounds 3] [--texts 1000] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp
from edgetune.hardware import physical_cores, torch_info

MINI_LM = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
    "max_position_embeddings": 512,
}  # fmt: skip
WORDS = 8000
PEERS = ("sentence_transformers", "llama_cpp_embed", "llama", "torch")
_GOALS = {"llama": 1.3, "torch": 2.5}


def main() -> None:
    """Measure every peer, or with --peer one, on the texts of standard input."""
    command_line(__doc__ or "", PEERS, measure, run_peer)


def command_line(
    description: str,
    peers: Sequence[str],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    run_peer: Callable[[argparse.Namespace], None],
) -> None:
    """The command line of a benchmark over texts: `measure` is printed as JSON, `run_peer` is one peer's process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=llama_cpp.BUILD_DIR)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--peer", choices=peers, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(options)
    else:
        print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all peers, in turn; texts per second."""
    checkpoint = model_dir(options.build_dir)
    python, peer_name = peer_python(options.build_dir)
    texts = "\n".join(mixed_texts(checkpoint, options.texts))
    rates: dict[str, list[float]] = {peer: [] for peer in PEERS}
    nearness: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.build_dir) as scratch:
        for _ in range(options.rounds):
            for peer in PEERS:
                interpreter = python if peer == "sentence_transformers" else Path(sys.executable)
                out = Path(scratch) / f"{peer}.npy"
                rates[peer].append(run("benchmarks.embed", interpreter, peer, texts, out, options))
                print(f"{peer}: {rates[peer][-1]:.0f} texts/s", file=sys.stderr)
        for peer in PEERS[1:]:
            nearness[peer] = _least_cosine(Path(scratch) / f"{PEERS[0]}.npy", Path(scratch) / f"{peer}.npy")
    base = rates[PEERS[0]]
    return {
        "texts": options.texts,
        "threads": options.threads,
        "peer": peer_name,
        "texts_per_second": {peer: statistics.median(values) for peer, values in rates.items()},
        "ratio": {
            peer: statistics.median(mine / other for mine, other in zip(rates[peer], base, strict=True))
            for peer in PEERS[1:]
        },
        "goal": _GOALS,
        "f32_limit": _most_texts_per_second(checkpoint, texts.split("\n"), options.threads) / statistics.median(base),
        "bf16": bool((info := torch_info()) and info.bf16),
        "least_cosine": nearness,
    }


def _most_texts_per_second(checkpoint: Path, texts: list[str], threads: int) -> float:
    """Of the matrix products alone: attention, norms and everything else would have to take no time."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    hidden, wide, layers = (MINI_LM[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    tokens = sum(map(len, transformers.AutoTokenizer.from_pretrained(checkpoint)(texts)["input_ids"]))
    states, up, rows = torch.randn(2048, hidden), torch.randn(wide, hidden), []
    for _ in range(20):
        began = time.perf_counter()
        torch.nn.functional.linear(states, up)
        rows.append(2048 / (time.perf_counter() - began))
    products = layers * (4 * hidden * hidden + 2 * hidden * wide) / (hidden * wide)
    return max(rows) / products * len(texts) / tokens


def run_peer(options: argparse.Namespace) -> None:
    """Embed the lines of standard input; prints seconds, the model's loading and first texts aside."""
    import numpy as np

    texts = sys.stdin.read().split("\n")
    embed = _OPENERS[options.peer](options.build_dir, options.threads)
    embed(texts[:16])
    began = time.perf_counter()
    vectors = embed(texts)
    print(time.perf_counter() - began)
    np.save(options.out, np.asarray(vectors, np.float32))


def open_sentence_transformers(build_dir: Path, threads: int) -> Any:
    """sentence-transformers as its documentation uses it, or transformers doing the same."""
    import torch

    torch.set_num_threads(threads)
    checkpoint = build_dir / "minilm-shaped"
    try:
        package = import_module("sentence_transformers")
    except ImportError:
        return _open_transformers(checkpoint)
    model = package.SentenceTransformer(str(checkpoint), device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


def open_llama_cpp_embed(build_dir: Path, threads: int) -> Any:
    """llama-cpp-python's own `Llama.embed`, with flash attention and small batches: its best here."""
    from llama_cpp import Llama

    model = Llama(
        str(build_dir / "minilm-shaped-F16.gguf"), embedding=True, n_ctx=512, n_batch=512, n_ubatch=512,
        n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False, pooling_type=1,
    )  # fmt: skip
    return lambda texts: model.embed(texts, normalize=False)


def open_llama(build_dir: Path, threads: int) -> Any:
    """edgetune through llama.cpp."""
    from edgetune.engine import open_encoder

    return open_encoder(build_dir / "minilm-shaped-F16.gguf", threads=threads).embed


def open_torch(build_dir: Path, threads: int) -> Any:
    """edgetune in torch, in the type it chooses here."""
    import torch

    from edgetune.engine import open_encoder

    torch.set_num_threads(threads)
    return open_encoder(build_dir / "minilm-shaped").embed


_OPENERS = {
    "sentence_transformers": open_sentence_transformers,
    "llama_cpp_embed": open_llama_cpp_embed,
    "llama": open_llama,
    "torch": open_torch,
}


def model_dir(build_dir: Path) -> Path:
    """The random sentence model, as a sentence-transformers directory and as a GGUF; made once."""
    directory, gguf = build_dir / "minilm-shaped", build_dir / "minilm-shaped-F16.gguf"
    if not (directory / "modules.json").is_file():
        _write_model(directory)
    if not gguf.is_file():
        from edgetune.export import export_base

        export_base(directory, gguf, outtype="f16")
    return directory


def mixed_texts(checkpoint: Path, count: int) -> list[str]:
    """Texts of 3 to 250 words, most of them short, the same on every run."""
    generator = random.Random(0)
    words = [word for word in (checkpoint / "vocab.txt").read_text(encoding="utf-8").split("\n") if word.isalpha()]
    lengths = [min(250, max(3, int(generator.lognormvariate(3.4, 0.8)))) for _ in range(count)]
    return [" ".join(generator.choice(words) for _ in range(length)) for length in lengths]


def peer_python(build_dir: Path) -> tuple[Path, str]:
    """An interpreter with sentence-transformers in it, and what is measured there; never the project's own."""
    directory = build_dir / "sentence-transformers"
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (directory / "ready").is_file():
        print(f"installing sentence-transformers in {directory}", file=sys.stderr)
        # The packages that are here already, torch among them, are the ones both sides are measured with.
        venv.create(directory, with_pip=True, clear=True)
        paths = [path for path in sys.path if path.endswith("site-packages")]
        found = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        )
        (Path(found.stdout.strip()) / "project.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "sentence-transformers"]
        done = subprocess.run(install, check=False, stdout=sys.stderr)
        if done.returncode:
            return Path(sys.executable), "transformers, float32, batches of 32 (no sentence-transformers)"
        (directory / "ready").touch()
    return python, "sentence-transformers, its defaults"


def _open_transformers(checkpoint: Path) -> Any:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModel.from_pretrained(checkpoint).eval()

    def embed(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        rows: dict[int, Any] = {}
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            inputs = tokenizer([texts[at] for at in part], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            rows |= dict(zip(part, ((states * mask).sum(1) / mask.sum(1)).numpy(), strict=True))
        return [rows[at] for at in range(len(texts))]

    return embed


def _write_model(directory: Path) -> None:
    import math

    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = dict.fromkeys(
        "".join(generator.choice(letters) for _ in range(generator.randint(2, 9))) for _ in range(WORDS)
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *words]
    vocabulary += [f"[unused{number}]" for number in range(30522 - len(vocabulary))]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **MINI_LM))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.25 if "embeddings" in name else 1 / math.sqrt(weight.shape[1]))
    model.save_pretrained(directory)
    files: dict[str, Any] = {
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512},
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
    }
    for name, values in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")


def run(module: str, python: Path, peer: str, texts: str, out: Path, options: argparse.Namespace) -> float:
    """Texts per second of `peer` of `module`, in a process of its own, which writes its results to `out`."""
    command = [python, "-m", module, "--peer", peer, "--out", out, "--build-dir", options.build_dir]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [*map(str, command), "--threads", str(options.threads)],
        input=texts, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stderr[-2000:]}")
    return (texts.count("\n") + 1) / float(done.stdout.split()[-1])


def _least_cosine(expected_path: Path, found_path: Path) -> float:
    import numpy as np

    expected, found = np.load(expected_path), np.load(found_path)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    return float(((expected * found).sum(axis=1) / lengths).min())


if __name__ == "__main__":
    main()
