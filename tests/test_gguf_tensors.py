"""Rows read from a GGUF file are those of llama.cpp's own dequantizer, and the tap's tensors those of torch."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_tensors import GgufTensors, dequantize

SHAPE = (6, 512)


def write(path: Path, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("first.weight", np.ones(3, np.float32))
    stored = values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(stored, kind) if kind != gguf.GGMLQuantizationType.F32 else values


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_rows_are_dequantized(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    expected = write(tmp_path / "x.gguf", kind)
    tensors = GgufTensors(tmp_path / "x.gguf")
    assert tensors.shape("token_embd.weight") == SHAPE
    np.testing.assert_array_equal(tensors.read("token_embd.weight"), expected)
    np.testing.assert_array_equal(tensors.rows("token_embd.weight", 2, 4), expected[2:4])
    np.testing.assert_array_equal(tensors.take("token_embd.weight", [5, 0]), expected[[5, 0]])
    pieces = np.concatenate([rows for _, rows in tensors.iter_rows("token_embd.weight")])
    np.testing.assert_array_equal(pieces, expected)
    assert "first.weight" in tensors
    assert "last.weight" not in tensors


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    with pytest.raises(UsageError, match=r"no tensor 'output\.weight'"):
        GgufTensors(tmp_path / "x.gguf").read("output.weight")


def test_a_type_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stored as Q8_1"):
        dequantize(np.zeros(36, np.uint8), "Q8_1")


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_many_numbers_are_shared_out_to_threads_and_stay_the_same(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 255, ((1 << 19) // block + 3, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind).ravel()
    np.testing.assert_array_equal(dequantize(raw, name), expected)
