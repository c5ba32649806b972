"""Small GGUF files for tests that look at headers: models and adapters with chosen tensors and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifacts import BASE_NAME_KEY, Fingerprint

BASE = Fingerprint(weights="1" * 64, tokenizer="2" * 64, template="3" * 64)
OTHER_BASE = Fingerprint(weights="9" * 64, tokenizer="2" * 64, template="3" * 64)

MODEL_SHAPES = {
    "token_embd.weight": (40, 16),
    "blk.0.attn_q.weight": (16, 16),
    "blk.0.ffn_up.weight": (32, 16),
    "output.weight": (40, 16),
}
"""Tensor → shape as torch has it: rows, columns."""


def write_model(path: Path, *, fingerprint: Fingerprint = BASE, arch: str = "llama", tied: bool = False) -> Path:
    """A model of a few tensors; `tied` leaves the head out."""
    shapes = {name: shape for name, shape in MODEL_SHAPES.items() if not (tied and name == "output.weight")}
    extra = {"general.name": "base", f"{arch}.block_count": 1, f"{arch}.context_length": 128}
    return _write(path, arch, "model", shapes, {**fingerprint.to_metadata(), **extra})


def write_adapter(
    path: Path,
    *,
    targets: Mapping[str, tuple[int, int]] | None = None,
    fingerprint: Fingerprint = BASE,
    arch: str = "llama",
    metadata: Mapping[str, Any] = {},
) -> Path:
    """A rank-4 adapter of `targets` (tensor → the base's rows and columns), the query projection by default."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in (targets or {"blk.0.attn_q.weight": (16, 16)}).items():
        if name == "token_embd.weight":
            shapes |= {f"{name}.lora_a": (rows, 4), f"{name}.lora_b": (columns, 4)}
        else:
            shapes |= {f"{name}.lora_a": (4, columns), f"{name}.lora_b": (rows, 4)}
    extra = {"adapter.type": "lora", "adapter.lora.alpha": 4.0, BASE_NAME_KEY: "base", **metadata}
    return _write(path, arch, "adapter", shapes, {**fingerprint.to_metadata(), **extra})


def _write(
    path: Path, arch: str, kind: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]
) -> Path:
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    for key, value in metadata.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
