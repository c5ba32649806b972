"""What a person sees when llama.cpp gives up: one sentence and an exit code instead of a core dump and a backtrace.

llama.cpp aborts its process where an assertion of its own fails, on a file whose header looks right and whose content
is not; the system ends one that reads a page which its file has lost. Nothing can be saved then; this only says it
decently. Called before a model is opened.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, NoReturn

from edgetune.errors import ExitCode

_kept: list[Any] = []
_FULL_SCREEN_OFF = b"\x1b[?1000l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1049l\x1b[?25h\x1b[0m"
"""Mouse and paste reports off, back from the other screen, cursor on: for an app that filled the terminal."""


def speak_before_aborting() -> None:
    """Let an abort inside llama.cpp end the process with one sentence on stderr and `ExitCode.FAILED`.

    A model's file that is cut while it is in use becomes an error of the engine.
    """
    from llama_cpp._ggml import libggml

    from edgetune.engine.mapped_file import survive_lost_pages

    survive_lost_pages(_leave_unread)

    # Where the loader does not look into a library's dependencies, llama.cpp's own words have to do.
    set_callback = getattr(libggml, "ggml_set_abort_callback", None)
    if set_callback is None or _kept:
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    callback = kind(_leave)
    set_callback.argtypes, set_callback.restype = [kind], ctypes.c_void_p
    set_callback(callback)
    _kept.extend((callback, _terminal_state()))


def _terminal_state() -> Any:
    """How the terminal on stdin is set now; None when there is none."""
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError, ValueError):
        return None


def _restore_terminal() -> None:
    state = _kept[1] if _kept else None
    if state is not None:
        import termios

        if termios.tcgetattr(0) != state:
            os.write(2, _FULL_SCREEN_OFF)
            termios.tcsetattr(0, termios.TCSANOW, state)


def _leave(message: bytes) -> None:
    reason = " ".join(message.decode(errors="replace").split())
    # The path is that of the machine which compiled it; the file and line at its end are the part that tells.
    place, colon, what = reason.partition(": ")
    _say_and_exit(
        f"llama.cpp gave up: {os.path.basename(place)}{colon}{what}.",
        "Is a file damaged, or does a flag ask for what llama.cpp cannot do? -v shows its log.",
    )


def _leave_unread() -> None:
    _say_and_exit("A file that was in use cannot be read any more.", "Was it cut or overwritten, or is its disk gone?")


def _say_and_exit(message: str, hint: str) -> NoReturn:
    sys.stdout.flush()
    _restore_terminal()
    os.write(2, f"error: {message}\nhint:  {hint}\n".encode())
    os._exit(ExitCode.FAILED)
