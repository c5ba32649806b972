"""The evaluations of one llama.cpp context: tokens of its sequences in, rows of logits out, and what each of them took.

Keeps the cache's knowledge in step with what was evaluated, also when an evaluation is stopped, fails, or loses its
model's file. Whose tokens they are, and what follows from the logits, is the engine's and the replies' work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.batch import Batch
from edgetune.engine.cache import KvCache, Slot
from edgetune.engine.candidates import read_logits
from edgetune.engine.interrupt import Stopped
from edgetune.engine.loading import LOGIT_ROWS
from edgetune.engine.native import lib
from edgetune.engine.opened import OpenedModel
from edgetune.engine.speculation import StepCosts
from edgetune.errors import CorruptFileError

_ABORTED = 2
_FEW = LOGIT_ROWS // 4
"""Evaluations of up to so many tokens are timed: those that replies are made of, guesses included."""


class Evaluator:
    """The context of an opened model."""

    def __init__(self, opened: OpenedModel, *, n_vocab: int) -> None:
        self.cache = KvCache(opened.context, window=lib.llama_model_n_swa(opened.model))
        """What the context holds."""
        self.costs = StepCosts()
        """What evaluations of a few tokens take here."""
        # A small context makes llama.cpp take smaller batches than asked for.
        self.batch_size: int = lib.llama_n_batch(opened.context)
        """How many tokens one evaluation takes."""
        self.latest: tuple[Slot, int] | None = None
        """The sequence evaluated last and the row of its last part's first output; None where that is gone."""
        self._opened, self._n_vocab = opened, n_vocab
        self._batch = Batch(self.batch_size)

    def forget(self) -> None:
        """Empty the cache."""
        self.cache.clear()
        self.latest = None

    def guess_limit(self) -> int:
        """How many guesses the context has room for beside the tokens that are certain."""
        return max(0, min(self.cache.room() - self.cache.running, _FEW - 1, self.batch_size - 1))

    def evaluate(self, parts: Sequence[tuple[Slot, Sequence[int]]], *, every_output: bool = False) -> list[int]:
        """Evaluate the parts, each behind what its sequence holds, in one batch; returns each one's first output row.

        There is an output for the last token of each, or for every token. Raises `Stopped` when it was interrupted,
        `CorruptFileError` when the model's file was lost meanwhile.
        """
        batch, opened = self._batch, self._opened
        batch.clear()
        rows = [batch.add(slot.number, len(slot.ids), ids, every_output=every_output) for slot, ids in parts]
        self.latest = None
        native.forget_errors()
        began = time.perf_counter()
        code = lib.llama_decode(opened.context, batch.raw)
        if opened.file.is_lost:
            self.forget()
            opened.file.check()
        if code == _ABORTED:
            for slot, _ in parts:
                self.cache.truncate(slot, len(slot.ids))
            raise Stopped
        if code:
            self.forget()
            raise native.failure("llama.cpp could not evaluate the text")
        if opened.is_on_gpu:
            lib.llama_synchronize(opened.context)
        if batch.raw.n_tokens <= _FEW:
            self.costs.record(batch.raw.n_tokens, time.perf_counter() - began)
        for slot, ids in parts:
            slot.ids.extend(ids)
        self.latest = (parts[-1][0], rows[-1])
        return rows

    def logits(self, rows: int) -> NDArray[np.float32]:
        """The first `rows` outputs of the last evaluation, (rows, vocabulary); valid until the next one."""
        pointer = lib.llama_get_logits(self._opened.context)
        found: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (rows, self._n_vocab))
        return found

    def check_output(self, row: int, *, adapters: int) -> None:
        """Raise `CorruptFileError` when output `row` holds no numbers; `adapters` of them were applied."""
        if not np.isfinite(read_logits(self._opened.context, row, self._n_vocab).max()):
            self.forget()
            raise CorruptFileError(
                f"{self._opened.file.path} answers with what is no number, with {adapters} adapters on it.",
                hint="Is one of the files damaged? Convert it again.",
            )
