"""A KV cache on disk: the tokens, the entries as llama.cpp serialises them, and what they belong to.

A file is taken up only when everything that decides the numbers is the same (model file, adapters and scales, cache
types, llama.cpp's version) and its checksum holds: llama.cpp itself trusts what it reads.
"""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.paths import whole_file

_MAGIC = b"edgetune-kv-1\n"


def write_state_file(path: Path, identity: str, ids: Sequence[int], state: ctypes.Array[ctypes.c_uint8]) -> None:
    """Write `state`, the entries of `ids`, whole or not at all. Raises `ResourceError` on a full disk."""
    tokens = np.asarray(ids, np.int32).tobytes()
    header = {
        "identity": identity,
        "tokens": len(ids),
        "state_bytes": len(state),
        "crc32": zlib.crc32(state, zlib.crc32(tokens)),
    }
    line = json.dumps(header).encode() + b"\n"
    with whole_file(path, expected_bytes=len(line) + len(tokens) + len(state)) as partial, partial.open("wb") as file:
        file.write(_MAGIC + line + tokens)
        file.write(state)


def read_state_file(path: Path, identity: str) -> tuple[list[int], Any] | None:
    """The tokens and entries in `path`; None when it is missing, damaged, or belongs to something else."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            header = json.loads(file.readline())
            if header["identity"] != identity:
                return None
            tokens = file.read(4 * header["tokens"])
            size = header["state_bytes"]
            if path.stat().st_size != file.tell() + size:
                return None
            state = (ctypes.c_uint8 * size)()
            if file.readinto(state) != size or zlib.crc32(state, zlib.crc32(tokens)) != header["crc32"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return np.frombuffer(tokens, np.int32).tolist(), state
