"""The GGUF header reader: right on files of every kind, and `CorruptFileError`, nothing else, on damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifacts import BASE_NAME_KEY, Fingerprint
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError
from edgetune.gguf_header import TENSOR_TYPES, LongArray, read_gguf, read_gguf_header

_PAIR = struct.Struct("<Q")


def write_gguf(path: Path, *, kind: str = "model", words: int = 100) -> Path:
    """A small GGUF with every kind of metadata, written by gguf-py."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_name("tiny")
    writer.add_file_type(1)
    writer.add_block_count(3)
    writer.add_bool("test.yes", True)
    writer.add_float64("test.double", 0.5)
    writer.add_int64("test.negative", -(1 << 40))
    writer.add_array("test.short", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", [f"word{n}é" for n in range(words)])
    writer.add_array("tokenizer.ggml.scores", [float(n) for n in range(words)])
    writer.add_string("edgetune.base.weights_sha256", "ab" * 32)
    writer.add_string(BASE_NAME_KEY, "pocket")
    writer.add_tensor("token_embd.weight", np.ones((words, 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(7, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 34 * 2), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_gguf_py_wrote(tmp_path: Path) -> None:
    header = read_gguf_header(write_gguf(tmp_path / "a.gguf"))
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.number("block_count") == 3
    assert header.metadata["test.yes"] is True
    assert header.metadata["test.double"] == 0.5
    assert header.metadata["test.negative"] == -(1 << 40)
    assert header.metadata["test.short"] == [1, 2, 3]
    assert header.metadata["tokenizer.ggml.tokens"] == LongArray(100)
    assert header.array_length("tokenizer.ggml.scores") == 100
    assert header.array_length("test.short") == 3
    assert header.array_length("test.yes") is None
    assert [(t.name, t.shape, t.type, t.nbytes) for t in header.tensors] == [
        ("token_embd.weight", (32, 100), "F16", 6400),
        ("output_norm.weight", (7,), "F32", 28),
        ("blk.0.attn_q.weight", (64, 4), "Q8_0", 272),
    ]


def test_tensor_offsets_point_at_the_data(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    header = read_gguf_header(path)
    norm = header.tensors[1]
    start = header.data_start + norm.offset
    assert np.frombuffer(path.read_bytes()[start : start + norm.nbytes], np.float32).tolist() == [1.0] * 7


def test_arrays_are_read_when_asked(tmp_path: Path) -> None:
    metadata = read_gguf_header(write_gguf(tmp_path / "a.gguf"), arrays=True).metadata
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, list)
    assert tokens[7] == "word7é"
    assert isinstance(scores, list)
    assert scores[99] == 99.0


def test_reads_an_artefact(tmp_path: Path) -> None:
    artefact = read_gguf(write_gguf(tmp_path / "a.gguf", kind="adapter"))
    assert artefact.kind == "adapter"
    assert artefact.architecture == "llama"
    assert artefact.fingerprint == Fingerprint(weights="ab" * 32)
    assert artefact.base_name == "pocket"
    assert artefact.file_type == "F16"


def test_refuses_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="imatrix"):
        read_gguf(write_gguf(tmp_path / "a.gguf", kind="imatrix"))


def test_block_sizes_are_llama_cpps() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for number, (block, block_bytes) in GGML_QUANT_SIZES.items():
        if number.name != "Q8_1":  # gguf-py still has the size of an older layout; the type is never stored
            assert TENSOR_TYPES[int(number)] == (number.name, block, block_bytes)


def test_no_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_gguf_header(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="directory"):
        read_gguf_header(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}", b"\0" * 200, b"PK\3\4" + b"\0" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        read_gguf_header(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_truncated_at_every_length(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", words=70).read_bytes()
    header = read_gguf_header(tmp_path / "whole.gguf")
    last = header.tensors[-1]
    needed = header.data_start + last.offset + last.nbytes
    path = tmp_path / "cut.gguf"
    for length in [*range(header.data_start + 2), needed - 1]:
        path.write_bytes(whole[:length])
        for arrays in (False, True):
            with pytest.raises(CorruptFileError):
                read_gguf_header(path, arrays=arrays)
    path.write_bytes(whole[:needed])
    assert len(read_gguf_header(path).tensors) == 3


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CorruptFileError, match="truncated"):
        read_gguf_header(path)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", words=70).read_bytes()
    end = read_gguf_header(tmp_path / "whole.gguf").data_start
    path = tmp_path / "flipped.gguf"
    generator = random.Random(20260101)
    refused = 0
    for _ in range(4000):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            damaged[generator.randrange(end)] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        path.write_bytes(damaged)
        try:
            read_gguf_header(path, arrays=generator.random() < 0.5)
        except CorruptFileError:
            refused += 1
    assert refused > 1000


def _header(
    version: int = 3,
    *,
    tensors: tuple[bytes, ...] = (),
    pairs: tuple[bytes, ...] = (),
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    counts = (len(tensors) if tensor_count is None else tensor_count, len(pairs) if pair_count is None else pair_count)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)


def _text(text: str) -> bytes:
    return _PAIR.pack(len(text.encode())) + text.encode()


def _tensor(name: str, shape: tuple[int, ...], *, kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_LIES: dict[str, tuple[bytes, str]] = {
    "big endian": (_header(3 << 24), "big-endian"),
    "version 1": (_header(1), "version is 1"),
    "version 9": (_header(9), "version is 9"),
    "tensor count": (_header(tensor_count=1 << 60), "claims"),
    "pair count": (_header(pair_count=1 << 63), "claims"),
    "no tensors": (_header(), "no tensors"),
    "empty key": (_header(pairs=(_text("") + struct.pack("<IB", 0, 1),)), "empty"),
    "key twice": (_header(pairs=(_text("a") + struct.pack("<IB", 0, 1),) * 2), "twice"),
    "string length": (_header(pairs=(_text("a") + struct.pack("<IQ", 8, 1 << 62),)), "ends inside"),
    "array length": (_header(pairs=(_text("a") + struct.pack("<IIQ", 9, 4, 1 << 62),)), "claims"),
    "strings length": (_header(pairs=(_text("a") + struct.pack("<IIQ", 9, 8, 1 << 62),)), "claims"),
    "nested array": (_header(pairs=(_text("a") + struct.pack("<IIQ", 9, 9, 1),)), "unknown type"),
    "value type": (_header(pairs=(_text("a") + struct.pack("<IQ", 77, 1),)), "unknown type"),
    "alignment": (
        _header(pairs=(_text("general.alignment") + struct.pack("<II", 4, 3),), tensors=(_tensor("t", (1,)),)),
        "power of two",
    ),
    "huge tensor": (_header(tensors=(_tensor("t", (1 << 40, 1 << 40)),)), "truncated"),
    "negative dimension": (_header(tensors=(_tensor("t", ((1 << 64) - 1, 4)),)), "truncated"),
    "empty dimension": (_header(tensors=(_tensor("t", (0, 1 << 63)),)), "empty"),
    "dimensions": (_header(tensors=(_tensor("t", (1,) * 5),)), "5 dimensions"),
    "type": (_header(tensors=(_tensor("t", (32,), kind=31),)), "type 31"),
    "block": (_header(tensors=(_tensor("t", (100,), kind=12),)), "block of 256"),
    "offset": (_header(tensors=(_tensor("t", (1,), offset=1 << 63),)), "start at"),
    "tensor twice": (
        _header(
            tensors=(
                _tensor("t", (1,)),
                _tensor("t", (1,), offset=32),
            )
        ),
        "twice",
    ),
    "long name": (_header(tensors=(_tensor("t" * 64, (1,)),)), "longer than"),
}


@pytest.mark.parametrize("lie", _LIES)
def test_lying_headers_are_named(tmp_path: Path, lie: str) -> None:
    content, expected = _LIES[lie]
    path = tmp_path / "a.gguf"
    path.write_bytes(content + b"\0" * 100)
    with pytest.raises(CorruptFileError, match=expected):
        read_gguf_header(path)


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(_header(pairs=(_text("split.count") + struct.pack("<IH", 2, 3),)) + b"\0" * 20)
    assert read_gguf_header(path).tensors == []


def test_file_type_is_counted_when_not_said(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    pair = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
    tensors = (_tensor("a", (256,), kind=14), _tensor("b", (8,), offset=224))
    content: Any = _header(pairs=(pair,), tensors=tensors)
    path.write_bytes(content + b"\0" * 400)
    assert read_gguf(path).file_type == "Q6_K"
