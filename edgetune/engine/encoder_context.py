"""One llama.cpp context that reads whole texts: it grows with the longest batch, on as many cores as it is told.

Several of them share one model's weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.batch import Batch
from edgetune.engine.encoder_tokens import Encoded
from edgetune.engine.loading import FLASH_ATTENTION, FlashAttention
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.tap import Tap
from edgetune.head import Array

_LEAST_SIZE = 256
MOST_SEQUENCES = 64
"""Texts that one batch may have."""


class EncoderContext:
    """A context of `model`, which must outlive it."""

    def __init__(
        self, model: Any, path: Path, *, is_decoder: bool, flash_attn: FlashAttention, tap: Tap | None
    ) -> None:
        self._model, self._path, self._is_decoder = model, path, is_decoder
        self._flash_attn, self._tap = flash_attn, tap
        self._width: int = lib.llama_model_n_embd_out(model)
        self._raw: Any = None
        self._batch = Batch(1)
        self._size = self._threads = 0
        self._applied: AdapterKey = ()

    def states(
        self,
        batch: Sequence[Encoded],
        vectors: Array | None,
        *,
        adapters: LoadedAdapters,
        key: AdapterKey,
        threads: int,
    ) -> Array:
        """Hidden states of the batch's tokens, one text after the other, (tokens, hidden), under the adapters `key`.

        `vectors` go in instead of the tokens' own where they are given, (tokens, hidden).
        """
        total = sum(map(len, batch))
        self._make_room(total, threads)
        if self._applied != key:
            adapters.put_on(self._raw, key)
            self._applied = key
        self._batch.clear()
        for number, one in enumerate(batch):
            self._batch.add(number, 0, one.ids, every_output=True)
        native.forget_errors()
        if self._is_decoder:
            lib.llama_memory_clear(lib.llama_get_memory(self._raw), True)
            code = lib.llama_decode(self._raw, self._batch.raw)
        else:
            # T5's encoder has a cache as well, and decoding would let its tokens see only those before them.
            code = lib.llama_encode(self._raw, self._batch.raw if vectors is None else self._as_vectors(vectors))
        if code:
            raise native.failure("llama.cpp could not evaluate the texts")
        found = np.ctypeslib.as_array(lib.llama_get_embeddings(self._raw), (total, self._width))
        return np.array(found, np.float32)

    def close(self) -> None:
        """Free the context."""
        if self._raw is not None:
            lib.llama_free(self._raw)
        self._raw, self._size, self._applied = None, 0, ()

    def _as_vectors(self, vectors: Array) -> Any:
        raw = self._batch.raw
        return lib.llama_batch(
            n_tokens=raw.n_tokens,
            token=None,
            embd=vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=raw.pos,
            n_seq_id=raw.n_seq_id,
            seq_id=raw.seq_id,
            logits=raw.logits,
        )

    def _make_room(self, tokens: int, threads: int) -> None:
        """Let the context take `tokens` at once: making a new one takes milliseconds, its size is memory."""
        if tokens > self._size:
            self._open(max(_LEAST_SIZE, 1 << (tokens - 1).bit_length()), threads)
        elif threads != self._threads:
            lib.llama_set_n_threads(self._raw, threads, threads)
        self._threads = threads

    def _open(self, size: int, threads: int) -> None:
        self.close()
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = size
        parameters.n_seq_max, parameters.kv_unified = MOST_SEQUENCES, True
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.embeddings, parameters.pooling_type = True, lib.LLAMA_POOLING_TYPE_NONE
        parameters.flash_attn_type = FLASH_ATTENTION[self._flash_attn]
        parameters.no_perf = True
        if self._tap is not None:
            parameters.cb_eval = self._tap.callback
        native.forget_errors()
        self._raw = lib.llama_init_from_model(self._model, parameters)
        if not self._raw:
            raise native.failure(f"llama.cpp cannot make a context of {size} tokens for {self._path}")
        self._batch, self._size = Batch(size), size
