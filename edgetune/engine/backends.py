"""What llama.cpp can compute on here: the CPU and the GPUs its build knows and finds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

from edgetune.engine import native

DeviceKind = Literal["cpu", "gpu", "igpu", "accelerator"]
_KINDS: dict[int, DeviceKind] = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accelerator"}


@dataclass(frozen=True)
class Device:
    """A device that ggml found."""

    name: str
    """As ggml calls it, e.g. "CPU", "CUDA0", "Metal"."""
    description: str
    """The hardware's name."""
    kind: DeviceKind
    free_bytes: int
    """Memory free now; 0 when the device does not say."""
    total_bytes: int


def list_devices() -> list[Device]:
    """Every device that this build of llama.cpp finds, in ggml's order."""
    native.start()
    ggml = _ggml()
    return [_describe(ggml, index) for index in range(ggml.ggml_backend_dev_count())]


def system_info() -> str:
    """llama.cpp's own line about the instruction sets and features it was built with."""
    native.start()
    return bytes(native.lib.llama_print_system_info()).decode(errors="replace").strip()


def _describe(ggml: ctypes.CDLL, index: int) -> Device:
    device = ggml.ggml_backend_dev_get(index)
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name=(ggml.ggml_backend_dev_name(device) or b"").decode(errors="replace"),
        description=(ggml.ggml_backend_dev_description(device) or b"").decode(errors="replace"),
        kind=_KINDS.get(ggml.ggml_backend_dev_type(device), "accelerator"),
        free_bytes=free.value,
        total_bytes=total.value,
    )


def _ggml() -> ctypes.CDLL:
    from llama_cpp._ggml import libggml

    pointer = ctypes.c_void_p
    for name, arguments, result in (
        ("count", [], ctypes.c_size_t),
        ("get", [ctypes.c_size_t], pointer),
        ("name", [pointer], ctypes.c_char_p),
        ("description", [pointer], ctypes.c_char_p),
        ("type", [pointer], ctypes.c_int),
        ("memory", [pointer, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)], None),
    ):
        function = getattr(libggml, f"ggml_backend_dev_{name}")
        function.argtypes, function.restype = arguments, result
    library: ctypes.CDLL = libggml
    return library
