"""The models that are measured: random ones of Qwen2.5-0.5B's shape, one that says what can be foretold, the embedded.

Each is made once, in the build directory. Evaluating random weights takes as long as evaluating trained ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp

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
RANK = 8


def random_qwen(build_dir: Path = llama_cpp.BUILD_DIR) -> Path:
    """A random Q4_K_M of Qwen2.5-0.5B's shape."""
    return _made_once(build_dir / "qwen2.5-0.5b-shaped-Q4_K_M.gguf", lambda model: None)


def reciting_qwen(build_dir: Path = llama_cpp.BUILD_DIR) -> Path:
    """The same with a head that makes token n + 1 follow token n: its layers work as hard and add nothing.

    Greedy, it goes on counting from the prompt's last token, so that a prompt can hold what it is about to say.
    """
    return _made_once(build_dir / "reciting-0.5b-shaped-Q4_K_M.gguf", _make_it_recite, tie_word_embeddings=False)


def pocket(build_dir: Path = llama_cpp.BUILD_DIR) -> Path:
    """The embedded model in F16."""
    from edgetune.export import export_base
    from edgetune.library import embedded_model_dir

    path = build_dir / "pocket-F16.gguf"
    if not path.is_file():
        export_base(embedded_model_dir(), path, outtype="f16")
    return path


def random_adapter(build_dir: Path = llama_cpp.BUILD_DIR) -> Path:
    """An adapter of every linear layer of the random model, with weights that show."""
    from tests.ggufs import write_lora

    path = build_dir / "qwen2.5-0.5b-shaped-lora.gguf"
    if path.is_file():
        return path
    hidden, inner, rows = QWEN_0_5B["hidden_size"], QWEN_0_5B["intermediate_size"], 128
    layer = {
        "attn_q": (hidden, hidden), "attn_k": (rows, hidden), "attn_v": (rows, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    layers = range(QWEN_0_5B["num_hidden_layers"])
    shapes = {f"blk.{number}.{name}.weight": shape for number in layers for name, shape in layer.items()}
    return write_lora(path, shapes, rank=RANK, architecture="qwen2")


def _made_once(path: Path, change: Callable[[Any], None], **config: Any) -> Path:
    from edgetune.export import export_base

    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            directory = _write_qwen(Path(scratch) / "model", change, **config)
            export_base(directory, path, quant="Q4_K_M")
    return path


def _write_qwen(directory: Path, change: Callable[[Any], None], **config: Any) -> Path:
    """A random checkpoint in bf16, with a small tokenizer padded to the vocabulary."""
    import torch
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer()
    torch.manual_seed(0)
    settings = {**QWEN_0_5B, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, **config}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**settings)).to(torch.bfloat16)
    change(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _make_it_recite(model: Any) -> None:
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, dims=0))
