"""Stopping llama.cpp in the middle of a long evaluation, by Ctrl-C or from another thread.

llama.cpp asks a callback before every operation of its graph. It is set for prompts only: in the middle of a reply the
next token is soon enough, and asking would cost speed. Works where the CPU computes; elsewhere a batch runs to its end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgetune.engine.native import lib


class Stopped(Exception):
    """An evaluation ended early because it was asked to; ends the block of `interruptible`."""


@contextmanager
def interruptible(context: Any, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Let evaluations of `context` end early when `is_cancelled` or on Ctrl-C, which raises when the block ends."""
    pressed = threading.Event()
    # A handler that raises would do so inside the callback, where an exception cannot leave.
    handles = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    callback = lib.ggml_abort_callback(lambda _: pressed.is_set() or is_cancelled())
    if handles:
        signal.signal(signal.SIGINT, lambda *_: pressed.set())
    lib.llama_set_abort_callback(context, callback, None)
    try:
        yield
    except Stopped:
        pass
    finally:
        lib.llama_set_abort_callback(context, lib.ggml_abort_callback(), None)
        if handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt
