"""What a context takes, what fits, and what this machine can compute on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.engine.backends import list_devices, system_info
from edgetune.engine.memory import choose_context, kv_bytes_per_token, layers_that_fit
from edgetune.gguf_header import GgufHeader, TensorInfo
from edgetune.hardware import physical_cores


def header(tensors: dict[str, int] | None = None, /, **values: Any) -> GgufHeader:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 4,
        "llama.embedding_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 8192,
        **{f"llama.{name}": value for name, value in values.items()},
    }
    rows = [TensorInfo(name, (size,), "F32", 0, size) for name, size in (tensors or {}).items()]
    return GgufHeader(Path("model.gguf"), 3, metadata, rows, 0, 0)


def test_cache_bytes() -> None:
    # 4 layers × 2 heads × (64 + 64) values × 2 bytes
    assert kv_bytes_per_token(header()) == 4 * 2 * 128 * 2
    assert kv_bytes_per_token(header(), type_k="q8_0", type_v="f32") == 4 * 2 * (64 * 34 / 32 + 64 * 4)
    own_widths = header(**{"attention.key_length": 128, "attention.value_length": 32})
    assert kv_bytes_per_token(own_widths) == 4 * 2 * 160 * 2
    uneven = header(**{"attention.head_count_kv": [2, 0, 4, 0]})
    assert kv_bytes_per_token(uneven) == 6 * 128 * 2


@pytest.mark.parametrize(
    ("free", "expected"), [(1 << 40, 8192), (2048 * 4 * 1000, 768), (0, 512), (2048 * 4 * 4096, 4096)]
)
def test_the_context_is_what_fits_in_a_quarter_of_memory(free: int, expected: int) -> None:
    assert choose_context(header(), 2048, free) == expected


def test_layers_on_a_gpu() -> None:
    model = header(
        {f"blk.{n}.attn_q.weight": 1000 for n in range(4)} | {"output.weight": 500, "token_embd.weight": 500}
    )
    assert layers_that_fit(model, 400, 10_000) == 5
    assert layers_that_fit(model, 400, 5_000) == 4
    assert layers_that_fit(model, 400, 2_500) == 2
    assert layers_that_fit(model, 400, 100) == 0


def test_this_machine() -> None:
    devices = list_devices()
    assert "cpu" in {device.kind for device in devices}
    assert all(device.name for device in devices)
    assert "CPU" in system_info()
    assert physical_cores() >= 1
