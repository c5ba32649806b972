"""A look into a running llama.cpp graph: copies of intermediate tensors by name, through the scheduler's callback.

Only for looking: each tensor asked for ends a piece of the graph there, which costs speed. Names are llama.cpp's own,
the layer after a dash ("l_out-3"); which of them exist depends on the model's graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.native import lib

_FLOAT32 = 0
_DIMENSIONS = 4


class _Tensor(ctypes.Structure):
    """The beginning of ggml's `ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMENSIONS),
        ("nb", ctypes.c_size_t * _DIMENSIONS),
    )


class Tap:
    """Hands on the tensors whose names `wanted` picks, as they are computed; give it to `LlamaEngine.open`."""

    def __init__(self, wanted: Callable[[str], bool], take: Callable[[str, NDArray[np.float32]], None]) -> None:
        """`take` is called with name and values, whose axes are ggml's from the last to the first."""
        self._wanted, self._take = wanted, take
        self._ggml = _ggml()
        self.callback: Any = lib.ggml_backend_sched_eval_callback(self._on_tensor)
        """What llama.cpp calls; it must outlive the context."""

    def _on_tensor(self, address: int, asks: bool, _data: object) -> bool:
        name = self._ggml.ggml_get_name(address).decode(errors="replace")
        if not self._wanted(name):
            return not asks
        if not asks:
            tensor = _Tensor.from_address(address)
            if tensor.type == _FLOAT32 and self._ggml.ggml_is_contiguous(address):
                values = np.empty(tuple(reversed(tensor.ne)), np.float32)
                self._ggml.ggml_backend_tensor_get(address, values.ctypes.data, 0, values.nbytes)
                self._take(name, values)
        return True


def _ggml() -> Any:
    from llama_cpp._ggml import libggml

    libggml.ggml_get_name.argtypes, libggml.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    libggml.ggml_is_contiguous.argtypes, libggml.ggml_is_contiguous.restype = [ctypes.c_void_p], ctypes.c_bool
    libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    libggml.ggml_backend_tensor_get.restype = None
    return libggml
