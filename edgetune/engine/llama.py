"""The llama.cpp engine: one model, one context, one sequence, on the low-level bindings.

It keeps the weights mapped with adapters, evaluates only what the KV cache does not hold yet, and never reuses entries
computed under another set of adapters. Tokenizing is the tokenizer's work, choosing tokens the sampler's; text, stop
strings and timings are `generation`'s.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgetune.adapter_fit import check_runnable
from edgetune.engine import native
from edgetune.engine.backends import Device, list_devices
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.memory import BYTES_PER_VALUE, choose_context, kv_bytes_per_token, layers_that_fit
from edgetune.engine.native import lib
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampler import Sampler
from edgetune.engine.sampling import Sampling
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header, vocab_overrides
from edgetune.errors import ResourceError, UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, read_gguf_header

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
FlashAttention = Literal["auto", "on", "off"]

_CACHE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip
_FLASH_ATTENTION = {"auto": -1, "on": 1, "off": 0}
_LOGIT_ROWS = 64
"""Positions whose logits one evaluation may return; bounds llama.cpp's output buffers."""
_NO_SLOT = 1


class LlamaEngine:
    """A loaded model; see `protocol.Engine`."""

    def __init__(self, header: GgufHeader, model: Any, context: Any, *, batch_size: int) -> None:
        """Take over `model` and `context`; use `open`."""
        self._header, self._model, self._context = header, model, context
        self._memory = lib.llama_get_memory(context)
        self._batch_size = batch_size
        self._window = lib.llama_model_n_swa(model)
        self._vocab = lib.llama_model_get_vocab(model)
        self._loaded: dict[tuple[Path, int, int], Any] = {}
        self._adapters: tuple[LoraSpec, ...] = ()
        self._adapter_key: tuple[Any, ...] = ()
        self._cached: list[int] = []
        self._single = (lib.llama_token * 1)()
        self._single_batch = lib.llama_batch_get_one(self._single, 1)
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
        verbose: bool = False,
    ) -> LlamaEngine:
        """Load the GGUF model at `path`.

        `ctx_size` 0 is the model's own context, or what memory allows; `gpu_layers` -1 is all that fit; `threads` 0 is
        the number of physical cores. Raises `CorruptFileError`, `UnsupportedError`, `ResourceError`.
        """
        header = load_header(path)
        check_is_model(header)
        native.start(verbose=verbose)
        kv_bytes = kv_bytes_per_token(header, type_k=cache_type_k, type_v=cache_type_v)
        gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
        ctx_size = _check_context(header, ctx_size, kv_bytes, gpus)
        model = _load_model(path, header, _gpu_layers(header, gpu_layers, kv_bytes * ctx_size, gpus))
        try:
            parameters = _context_parameters(ctx_size, threads or physical_cores(), batch_size)
            parameters.type_k, parameters.type_v = _CACHE_TYPES[cache_type_k], _CACHE_TYPES[cache_type_v]
            parameters.flash_attn_type = _FLASH_ATTENTION[flash_attn]
            native.forget_errors()
            context = lib.llama_init_from_model(model, parameters)
            if not context:
                raise native.failure(f"llama.cpp cannot make a context of {ctx_size} tokens for {path}")
        except BaseException:
            lib.llama_model_free(model)
            raise
        engine = cls(header, model, context, batch_size=batch_size)
        try:
            engine.set_adapters(lora)
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
    def cached_tokens(self) -> int:
        """How many tokens the KV cache holds."""
        return len(self._cached)

    def close(self) -> None:
        """Free the model, its context and its adapters."""
        if self._context is not None:
            lib.llama_free(self._context)
            # Adapters belong to the model and are freed with it.
            lib.llama_model_free(self._model)
            self._loaded.clear()
            self._context = self._model = None

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_adapters(self, adapters: Sequence[LoraSpec | tuple[Path, float]]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off.

        Raises `MismatchError` or `UnsupportedError` for one that does not fit the model; the set then stays as it was.
        """
        wanted = [adapter if isinstance(adapter, LoraSpec) else LoraSpec(*adapter) for adapter in adapters]
        active = [adapter for adapter in wanted if adapter.scale != 0]
        keys = [_file_key(adapter.path) for adapter in active]
        handles = [self._load_adapter(key) for key in keys]
        pointers = (lib.llama_adapter_lora_p_ctypes * max(len(handles), 1))(*handles)
        scales = (ctypes.c_float * max(len(active), 1))(*(adapter.scale for adapter in active))
        native.forget_errors()
        if lib.llama_set_adapters_lora(self._context, pointers, len(handles), scales):
            raise native.failure("llama.cpp refused the adapters")
        self._adapters = tuple(wanted)
        key = tuple(zip(keys, (adapter.scale for adapter in active), strict=True))
        if key != self._adapter_key:
            self._adapter_key = key
            self.forget()

    def forget(self) -> None:
        """Empty the KV cache."""
        lib.llama_memory_clear(self._memory, False)
        self._cached.clear()

    def generate(
        self, ids: Sequence[int], sampling: Sampling, *, max_tokens: int = -1, stop: Sequence[str] = ()
    ) -> LlamaGeneration:
        """Continue the prompt `ids`: iterate over the result for text; `max_tokens` -1 has no limit but the context.

        Raises `UsageError` when the prompt is empty or does not fit into the context.
        """
        self._check_prompt(ids, room_for=1)
        sampler = Sampler(
            self._vocab,
            sampling,
            context_size=self.context_size,
            eog_ids=self.tokenizer.eog_ids,
            prompt=ids,
        )
        return LlamaGeneration(self, sampler, list(ids), max_tokens=max_tokens, stop=stop)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after every token of `ids`, evaluated afresh; shape (tokens, vocabulary)."""
        rows = np.empty((len(ids), self.tokenizer.n_vocab), np.float32)
        for start, part in self.iter_logits(ids):
            rows[start : start + len(part)] = part
        return rows

    def iter_logits(self, ids: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `logits`, in parts: (position of the first row, rows); a part is only valid until the next one."""
        self._check_prompt(ids, room_for=0)
        self.forget()
        try:
            for start in range(0, len(ids), _LOGIT_ROWS):
                chunk = ids[start : start + _LOGIT_ROWS]
                self._decode(chunk, all_logits=True)
                pointer = lib.llama_get_logits(self._context)
                yield start, np.ctypeslib.as_array(pointer, (len(chunk), self.tokenizer.n_vocab))
        finally:
            self.forget()

    def evaluate(self, ids: Sequence[int]) -> int:
        """Make the KV cache hold exactly `ids`, the last one's logits ready; returns how many were there already."""
        kept = self._keep_prefix(ids)
        for start in range(kept, len(ids), self._batch_size):
            chunk = ids[start : start + self._batch_size]
            self._decode(chunk)
            self._cached.extend(chunk)
        return kept

    def evaluate_next(self, token: int) -> None:
        """Append one token to the KV cache; the hot path of generation."""
        self._single[0] = token
        if lib.llama_decode(self._context, self._single_batch):
            self._fail_decode()
        self._cached.append(token)

    def sample(self, sampler: Sampler) -> int | None:
        """Choose the next token from the last evaluation; None when a grammar allows none."""
        return sampler.sample(self._context)

    @property
    def is_full(self) -> bool:
        """Whether the context takes no further token."""
        return len(self._cached) >= self.context_size

    def _keep_prefix(self, ids: Sequence[int]) -> int:
        # The last token is always evaluated again: its logits are needed.
        kept = 0
        for mine, theirs in zip(self._cached, ids[:-1], strict=False):
            if mine != theirs:
                break
            kept += 1
        if kept and self._window:
            # A sliding-window cache has dropped what lies behind the window of its newest token; going back needs it.
            oldest = lib.llama_memory_seq_pos_min(self._memory, 0)
            kept = kept if 0 <= oldest <= max(0, kept - self._window) else 0
        # Also drops an entry that an interrupt kept from being recorded. Recurrent models cannot go back at all.
        if not kept or not lib.llama_memory_seq_rm(self._memory, 0, kept, -1):
            self.forget()
            return 0
        del self._cached[kept:]
        return kept

    def _decode(self, ids: Sequence[int], *, all_logits: bool = False) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)
        batch = lib.llama_batch_get_one(tokens, len(ids))
        if all_logits:
            flags = (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
            batch.logits = ctypes.cast(flags, ctypes.POINTER(ctypes.c_int8))
        native.forget_errors()
        if lib.llama_decode(self._context, batch):
            self._fail_decode()

    def _fail_decode(self) -> None:
        self.forget()
        raise native.failure("llama.cpp could not evaluate the text")

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

    def _load_adapter(self, key: tuple[Path, int, int]) -> Any:
        if key not in self._loaded:
            path = key[0]
            check_runnable(self._header, read_gguf_header(path))
            native.forget_errors()
            handle = lib.llama_adapter_lora_init(self._model, native.path_bytes(path))
            if not handle:
                raise native.failure(f"llama.cpp cannot load the adapter {path}")
            self._loaded[key] = handle
        return self._loaded[key]


def physical_cores() -> int:
    """Physical cores this process may run on, at least 1; more threads than that slow decoding down."""
    import psutil

    cores = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, allowed))


def _load_model(path: Path, header: GgufHeader, gpu_layers: int) -> Any:
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = gpu_layers
    overrides = vocab_overrides(header)
    parameters.kv_overrides = overrides
    native.forget_errors()
    model = lib.llama_model_load_from_file(native.path_bytes(path), parameters)
    if not model:
        raise native.failure(f"llama.cpp cannot load {path}")
    if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        lib.llama_model_free(model)
        raise UnsupportedError(
            f"{path} is a {header.architecture} model, which does not continue a text token by token.",
            hint="Chat and generate take decoder-only language models.",
        )
    return model


def _context_parameters(ctx_size: int, threads: int, batch_size: int) -> Any:
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = ctx_size
    parameters.n_batch = parameters.n_ubatch = max(batch_size, _LOGIT_ROWS)
    parameters.n_outputs_max = _LOGIT_ROWS
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.swa_full = False
    parameters.no_perf = True
    return parameters


def _check_context(header: GgufHeader, ctx_size: int, kv_bytes: float, gpus: Sequence[Device]) -> int:
    import psutil

    memory, on_gpus = psutil.virtual_memory(), sum(gpu.free_bytes for gpu in gpus)
    if header.file_bytes > memory.total + on_gpus:
        raise ResourceError(
            f"{header.path} takes {header.file_bytes / 1e9:.1f} GB; this machine has {memory.total / 1e9:.1f} GB.",
            hint="Use a smaller quant type: edgetune quantize",
        )
    free = memory.available + on_gpus
    if ctx_size <= 0:
        return choose_context(header, kv_bytes, free)
    # With sliding windows most layers keep a window only; how many do is llama.cpp's to know, and nearly all at most.
    kv_bytes /= 6 if header.number("attention.sliding_window") else 1
    if ctx_size * kv_bytes > free:
        raise ResourceError(
            f"A context of {ctx_size} tokens takes {ctx_size * kv_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
            hint="Take a smaller one with -c, or a smaller cache type with -ctk q8_0 -ctv q8_0.",
        )
    return ctx_size


def _gpu_layers(header: GgufHeader, gpu_layers: int, kv_bytes: float, gpus: Sequence[Device]) -> int:
    if gpu_layers >= 0:
        return gpu_layers
    return layers_that_fit(header, kv_bytes, sum(gpu.free_bytes for gpu in gpus)) if gpus else 0


def _file_key(path: Path) -> tuple[Path, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UsageError(f"There is no adapter {path}.", hint="Give the path of an adapter GGUF.") from error
    return path.resolve(), stat.st_mtime_ns, stat.st_size


assert set(_CACHE_TYPES) == set(BYTES_PER_VALUE)
