"""The llama.cpp engine: one copy of the weights, one context, several sequences, on the low-level bindings.

It keeps the weights mapped with adapters and evaluates only what the KV cache does not hold yet. Which entries those
are is the cache's knowledge, choosing tokens the sampler's; text, stop strings and timings are `generation`'s; how
several replies share the context is `together`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters, file_key
from edgetune.engine.backends import list_devices
from edgetune.engine.batch import Batch
from edgetune.engine.cache import KvCache, Slot, adapters_of
from edgetune.engine.candidates import read_logits
from edgetune.engine.choices import as_candidates
from edgetune.engine.draft import DraftModel, open_draft
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.interrupt import Stopped, interruptible
from edgetune.engine.loading import (
    LOGIT_ROWS,
    CacheType,
    FlashAttention,
    check_context,
    gpu_layers_for,
    load_model,
    open_context,
)
from edgetune.engine.mapped_file import MappedFile
from edgetune.engine.memory import kv_bytes_per_token
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.speculation import NgramDrafter, Speculation, StepCosts
from edgetune.engine.state_file import read_state_file, write_state_file
from edgetune.engine.tap import Tap
from edgetune.engine.together import run_together
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header
from edgetune.errors import CorruptFileError, UsageError
from edgetune.gguf_header import GgufHeader

_ABORTED = 2


class LlamaEngine:
    """A loaded model; see `protocol.Engine`."""

    def __init__(self, header: GgufHeader, file: MappedFile, model: Any, context: Any, *, identity: str) -> None:
        """Take over all of them; use `open`. `identity` names what decides the numbers in the KV cache."""
        self._header, self._file, self._model, self._context = header, file, model, context
        self._identity = identity
        # A small context makes llama.cpp take smaller batches than asked for.
        self._batch_size: int = lib.llama_n_batch(context)
        self._batch = Batch(self._batch_size)
        self._vocab = lib.llama_model_get_vocab(model)
        self._lora = LoadedAdapters(model, header)
        self._adapters: tuple[LoraSpec, ...] = ()
        self._adapter_key: AdapterKey = ()
        self._peeked: tuple[Slot, int] | None = None
        self._draft: DraftModel | None = None
        self._draft_ngrams = False
        self._bytes_per_token, self._is_on_gpu = 0, False
        self.cache = KvCache(context, window=lib.llama_model_n_swa(model))
        """What the context holds."""
        self.costs = StepCosts()
        """What evaluations of a few tokens take here."""
        self.tokenizer = GgufTokenizer(self._vocab, header)
        """The model's vocabulary."""
        self.context_size: int = lib.llama_n_ctx(context)
        """How many tokens prompt and reply may have together."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        ctx_size: int = 0,
        gpu_layers: int = -1,
        threads: int = 0,
        batch_size: int = 512,
        cache_type_k: CacheType = "f16",
        cache_type_v: CacheType = "f16",
        flash_attn: FlashAttention = "auto",
        lora: Sequence[LoraSpec] = (),
        draft: str = "",
        tap: Tap | None = None,
        verbose: bool = False,
    ) -> LlamaEngine:
        """Load the GGUF model at `path`.

        `ctx_size` 0 is the model's own context, or what memory allows; `gpu_layers` -1 is all that fit; `threads` 0 is
        the number of physical cores; `draft` is "ngram" or the path of a smaller model with the same vocabulary, to
        guess tokens with; `tap` looks into the graph and must outlive the engine. Raises `CorruptFileError`,
        `UnsupportedError`, `ResourceError`, `MismatchError`.
        """
        header = load_header(path)
        check_is_model(header)
        native.start(verbose=verbose)
        kv_bytes = kv_bytes_per_token(header, type_k=cache_type_k, type_v=cache_type_v)
        gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
        ctx_size = check_context(header, ctx_size, kv_bytes, gpus)
        key = file_key(path)
        gpu_layers = gpu_layers_for(header, gpu_layers, kv_bytes * ctx_size, gpus)
        file = MappedFile(path)
        try:
            model = load_model(path, header, gpu_layers=gpu_layers)
        except BaseException:
            file.close()
            raise
        file.watch()
        try:
            context = open_context(
                model,
                path,
                ctx_size=ctx_size,
                threads=threads,
                batch_size=max(batch_size, LOGIT_ROWS),
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                flash_attn=flash_attn,
                eval_callback=tap.callback if tap else None,
            )
        except BaseException:
            file.close()
            lib.llama_model_free(model)
            raise
        identity = f"{key} {cache_type_k} {cache_type_v} {flash_attn} {native.version()}"
        engine = cls(header, file, model, context, identity=identity)
        engine._bytes_per_token, engine._is_on_gpu = int(kv_bytes), bool(gpus and gpu_layers)
        try:
            engine.set_adapters(lora)
            engine._draft_ngrams = draft == "ngram"
            if draft and not engine._draft_ngrams:
                engine._draft = open_draft(Path(draft), engine, threads=threads, gpu_layers=gpu_layers)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._header.path

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """The adapters applied now."""
        return self._adapters

    @property
    def trained_context(self) -> int:
        """The longest text the model was trained on, in tokens."""
        return int(lib.llama_model_n_ctx_train(self._model))

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens of the sequence used last, where they were evaluated under the adapters of now."""
        latest = self.cache.latest
        return tuple(latest.ids) if adapters_of(latest) == self._adapter_key else ()

    @property
    def cached_tokens(self) -> int:
        """How many tokens `cached_ids` are."""
        return len(self.cached_ids)

    @property
    def memory(self) -> EngineMemory:
        """What the model takes."""
        weights, per_token = int(lib.llama_model_size(self._model)), self._bytes_per_token
        return EngineMemory(weights=weights, context=per_token * self.context_size, per_token=per_token)

    @property
    def is_on_gpu(self) -> bool:
        """Whether any layer is computed on a GPU."""
        return self._is_on_gpu

    @property
    def can_go_back(self) -> bool:
        """Whether single tokens can be taken out of the KV cache again; recurrent models cannot."""
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    def close(self) -> None:
        """Free the model, its context and its adapters."""
        if self._draft is not None:
            self._draft.close()
            self._draft = None
        if self._context is not None:
            self._file.close()
            lib.llama_free(self._context)
            lib.llama_model_free(self._model)
            self._context = self._model = None
            self.tokenizer.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_adapters(self, adapters: Sequence[LoraSpec | tuple[Path, float]]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off.

        Raises `MismatchError` or `UnsupportedError` for one that does not fit the model; the set then stays as it was.
        """
        wanted = [adapter if isinstance(adapter, LoraSpec) else LoraSpec(*adapter) for adapter in adapters]
        self._check_open()
        key = self._lora.load(wanted)
        self._lora.apply(self._context, key)
        self._adapters, self._adapter_key = tuple(wanted), key

    def forget(self) -> None:
        """Empty the KV cache."""
        self.cache.clear()
        self._peeked = None

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
    ) -> LlamaGeneration:
        """Continue the prompt `ids`: iterate over the result for text; see `protocol.Engine`.

        Raises `UsageError` when the prompt is empty or does not fit into the context.
        """
        self._check_open()
        self._check_prompt([*ids, *prefix], room_for=1)
        return LlamaGeneration(
            self,
            self.build_sampler(sampling, [*ids, *prefix]),
            list(ids),
            adapters=self._adapter_key if adapters is None else self._lora.load(adapters),
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
            shift=shift,
            speculation=self._speculation(),
        )

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies side by side; see `protocol.Engine`."""
        return run_together(self, [one for one in generations if isinstance(one, LlamaGeneration)])

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if self._peeked is None or self._context is None:
            return ()
        slot, row = self._peeked
        sampler = self.build_sampler(sampling, slot.ids)
        try:
            seen = sampler.peek(self._context, row, top)
        finally:
            sampler.close()
        return as_candidates(seen, self.tokenizer.piece) if seen else ()

    def save_state(self, path: Path) -> None:
        """Keep the KV cache of the sequence used last in a file. Raises `UsageError` when it is empty."""
        self._check_open()
        slot = self.cache.latest
        if not slot.ids:
            raise UsageError("Nothing was evaluated yet, so there is no state to keep.")
        write_state_file(path, self._identity_under(slot.key), slot.ids, self.cache.read_state(slot))

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Take up a kept KV cache where it is the beginning of `ids`; returns how many tokens of it that are."""
        self._check_open()
        found = read_state_file(path, self._identity_under(self._adapter_key))
        if found is None:
            return 0
        return self.cache.adopt(self._adapter_key, *found, wanted=ids)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after every token of `ids`, evaluated afresh; shape (tokens, vocabulary)."""
        rows = np.empty((len(ids), self.tokenizer.n_vocab), np.float32)
        for start, part in self.iter_logits(ids):
            rows[start : start + len(part)] = part
        return rows

    def iter_logits(self, ids: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `logits`, in parts: (position of the first row, rows); a part is only valid until the next one."""
        self._check_open()
        self._check_prompt(ids, room_for=0)
        self.forget()
        self._lora.apply(self._context, self._adapter_key)
        slot = self.cache.take(self._adapter_key, ids)
        try:
            rows = min(LOGIT_ROWS, self._batch_size)
            for start in range(0, len(ids), rows):
                chunk = ids[start : start + rows]
                self._decode([(slot, chunk)], every_output=True)
                pointer = lib.llama_get_logits(self._context)
                yield start, np.ctypeslib.as_array(pointer, (len(chunk), self.tokenizer.n_vocab))
        finally:
            self.cache.release(slot)
            self.forget()

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what these replies wait for: a single one's prompt, or the next tokens of several in one batch.

        They must have the same adapters. The outputs are valid until the next evaluation.
        """
        self._lora.apply(self._context, generations[0].adapters)
        parts = [(one.slot, one.pending) for one in generations if one.slot is not None]
        if not parts:
            self._begin(*generations)
            return
        for one, row in zip(generations, self._decode(parts, every_output=True), strict=True):
            one.row = row

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after output `row`, and with `top` what from; None when a grammar allows none."""
        if not top:
            return sampler.sample(self._context, row), None
        seen = sampler.sample_seen(self._context, row, top)
        return (seen.token if seen else None), seen

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a text that is `history` so far."""
        return Sampler(
            self._vocab, sampling, context_size=self.context_size, eog_ids=self.tokenizer.eog_ids, prompt=history
        )

    def release(self, slot: Slot) -> None:
        """The reply on `slot` has ended."""
        self.cache.release(slot)

    def drop_last(self, slot: Slot, count: int) -> None:
        """Take the last `count` tokens out of `slot`."""
        self.cache.truncate(slot, len(slot.ids) - count)

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the context has no room for one more token of each reply; `unsure` of its entries are guesses."""
        return self.cache.is_full(unsure=unsure)

    def guess_limit(self) -> int:
        """How many guesses the context has room for beside the tokens that are certain."""
        most = min(LOGIT_ROWS // 4, self._batch_size) - 1
        return max(0, min(self.cache.room() - self.cache.running, most))

    def _begin(self, generation: LlamaGeneration) -> None:
        """Take a sequence for `generation` and evaluate its prompt as far as the cache does not hold it."""
        ids = generation.pending
        slot = self.cache.take(generation.adapters, ids, shift=generation.shift)
        generation.slot = slot
        if generation.shift:
            self.cache.shift_towards(slot, ids)
        kept = generation.reused_tokens = self.cache.keep_prefix(slot, ids)
        if len(ids) - kept + self.cache.running > self.cache.room() + 1:
            raise UsageError(
                f"The text has {len(ids)} tokens; beside the other reply the context takes {self.cache.room() + kept}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        # Stopped in the middle, the rest stays unevaluated; the reply itself finds out that it was cancelled.
        with interruptible(self._context, lambda: generation.is_cancelled):
            for start in range(kept, len(ids), self._batch_size):
                chunk = ids[start : start + self._batch_size]
                (generation.row,) = self._decode([(slot, chunk)])
            self._check_output(generation.row)

    def _decode(self, parts: Sequence[tuple[Slot, Sequence[int]]], *, every_output: bool = False) -> list[int]:
        """Evaluate the parts in one batch; returns the row of each part's first output."""
        batch = self._batch
        batch.clear()
        rows = [batch.add(slot.number, len(slot.ids), ids, every_output=every_output) for slot, ids in parts]
        self._peeked = None
        native.forget_errors()
        began = time.perf_counter()
        code = lib.llama_decode(self._context, batch.raw)
        if self._file.is_lost:
            self.forget()
            self._file.check()
        if code == _ABORTED:
            for slot, _ in parts:
                self.cache.truncate(slot, len(slot.ids))
            raise Stopped
        if code:
            self.forget()
            raise native.failure("llama.cpp could not evaluate the text")
        if self._is_on_gpu:
            lib.llama_synchronize(self._context)
        if batch.raw.n_tokens <= LOGIT_ROWS // 4:
            self.costs.record(batch.raw.n_tokens, time.perf_counter() - began)
        for slot, ids in parts:
            slot.ids.extend(ids)
        self._peeked = (parts[-1][0], rows[-1])
        return rows

    def _check_open(self) -> None:
        if self._context is None:
            raise UsageError(f"{self.path} was closed.", hint="Open it again.")
        self._file.check()

    def _check_output(self, row: int) -> None:
        if not np.isfinite(read_logits(self._context, row, self.tokenizer.n_vocab).max()):
            self.forget()
            raise CorruptFileError(
                f"{self.path} answers with what is no number, with {len(self._lora.applied)} adapters on it.",
                hint="Is one of the files damaged? Convert it again.",
            )

    def _speculation(self) -> Speculation | None:
        if not self.can_go_back or not (self._draft or self._draft_ngrams):
            return None
        return Speculation(self._draft or NgramDrafter(), self.costs)

    def _identity_under(self, adapters: object) -> str:
        return f"{self._identity} {adapters}"

    def _check_prompt(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if len(ids) + room_for > self.context_size:
            raise UsageError(
                f"The text has {len(ids)} tokens, the context {self.context_size}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        if wrong := [token for token in ids if not 0 <= token < self.tokenizer.n_vocab]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {self.tokenizer.n_vocab}.")
