"""The child process in which llama.cpp quantizes: `python -m edgetune.quantize.worker JSON`.

A process of its own because llama.cpp can abort the process it runs in and cannot be told to stop: the parent kills it,
or reads from its exit code that it died. Prints llama.cpp's log to stdout as JSON lines, [level, text]; knows nothing
of what they mean.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

_SLAB_BYTES = 1 << 25


def main() -> int:
    """Quantize as the object in the first argument says: in, out, ftype, threads and three flags."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def forward_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        try:
            sys.stdout.write(json.dumps([level, text.decode("utf-8", "replace")]) + "\n")
            sys.stdout.flush()
        except OSError:
            os._exit(1)  # The parent is gone; so is the reason to go on.

    request = json.loads(sys.argv[1])
    llama_cpp.llama_log_set(forward_log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = request["ftype"]
    params.nthread = request["threads"]
    params.dry_run = request["dry_run"]
    params.only_copy = request["only_copy"]
    params.allow_requantize = request["allow_requantize"]
    # Slabs that stay in the cache: a seventh of the memory of the default (8 GiB), and no page faults over and over.
    params.max_buf_size = _SLAB_BYTES
    llama_cpp.llama_backend_init()
    return int(llama_cpp.llama_model_quantize(os.fsencode(request["in"]), os.fsencode(request["out"]), params))


if __name__ == "__main__":
    sys.exit(main())
