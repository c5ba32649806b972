"""Adapters of one loaded llama.cpp model: read from their files once, and applied to a context as a set with scales."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.adapter_fit import check_runnable
from edgetune.engine import native
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import UsageError
from edgetune.gguf_header import GgufHeader, read_gguf_header

_LARGEST_SCALE = 1e6


class LoadedAdapters:
    """The adapters read so far; they belong to the model and are freed with it."""

    def __init__(self, model: Any, header: GgufHeader) -> None:
        self._model, self._header = model, header
        self._handles: dict[tuple[Path, int, int], Any] = {}
        self.applied: AdapterKey = ()
        """What the context runs under."""

    def load(self, adapters: Sequence[LoraSpec]) -> AdapterKey:
        """Read what is not read yet; returns the active ones with their scales.

        Raises `UsageError`, `MismatchError` or `UnsupportedError` for one that cannot be applied to the model.
        """
        for adapter in adapters:
            if not abs(adapter.scale) <= _LARGEST_SCALE:
                raise UsageError(f"{adapter.scale} is no scale for {adapter.path}.", hint="Mostly between -2 and 2.")
        active = [adapter for adapter in adapters if adapter.scale != 0]
        keys = [file_key(adapter.path) for adapter in active]
        for key in keys:
            self._load(key)
        return tuple(zip(keys, (adapter.scale for adapter in active), strict=True))

    def apply(self, context: Any, key: AdapterKey) -> None:
        """Let the next evaluation of `context`, the only one of this model, run under these adapters."""
        if key is self.applied or key == self.applied:
            return
        self.put_on(context, key)
        self.applied = key

    def put_on(self, context: Any, key: AdapterKey) -> None:
        """Let the evaluations of `context`, one of several of this model, run under these adapters."""
        handles = [self._handles[file] for file, _ in key]
        pointers = (lib.llama_adapter_lora_p_ctypes * max(len(handles), 1))(*handles)
        scales = (ctypes.c_float * max(len(handles), 1))(*(scale for _, scale in key))
        native.forget_errors()
        if lib.llama_set_adapters_lora(context, pointers, len(handles), scales):
            raise native.failure("llama.cpp refused the adapters")

    def _load(self, key: tuple[Path, int, int]) -> None:
        if key in self._handles:
            return
        path = key[0]
        check_runnable(self._header, read_gguf_header(path))
        native.forget_errors()
        handle = lib.llama_adapter_lora_init(self._model, native.path_bytes(path))
        if not handle:
            raise native.failure(f"llama.cpp cannot load the adapter {path}")
        self._handles[key] = handle


def file_key(path: Path) -> tuple[Path, int, int]:
    """What tells a file from others and from itself after a change."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UsageError(f"There is no adapter {path}.", hint="Give the path of an adapter GGUF.") from error
    return path.resolve(), stat.st_mtime_ns, stat.st_size
