"""The llama.cpp context of an encoder-decoder: sources are encoded into it, their targets decoded over them.

llama.cpp keeps what was encoded last, of several sources at once if need be. Those that were are the context's members;
a target that is no member has to be encoded again. The context is made when it is needed, and made larger when need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.batch import Batch
from edgetune.engine.candidates import read_logits
from edgetune.engine.interrupt import Stopped, interruptible
from edgetune.engine.loading import open_context
from edgetune.engine.memory import BYTES_PER_VALUE
from edgetune.engine.native import lib
from edgetune.engine.seq2seq_targets import SourceBatch, Target
from edgetune.errors import CorruptFileError, ResourceError
from edgetune.gguf_header import GgufHeader
from edgetune.hardware import available_memory

_ABORTED = 2
_SMALLEST_BATCH = 64


class Seq2SeqContext:
    """What was encoded, and the keys and values of the targets."""

    def __init__(self, model: Any, header: GgufHeader, lora: LoadedAdapters, options: dict[str, Any]) -> None:
        """`options` are `open_context`'s."""
        self.n_vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        """Tokens that logits are about."""
        self.members: list[Target] = []
        """Whose sources are encoded."""
        self.raw: Any = None
        """llama.cpp's own; none before anything was encoded."""
        self._model, self._header, self._lora, self._options = model, header, lora, options
        self._sequences = self._cells = self._batch_size = 0

    @property
    def bytes_per_token(self) -> int:
        """What the keys and values of one token of a target take."""
        head, layers = self._header.number("attention.head_count") or 1, self._header.number("decoder_block_count")
        width = self._header.number("attention.key_length") or (self._header.number("embedding_length") or 0) // head
        sizes = BYTES_PER_VALUE[self._options["cache_type_k"]] + BYTES_PER_VALUE[self._options["cache_type_v"]]
        return int((layers or self._header.number("block_count") or 1) * head * width * sizes)

    @property
    def nbytes(self) -> int:
        """What the keys and values take."""
        return self.bytes_per_token * self._cells

    def encode(
        self, targets: Sequence[Target], *, batch: int, is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Encode the sources of `targets`, all under the same adapters; they are the members then.

        `batch` tokens are going to be decoded at once. Nobody is a member after it was cancelled.
        """
        self.members = []
        sequences = 0
        for target in targets:
            target.first, target.side = sequences, 0
            sequences += target.width
        self._reserve(
            sequences=sequences,
            cells=sum(target.room * max(1, target.beams) for target in targets),
            batch=max(batch, sum(len(target.source) for target in targets)),
        )
        self._lora.apply(self.raw, targets[0].adapters)
        lib.llama_memory_clear(lib.llama_get_memory(self.raw), False)
        native.forget_errors()
        sources = SourceBatch([(target.source, target.first, target.width) for target in targets])
        with interruptible(self.raw, is_cancelled):
            code = lib.llama_encode(self.raw, sources.raw)
            if code == _ABORTED:
                raise Stopped
            if code:
                raise native.failure("llama.cpp could not encode the text")
            self.members = list(targets)

    def decode(self, parts: Sequence[tuple[int, int, Sequence[int]]], *, every_output: bool = False) -> list[int]:
        """Evaluate (sequence, position, tokens) in one batch; returns the row of each one's first output."""
        self._batch.clear()
        rows = [self._batch.add(number, at, ids, every_output=every_output) for number, at, ids in parts]
        native.forget_errors()
        if lib.llama_decode(self.raw, self._batch.raw):
            self.members = []
            raise native.failure("llama.cpp could not evaluate the text")
        return rows

    def copy_beams(self, target: Target, parents: Sequence[int]) -> None:
        """Let every beam be what was the beam of its parent."""
        if list(parents) == list(range(target.beams)) and len(target.ids) > 1:
            return
        memory = lib.llama_get_memory(self.raw)
        old, new = (target.first + side * target.beams for side in (target.side, 1 - target.side))
        for beam, parent in enumerate(parents):
            lib.llama_memory_seq_cp(memory, old + parent, new + beam, -1, -1)
        for beam in range(target.beams):
            lib.llama_memory_seq_rm(memory, old + beam, -1, -1)
        target.side = 1 - target.side

    def read_logits(self, rows: int) -> NDArray[np.float32]:
        """A copy of the logits of the first `rows` outputs: (rows, vocabulary)."""
        return np.array(np.ctypeslib.as_array(lib.llama_get_logits(self.raw), (rows, self.n_vocab)))

    def check_output(self, row: int) -> None:
        """Raises `CorruptFileError` where output `row` is no number."""
        if not np.isfinite(read_logits(self.raw, row, self.n_vocab).max()):
            raise CorruptFileError(
                f"{self._header.path} answers with what is no number, with {len(self._lora.applied)} adapters on it.",
                hint="Is one of the files damaged, or stored as F16 where its values are too large? Convert it again.",
            )

    def close(self) -> None:
        """Free it; the next text makes another one."""
        self.members = []
        if self.raw is not None:
            lib.llama_free(self.raw)
            self.raw, self._lora.applied = None, ()

    def _reserve(self, *, sequences: int, cells: int, batch: int) -> None:
        """Have a context with at least this room; the source goes through it in one batch."""
        # llama.cpp takes no batch that is smaller than the number of sequences.
        batch = max(_SMALLEST_BATCH, 1 << (max(batch, sequences) - 1).bit_length())
        cells = max(cells, batch)  # llama.cpp takes no batch larger than the context
        if self.raw is not None and sequences <= self._sequences and cells <= self._cells and batch <= self._batch_size:
            return
        self.close()
        sequences, cells = max(sequences, self._sequences), max(cells, self._cells)
        batch = max(batch, self._batch_size)
        wanted = cells * self.bytes_per_token + 2 * batch * self.n_vocab * 4
        if wanted > available_memory():
            self._sequences = self._cells = self._batch_size = 0
            raise ResourceError(
                f"The context takes {wanted / 1e9:.1f} GB; {available_memory() / 1e9:.1f} GB are free.",
                hint="Take a shorter text, a smaller context with -c, or fewer beams.",
            )
        self.raw = open_context(
            self._model, self._header.path, ctx_size=cells, batch_size=batch, sequences=sequences, **self._options
        )
        self._batch = Batch(lib.llama_n_batch(self.raw))
        self._sequences, self._cells, self._batch_size = sequences, cells, batch
