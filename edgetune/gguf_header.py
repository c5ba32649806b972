"""Read what a GGUF file says about itself: metadata and the table of tensors, never the tensors' data.

Standard library alone, and quick on a large vocabulary: the file is mapped, and long arrays are stepped over. Nothing
in the file is trusted: every length, count and offset is checked against the file's size, and whatever llama.cpp would
refuse (or read out of bounds) is a `CorruptFileError` that says what is wrong.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edgetune.artifacts import BASE_NAME_KEY, Fingerprint, Gguf
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml type number → (name, elements per block, bytes per block)."""

FILE_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
"""`general.file_type` → the name llama.cpp's quantizer takes."""

SHORT_ARRAY = 64
"""Arrays of up to this many entries are always read; longer ones on request."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 63
_HINT = "Convert or download it again."


@dataclass(frozen=True)
class LongArray:
    """Stands in the metadata for an array that was stepped over."""

    length: int


Scalar = str | int | float | bool
Value = Scalar | list[Scalar] | LongArray


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """As stored: the contiguous dimension first, which is the reverse of torch's order."""
    type: str
    """ggml's name, e.g. "F16", "Q4_K"."""
    offset: int
    """Bytes from `GgufHeader.data_start`."""
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensor data."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: list[TensorInfo]
    data_start: int
    """Bytes from the start of the file to the tensor data."""
    file_bytes: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. "llama"; empty when absent."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """Metadata `<architecture>.<key>` as an integer; None when it is absent or not a number."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return int(value) if isinstance(value, int | float) else None

    def array_length(self, key: str) -> int | None:
        """The number of entries of the array at `key`, read or not; None when there is no such array."""
        value = self.metadata.get(key)
        if isinstance(value, LongArray):
            return value.length
        return len(value) if isinstance(value, list) else None


def read_gguf_header(path: Path, *, arrays: bool | tuple[str, ...] = False) -> GgufHeader:
    """Read and validate the header of the GGUF file at `path`; `arrays` reads long arrays (the vocabulary) too.

    Prefixes of keys in `arrays` choose which long arrays are read.

    Raises `CorruptFileError` for a file that is not a whole, consistent GGUF, `UsageError` when there is no file.
    """
    if not path.is_file():
        what = "is a directory, not a GGUF file" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}.", hint="Give the path of a .gguf file.")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            what = "is empty" if not size else f"is cut short ({size} bytes)"
            raise CorruptFileError(f"{path} {what}, not a GGUF file.", hint=_HINT)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data, size, arrays).read()
            except _Damage as damage:
                raise CorruptFileError(f"{path} is not a valid GGUF file: {damage}.", hint=_HINT) from None


def read_gguf(path: Path) -> Gguf:
    """Read the GGUF file at `path` as an artefact.

    Raises `CorruptFileError` as `read_gguf_header`, `UnsupportedError` for a GGUF that is neither model nor adapter.
    """
    return gguf_from_header(read_gguf_header(path))


def gguf_from_header(header: GgufHeader) -> Gguf:
    """The artefact that `header` describes; raises as `read_gguf`."""
    kind = str(header.metadata.get("general.type", "model"))
    if kind not in ("model", "adapter"):
        raise UnsupportedError(
            f"{header.path} holds a {kind!r}, not a model or an adapter.", hint="Give a model or a LoRA adapter."
        )
    if not header.architecture:
        raise CorruptFileError(f"{header.path} does not name its architecture.", hint=_HINT)
    return Gguf(
        path=header.path,
        kind="adapter" if kind == "adapter" else "model",
        architecture=header.architecture,
        fingerprint=Fingerprint.from_metadata(header.metadata),
        base_name=str(header.metadata.get(BASE_NAME_KEY) or header.metadata.get("general.name", "")),
        file_type=_file_type(header),
    )


def _file_type(header: GgufHeader) -> str:
    number = header.metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type] += tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default="")


class _Damage(Exception):
    """What is wrong with the file, as the end of a sentence."""


class _Reader:
    """Walks the header once; every step checks that it stays inside the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int, arrays: bool | tuple[str, ...]) -> None:
        self.path, self.data, self.size = path, data, size
        self.wanted = ("",) if arrays is True else arrays or ()
        """Prefixes of the keys whose long arrays are read."""
        self.position = 0

    def read(self) -> GgufHeader:
        magic = self.take(4)
        if magic != b"GGUF":
            raise _Damage("it starts with " + repr(magic) + " instead of b'GGUF'")
        version = self._version()
        tensor_count, pair_count = self.number("<Q"), self.number("<Q")
        # The smallest tensor row and pair take 24 and 13 bytes: a count that cannot fit is a lie.
        if tensor_count > self.size // 24 or pair_count > self.size // 13:
            raise _Damage(f"it claims {tensor_count} tensors and {pair_count} metadata entries in {self.size} bytes")
        metadata = self._metadata(pair_count)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 31:
            raise _Damage(f"its alignment {alignment!r} is not a power of two")
        rows = [self._tensor() for _ in range(tensor_count)]
        data_start = -(-self.position // alignment) * alignment
        self._check_tensors(rows, metadata, data_start, alignment)
        return GgufHeader(self.path, version, metadata, rows, data_start, self.size)

    def _version(self) -> int:
        version = self.number("<I")
        if version & 0xFFFF == 0 and version:
            raise _Damage("it is stored in big-endian byte order, which is not supported")
        if version not in (2, 3):
            raise _Damage(f"its GGUF version is {version}; versions 2 and 3 are known")
        return version

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            raise _Damage(f"it ends inside its header, at byte {self.size}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, form: str) -> int:
        value = self.scalar(form)
        assert isinstance(value, int)
        return value

    def scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Damage(f"{what} at byte {self.position} is not UTF-8") from None

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self.text("a metadata key")
            if not key or key in metadata:
                raise _Damage(f"metadata key {key!r} is {'given twice' if key else 'empty'}")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> Value:
        kind = self.number("<I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.take(self.number("<Q")).decode(errors="replace")
        if kind != _ARRAY:
            raise _Damage(f"metadata {key!r} has the unknown type {kind}")
        kind, length = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return self._strings(length, wanted=key.startswith(self.wanted))
        if kind not in _SCALARS:
            raise _Damage(f"the array {key!r} has entries of the unknown type {kind}")
        width = struct.calcsize(_SCALARS[kind])
        raw_bytes = length * width
        if raw_bytes > self.size - self.position:
            raise _Damage(f"the array {key!r} claims {length} entries, more than the file holds")
        if length > SHORT_ARRAY and not key.startswith(self.wanted):
            self.position += raw_bytes
            return LongArray(length)
        return list(struct.unpack(f"<{length}{_SCALARS[kind][1]}", self.take(raw_bytes)))

    def _strings(self, length: int, *, wanted: bool) -> Value:
        if length * 8 > self.size - self.position:
            raise _Damage(f"an array claims {length} strings, more than the file holds")
        if length <= SHORT_ARRAY or wanted:
            return [self.take(self.number("<Q")).decode(errors="replace") for _ in range(length)]
        # The hot loop: one hop per string, two for each entry of a vocabulary with its merges.
        data, position, end, read_length = self.data, self.position, self.size - 8, struct.Struct("<Q").unpack_from
        for _ in range(length):
            if position > end:
                raise _Damage(f"it ends inside its header, at byte {self.size}")
            position += 8 + read_length(data, position)[0]
        if position > self.size:
            raise _Damage(f"it ends inside its header, at byte {self.size}")
        self.position = position
        return LongArray(length)

    def _tensor(self) -> TensorInfo:
        name = self.text("a tensor's name")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise _Damage(f"the tensor name {name[:40]!r}… is longer than {_MAX_NAME_BYTES} bytes")
        dimensions = self.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise _Damage(f"tensor {name!r} claims {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        if 0 in shape:
            raise _Damage(f"tensor {name!r} is empty: {shape}")
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in TENSOR_TYPES:
            raise _Damage(f"tensor {name!r} has the type {kind}, which this llama.cpp does not know")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        row = shape[0] if shape else 1
        if row % block:
            raise _Damage(f"tensor {name!r} has rows of {row}, not a multiple of {type_name}'s block of {block}")
        return TensorInfo(name, shape, type_name, offset, prod(shape) // block * block_bytes)

    def _check_tensors(
        self, tensors: list[TensorInfo], metadata: dict[str, Value], data_start: int, alignment: int
    ) -> None:
        is_shard = isinstance(shards := metadata.get("split.count", 0), int) and shards > 1
        if not tensors and not is_shard:
            raise _Damage("it has no tensors")
        expected, seen = 0, set()
        for tensor in tensors:
            if tensor.name in seen:
                raise _Damage(f"tensor {tensor.name!r} is there twice")
            seen.add(tensor.name)
            if tensor.offset != expected:
                raise _Damage(f"tensor {tensor.name!r} is said to start at {tensor.offset} instead of {expected}")
            end = data_start + tensor.offset + tensor.nbytes
            if end > self.size:
                total = end + sum(later.nbytes for later in tensors[len(seen) :])
                raise _Damage(f"it is truncated: {self.size} of at least {total} bytes are there")
            expected += -(-tensor.nbytes // alignment) * alignment
