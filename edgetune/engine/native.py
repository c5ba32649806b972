"""The door to llama.cpp: starts the library once and keeps its log.

llama.cpp and ggml log to one process-wide callback. It is silent unless asked, and keeps the last errors, because a
failing call returns NULL and says why only in the log. Nothing here knows models or contexts.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp

from edgetune.errors import EdgetuneError, ResourceError, UnsupportedError

lib: Any = llama_cpp
"""The C API, function by function."""

AdapterKey = tuple[tuple[tuple[Path, int, int], float], ...]
"""Adapters that are applied: (path, modification time, size) of each file, and its scale."""

_ERROR, _CONTINUED = 4, 5
_errors: deque[str] = deque(maxlen=8)
_state: dict[str, Any] = {"verbose": False, "level": 0, "callback": None}


def start(*, verbose: bool | None = None) -> None:
    """Initialise llama.cpp's backends on the first call; `verbose` says whether its log goes to stderr from now on."""
    if verbose is not None:
        _state["verbose"] = verbose
    if _state["callback"] is None:
        _state["callback"] = lib.llama_log_callback(_on_log)
        lib.llama_log_set(_state["callback"], ctypes.c_void_p(0))
        lib.llama_backend_init()


def version() -> str:
    """Of the bindings, and with them of llama.cpp."""
    import llama_cpp as package

    return str(package.__version__)


def forget_errors() -> None:
    """Drop the errors logged so far, so that the next reason belongs to the next call."""
    _errors.clear()


def failure(what: str, *, hint: str = "") -> EdgetuneError:
    """The error for a llama.cpp call that failed: `what` happened, and the reason its log gives."""
    why = reason()
    message = f"{what}: {why}." if why else f"{what}."
    lowered = why.lower()
    if "alloc" in lowered or "out of memory" in lowered:
        return ResourceError(
            message, hint="Use a smaller context (-c), a smaller quant type, or fewer GPU layers (-ngl)."
        )
    if "unknown model architecture" in lowered or "unknown pre-tokenizer" in lowered:
        return UnsupportedError(message, hint=hint or "This version of llama.cpp does not know it.")
    return EdgetuneError(message, hint=hint or "Run again with -v to see llama.cpp's log.")


def path_bytes(path: Path) -> bytes:
    """`path` as llama.cpp wants it: UTF-8."""
    return str(path).encode("utf-8", "surrogateescape")


def reason() -> str:
    """The most telling of the last errors: the first one that is not a mere echo of the call that failed."""
    lines = [line.split(": ", 1)[-1] if line.split(":", 1)[0].isidentifier() else line for line in _errors]
    return next((line.rstrip(". ") for line in lines if line), "")


@dataclass
class Kept:
    """What was written to stderr meanwhile."""

    text: str = ""

    def first_line(self) -> str:
        """The first line that says something, without the function's name before it."""
        line = next((line for line in self.text.splitlines() if line.strip()), "")
        return line.split(": ", 1)[-1].strip()


@contextmanager
def stderr_kept() -> Iterator[Kept]:
    """Keep what C code writes to stderr instead of showing it; for the few calls that report errors only there."""
    kept = Kept()
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            yield kept
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            kept.text = file.read().decode(errors="replace")


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    if level != _CONTINUED:
        _state["level"] = level
    if _state["verbose"]:
        sys.stderr.write(text.decode(errors="replace"))
    if _state["level"] == _ERROR:
        _errors.append(text.decode(errors="replace").strip())
