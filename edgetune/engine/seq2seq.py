"""Encoder-decoders (T5) through llama.cpp: the source is encoded once, the target decoded token by token or in beams.

Replies are `generation`'s and `beam_generation`'s, adapters `adapters`', so that this is no more than another way to
evaluate. llama.cpp keeps one encoded source a context: a reply that goes on after another's turn is evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.backends import list_devices
from edgetune.engine.batch import Batch
from edgetune.engine.beam import BeamSettings, log_softmax
from edgetune.engine.beam_generation import BeamGeneration
from edgetune.engine.candidates import read_logits
from edgetune.engine.choices import as_candidates
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.interrupt import Stopped, interruptible
from edgetune.engine.json_tokenizer import JSON_KEY, JsonTokenizer
from edgetune.engine.loading import CacheType, gpu_layers_for, load_model, open_context
from edgetune.engine.memory import BYTES_PER_VALUE
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header
from edgetune.errors import CorruptFileError, ResourceError, UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, LongArray, read_gguf_header
from edgetune.hardware import available_memory

SEQ2SEQ_ARCHITECTURES = ("t5",)
"""`general.architecture` of the GGUF files that this engine runs."""
_ABORTED = 2
_DEFAULT_CONTEXT = 512
_SMALLEST_BATCH = 64


@dataclass(eq=False)
class _Target:
    """One reply's place in the engine."""

    source: list[int]
    adapters: AdapterKey
    ids: list[int] = field(default_factory=list)
    """The decoder's tokens that were evaluated, the start token first."""


class Seq2SeqEngine:
    """A loaded encoder-decoder; see `protocol.Engine`. The prompt of a reply is the source."""

    def __init__(self, header: GgufHeader, model: Any, *, context_size: int, options: dict[str, Any]) -> None:
        """Take over `model`; use `open`. `options` are `open_context`'s."""
        self._header, self._model, self._options = header, model, options
        self._vocab = lib.llama_model_get_vocab(model)
        self._lora = LoadedAdapters(model, header)
        self._adapters: tuple[LoraSpec, ...] = ()
        self._adapter_key: AdapterKey = ()
        self._context: Any = None
        self._sizes = (0, 0, 0)
        self._current: _Target | None = None
        self._side = 0
        self._row: int | None = None
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        """Tokens that logits are about."""
        self.context_size = context_size
        """How many tokens a source may have, and how many a target, the start token included."""
        self.start_id = _start_token(model, header)
        """What the decoder begins with."""
        self.tokenizer: JsonTokenizer | GgufTokenizer = _tokenizer(self._vocab, header)
        """The model's vocabulary."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        ctx_size: int = 0,
        gpu_layers: int = -1,
        threads: int = 0,
        cache_type_k: CacheType = "f32",
        cache_type_v: CacheType = "f32",
        lora: Sequence[LoraSpec] = (),
        tap: Tap | None = None,
        verbose: bool = False,
    ) -> Seq2SeqEngine:
        """Load the GGUF model at `path`; `ctx_size` 0 is the length it was trained on. See `LlamaEngine.open`."""
        header = load_header(path)
        check_is_model(header)
        native.start(verbose=verbose)
        gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
        gpu_layers = gpu_layers_for(header, gpu_layers, 0, gpus)
        model = load_model(path, header, gpu_layers=gpu_layers, has_encoder=True)
        # Flash attention rounds T5's keys and values, which know no bounds, to 16 bits.
        options = {
            "threads": threads, "cache_type_k": cache_type_k, "cache_type_v": cache_type_v, "flash_attn": "off",
            "eval_callback": tap.callback if tap else None,
        }  # fmt: skip
        try:
            context_size = ctx_size or header.number("context_length") or _DEFAULT_CONTEXT
            engine = cls(header, model, context_size=context_size, options=options)
            engine.set_adapters(lora)
        except BaseException:
            lib.llama_model_free(model)
            raise
        return engine

    def __enter__(self) -> Seq2SeqEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, its context and its adapters."""
        self._close_context()
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._header.path

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """The adapters applied now."""
        return self._adapters

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the last target are in the cache."""
        return len(self._current.ids) if self._current else 0

    @property
    def memory(self) -> EngineMemory:
        """What the model takes; the context is as large as the replies so far needed."""
        self._check_open()
        weights, per_token = int(lib.llama_model_size(self._model)), self._bytes_per_token
        return EngineMemory(weights=weights, context=per_token * self._sizes[1], per_token=per_token)

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off."""
        self._check_open()
        self._adapter_key, self._adapters = self._lora.load(adapters), tuple(adapters)

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        prefix: Sequence[int] = (),
        top: int = 0,
        adapters: Sequence[LoraSpec] | None = None,
        shift: bool = False,
        beams: BeamSettings | None = None,
    ) -> Generation:
        """Answer the source `ids`; see `protocol.Engine`. With `beams` by beam search, which samples nothing."""
        self._check_open()
        self._check_source(ids, room_for=len(prefix) + 2)
        key = self._adapter_key if adapters is None else self._lora.load(adapters)
        if beams and beams.num_beams > 1:
            if prefix:
                raise UsageError("A beam search cannot go on from the beginning of a reply.")
            limit = self.context_size - 1
            new = min(limit, max_tokens) if max_tokens >= 0 else limit
            return BeamGeneration(self, ids, beams, adapters=key, max_new=new, stop=stop)
        target = _Target(list(ids), key)
        generation = LlamaGeneration(
            cast(Any, self),
            Sampler(
                self._vocab,
                sampling,
                context_size=self.context_size,
                eog_ids=self.tokenizer.eog_ids,
                prompt=[self.start_id, *prefix],
            ),
            list(ids),
            adapters=key,
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
        )
        generation.slot = cast(Any, target)
        return generation

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Run several replies, one after the other: a context has room for one encoded source."""
        for number, generation in enumerate(generations):
            for text in generation:
                yield number, text

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if self._row is None or self._current is None or self._context is None:
            return ()
        sampler = self.build_sampler(sampling, self._current.ids)
        try:
            seen = sampler.peek(self._context, self._row, top)
        finally:
            sampler.close()
        return as_candidates(seen, self.tokenizer.piece) if seen else ()

    def save_state(self, path: Path) -> None:
        """There is nothing that a later source could go on from. Raises `UsageError`."""
        raise UsageError("An encoder-decoder keeps no state between texts.")

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Nothing is taken up: 0."""
        return 0

    def logits(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `target_ids`, which begin with the start token; shape (target tokens, vocabulary)."""
        self._check_open()
        self._check_source(source_ids, room_for=len(target_ids))
        target = _Target(list(source_ids), self._adapter_key)
        self._encode(target, sequences=1, cells=len(target_ids), batch=len(target_ids))
        self._decode([(0, 0, target_ids)], every_output=True)
        self._current = self._row = None
        return np.array(self._all_logits(len(target_ids)))

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what this reply, the only one, waits for."""
        (one,) = generations
        target = cast(_Target, one.slot)
        pending = one.pending
        if self._current is not target:
            began = bool(target.ids)
            # The first time a reply's `pending` is its prompt, which is the source here, and what it begins with.
            fresh = [*target.ids, *pending] if began else [self.start_id, *pending[len(target.source) :]]
            self._encode(
                target,
                sequences=1,
                cells=self.context_size,
                batch=len(fresh),
                is_cancelled=lambda: one.is_cancelled,
            )
            # Stopped in the middle; the reply itself finds out that it was cancelled.
            if self._current is not target:
                return
            target.ids, pending = [], fresh
        one.row = self._decode([(0, len(target.ids), pending)])
        target.ids += pending
        self._row = one.row
        self._check_output(one.row)

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after output `row`, and with `top` what from."""
        if not top:
            return sampler.sample(self._context, row), None
        seen = sampler.sample_seen(self._context, row, top)
        return (seen.token if seen else None), seen

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a reply whose source and text so far are `history`; penalties look at the reply alone."""
        source = self._current.source if self._current else []
        if list(history[: len(source)]) == source:
            history = history[len(source) :]
        return Sampler(
            self._vocab,
            sampling,
            context_size=self.context_size,
            eog_ids=self.tokenizer.eog_ids,
            prompt=[self.start_id, *history],
        )

    def release(self, slot: Any) -> None:
        """The reply has ended; what it left is replaced by the next one."""

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the target can have no further token."""
        return self.cached_tokens + 1 >= self.context_size

    def begin_beams(self, source: Sequence[int], beams: int, adapters: AdapterKey) -> NDArray[np.float32]:
        """Encode `source` for so many beams; logits of the first token, (1, vocabulary)."""
        target = _Target(list(source), adapters)
        # Two sets of sequences: beams are copied from the one to the other, in any order.
        self._encode(target, sequences=2 * beams, cells=beams * self.context_size, batch=beams)
        self._side = 0
        self._decode([(0, 0, [self.start_id])])
        target.ids = [self.start_id]
        return self._all_logits(1)

    def advance_beams(self, parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Take every beam one token further; logits of the next, (beams, vocabulary)."""
        assert self._current is not None
        beams, length = len(parents), len(self._current.ids)
        if list(parents) != list(range(beams)) or length == 1:
            memory = lib.llama_get_memory(self._context)
            old, new = self._side * beams, (1 - self._side) * beams
            for beam, parent in enumerate(parents):
                lib.llama_memory_seq_cp(memory, old + parent, new + beam, -1, -1)
            for beam in range(beams):
                lib.llama_memory_seq_rm(memory, old + beam, -1, -1)
            self._side = 1 - self._side
        self._decode([(self._side * beams + beam, length, [token]) for beam, token in enumerate(tokens)])
        self._current.ids.append(tokens[0])
        return self._all_logits(beams)

    def log_probs(
        self, logits: NDArray[np.float32], texts: Sequence[Sequence[int]], *, max_new: int
    ) -> NDArray[np.float32]:
        """As they are: a GGUF file demands nothing of its texts."""
        values: NDArray[np.float32] = log_softmax(logits)
        return values

    @property
    def _bytes_per_token(self) -> int:
        head, layers = self._header.number("attention.head_count") or 1, self._header.number("decoder_block_count")
        width = self._header.number("attention.key_length") or (self._header.number("embedding_length") or 0) // head
        sizes = BYTES_PER_VALUE[self._options["cache_type_k"]] + BYTES_PER_VALUE[self._options["cache_type_v"]]
        return int((layers or self._header.number("block_count") or 1) * head * width * sizes)

    def _encode(
        self,
        target: _Target,
        *,
        sequences: int,
        cells: int,
        batch: int,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Encode the source for `sequences` sequences, in a context with as many `cells`; `target` is current then."""
        self._current = self._row = None
        self._reserve(sequences=sequences, cells=cells, batch=max(batch, len(target.source)))
        self._lora.apply(self._context, target.adapters)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        native.forget_errors()
        source = _SourceBatch(target.source, sequences)
        with interruptible(self._context, is_cancelled):
            code = lib.llama_encode(self._context, source.raw)
            if code == _ABORTED:
                raise Stopped
            if code:
                raise native.failure("llama.cpp could not encode the text")
            self._current = target

    def _decode(self, parts: Sequence[tuple[int, int, Sequence[int]]], *, every_output: bool = False) -> int:
        """Evaluate (sequence, position, tokens) in one batch; returns the row of the first output."""
        self._batch.clear()
        rows = [self._batch.add(number, at, ids, every_output=every_output) for number, at, ids in parts]
        native.forget_errors()
        if lib.llama_decode(self._context, self._batch.raw):
            self._current = self._row = None
            raise native.failure("llama.cpp could not evaluate the text")
        return rows[0]

    def _all_logits(self, rows: int) -> NDArray[np.float32]:
        pointer = lib.llama_get_logits(self._context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (rows, self.n_vocab))
        return logits

    def _reserve(self, *, sequences: int, cells: int, batch: int) -> None:
        """Have a context with at least this room; the source goes through it in one batch."""
        batch = max(_SMALLEST_BATCH, 1 << (batch - 1).bit_length())
        # llama.cpp takes no batch larger than the context.
        needed = (sequences, max(cells, batch), batch)
        if self._context is not None and all(have >= want for have, want in zip(self._sizes, needed, strict=True)):
            return
        self._close_context()
        sequences, cells, batch = self._sizes = tuple(map(max, zip(self._sizes, needed, strict=True)))  # type: ignore[assignment]
        wanted = cells * self._bytes_per_token + 2 * batch * self.n_vocab * 4
        if wanted > available_memory():
            self._sizes = (0, 0, 0)
            raise ResourceError(
                f"The context takes {wanted / 1e9:.1f} GB; {available_memory() / 1e9:.1f} GB are free.",
                hint="Take a shorter text, a smaller context with -c, or fewer beams.",
            )
        self._context = open_context(
            self._model, self.path, ctx_size=cells, batch_size=batch, sequences=sequences, **self._options
        )
        self._batch = Batch(lib.llama_n_batch(self._context))

    def _close_context(self) -> None:
        self._current = self._row = None
        if self._context is not None:
            lib.llama_free(self._context)
            self._context, self._lora.applied = None, ()

    def _check_open(self) -> None:
        if self._model is None:
            raise UsageError(f"{self.path} was closed.", hint="Open it again.")

    def _check_source(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if max(len(ids), room_for) > self.context_size:
            raise UsageError(
                f"The text has {max(len(ids), room_for)} tokens, the context {self.context_size}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        if wrong := [token for token in ids if not 0 <= token < self.n_vocab]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {self.n_vocab}.")

    def _check_output(self, row: int) -> None:
        if not np.isfinite(read_logits(self._context, row, self.n_vocab).max()):
            raise CorruptFileError(
                f"{self.path} answers with what is no number, with {len(self._lora.applied)} adapters on it.",
                hint="Is one of the files damaged, or stored as F16 where its values are too large? Convert it again.",
            )


class _SourceBatch:
    """A source that belongs to several sequences at once."""

    def __init__(self, ids: Sequence[int], sequences: int) -> None:
        count = len(ids)
        self._tokens, self._positions = np.asarray(ids, np.int32), np.arange(count, dtype=np.int32)
        self._counts, self._outputs = np.full(count, sequences, np.int32), np.ones(count, np.int8)
        self._sequences = np.arange(sequences, dtype=np.int32)
        pointer = lib.ctypes.POINTER(lib.ctypes.c_int32)
        self._pointers = (pointer * count)(*[self._sequences.ctypes.data_as(pointer)] * count)
        self.raw: Any = lib.llama_batch(
            n_tokens=count,
            token=self._tokens.ctypes.data_as(pointer),
            embd=None,
            pos=self._positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._pointers,
            logits=self._outputs.ctypes.data_as(lib.ctypes.POINTER(lib.ctypes.c_int8)),
        )


def _tokenizer(vocab: Any, header: GgufHeader) -> JsonTokenizer | GgufTokenizer:
    """Hugging Face's own where the file carries it, else llama.cpp's."""
    own = GgufTokenizer(vocab, header)
    source = header.metadata.get(JSON_KEY)
    if isinstance(source, LongArray):
        source = read_gguf_header(header.path, arrays=True).metadata.get(JSON_KEY)
    return JsonTokenizer(str(source), eog_ids=own.eog_ids) if source else own


def _start_token(model: Any, header: GgufHeader) -> int:
    found = int(lib.llama_model_decoder_start_token(model))
    if found < 0:
        recorded = header.metadata.get("tokenizer.ggml.padding_token_id")
        if not isinstance(recorded, int):
            raise UnsupportedError(f"{header.path} does not say with which token its decoder starts.")
        found = recorded
    return found
