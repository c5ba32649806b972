"""What a person sees when llama.cpp gives up: one sentence and an exit code instead of a core dump and a backtrace.

llama.cpp aborts its process where an assertion of its own fails, on a file whose header looks right and whose content
is not. Nothing can be saved then; this only says it decently. Called before a model is opened.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from edgetune.errors import ExitCode

_kept: list[Any] = []


def speak_before_aborting() -> None:
    """Let an abort inside llama.cpp end the process with one sentence on stderr and `ExitCode.FAILED`."""
    from llama_cpp._ggml import libggml

    # Where the loader does not look into a library's dependencies, llama.cpp's own words have to do.
    set_callback = getattr(libggml, "ggml_set_abort_callback", None)
    if set_callback is None or _kept:
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    callback = kind(_leave)
    set_callback.argtypes, set_callback.restype = [kind], ctypes.c_void_p
    set_callback(callback)
    _kept.append(callback)


def _leave(message: bytes) -> None:
    reason = " ".join(message.decode(errors="replace").split())
    # The path is that of the machine which compiled it; the file and line at its end are the part that tells.
    place, colon, what = reason.partition(": ")
    reason = f"{os.path.basename(place)}{colon}{what}"
    sys.stdout.flush()
    os.write(
        2,
        f"error: llama.cpp gave up: {reason}.\n"
        "hint:  Is a file damaged, or does a flag ask for what llama.cpp cannot do? -v shows its log.\n".encode(),
    )
    os._exit(ExitCode.FAILED)
