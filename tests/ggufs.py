"""GGUF files for tests, made in process: converted random checkpoints, and LoRA adapters written tensor by tensor."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import CHATML, write_checkpoint


@cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="edgetune-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def checkpoint(family: str = "llama", *, seed: int = 0, chat_template: str | None = CHATML, **overrides: Any) -> Path:
    """A random checkpoint of `family`, written once for all tests."""
    directory = _directory() / f"{family}-{seed}-{len(list(_directory().iterdir()))}"
    return write_checkpoint(directory, family, seed=seed, chat_template=chat_template, overrides=overrides)


@cache
def base_gguf(family: str = "llama", *, seed: int = 0, chat_template: str | None = CHATML, **overrides: Any) -> Path:
    """`checkpoint`, converted to f32 with its fingerprint."""
    from converters import convert_base
    from edgetune.fingerprint import fingerprint_checkpoint

    source = checkpoint(family, seed=seed, chat_template=chat_template, **overrides)
    path = source.parent / f"{source.name}.gguf"
    # "llama" said and left out are two calls; the file of the first may be open.
    if not path.exists():
        convert_base(source, path, outtype="f32", metadata=fingerprint_checkpoint(source).to_metadata())
    return path


def write_lora(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    architecture: str = "llama",
    rank: int = 4,
    seed: int = 0,
    metadata: dict[str, str] | None = None,
    half_of: str = "",
    extra: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write an adapter over the tensors `shapes` (name → rows, columns), which shows; `half_of` lacks its B."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for name, (rows, columns) in shapes.items():
        a = rng.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
        b = rng.normal(0, 1, (rows, rank)).astype(np.float32)
        if name == "token_embd.weight":
            a, b = (
                rng.normal(0, 1, (rows, rank)).astype(np.float32),
                np.ascontiguousarray(rng.normal(0, 1, (columns, rank)).astype(np.float32)),
            )
        writer.add_tensor(f"{name}.lora_a", a)
        if name != half_of:
            writer.add_tensor(f"{name}.lora_b", b)
    for name, shape in (extra or {}).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUERY = {"blk.0.attn_q.weight": (256, 256), "blk.1.attn_q.weight": (256, 256)}
"""Shapes of the query projections of the Llama-like test checkpoints."""


@cache
def lora_gguf(*, seed: int = 0) -> Path:
    """An adapter for `base_gguf()`'s query projections, without a fingerprint."""
    return write_lora(_directory() / f"lora-{seed}.gguf", QUERY, seed=seed)
