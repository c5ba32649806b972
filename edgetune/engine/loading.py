"""What it takes to open a model: its options, checks of memory before llama.cpp allocates any, and the native objects.

llama.cpp touches its whole KV cache when it makes it, so a context that does not fit is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgetune.engine import native
from edgetune.engine.backends import Device
from edgetune.engine.cache import SEQUENCES
from edgetune.engine.memory import BYTES_PER_VALUE, choose_context, layers_that_fit
from edgetune.engine.native import lib
from edgetune.engine.tokenizer import vocab_overrides
from edgetune.errors import ResourceError, UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader
from edgetune.hardware import available_memory, physical_cores, total_memory

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
FlashAttention = Literal["auto", "on", "off"]

CACHE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip
_PLAIN_TYPES = ("f32", "f16", "bf16")
FLASH_ATTENTION = {"auto": -1, "on": 1, "off": 0}
LOGIT_ROWS = 64
"""Positions whose logits one evaluation may return; bounds llama.cpp's output buffers."""


def load_weights(path: Path, header: GgufHeader, *, gpu_layers: int) -> Any:
    """The weights of a model of any kind, mapped from the file."""
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = gpu_layers
    overrides = vocab_overrides(header)
    parameters.kv_overrides = overrides
    native.forget_errors()
    model = lib.llama_model_load_from_file(native.path_bytes(path), parameters)
    if not model:
        raise native.failure(f"llama.cpp cannot load {path}")
    return model


def load_model(path: Path, header: GgufHeader, *, gpu_layers: int, has_encoder: bool = False) -> Any:
    """The weights of a model that writes, mapped from the file.

    Raises `UnsupportedError` for a model without a decoder, or with an encoder where none is expected.
    """
    model = load_weights(path, header, gpu_layers=gpu_layers)
    encodes, decodes = lib.llama_model_has_encoder(model), lib.llama_model_has_decoder(model)
    if not decodes or encodes != has_encoder:
        lib.llama_model_free(model)
        raise UnsupportedError(
            f"{path} is a {header.architecture} model, which does not continue a text token by token.",
            hint="It answers single texts: edgetune generate MODEL TEXT"
            if decodes and encodes
            else "Its vectors and labels: edgetune embed, edgetune classify",
        )
    return model


def open_context(
    model: Any,
    path: Path,
    *,
    ctx_size: int,
    threads: int,
    batch_size: int,
    cache_type_k: CacheType,
    cache_type_v: CacheType,
    flash_attn: FlashAttention,
    sequences: int = SEQUENCES,
    eval_callback: Any = None,
) -> Any:
    """A context of `model` with room for `ctx_size` tokens. Raises `ResourceError`, `UsageError`."""
    if flash_attn == "off" and cache_type_v not in _PLAIN_TYPES:
        raise UsageError(
            f"Values can only be cached as {cache_type_v} with flash attention.", hint="Leave out -fa off, or -ctv."
        )
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = ctx_size
    parameters.n_batch = parameters.n_ubatch = batch_size
    parameters.n_seq_max, parameters.kv_unified = sequences, True
    parameters.n_outputs_max = LOGIT_ROWS
    parameters.n_threads = parameters.n_threads_batch = threads or physical_cores()
    parameters.swa_full = False
    parameters.no_perf = True
    parameters.type_k, parameters.type_v = CACHE_TYPES[cache_type_k], CACHE_TYPES[cache_type_v]
    parameters.flash_attn_type = FLASH_ATTENTION[flash_attn]
    if eval_callback is not None:
        parameters.cb_eval = eval_callback
    native.forget_errors()
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        raise native.failure(f"llama.cpp cannot make a context of {ctx_size} tokens for {path}")
    return context


def check_context(header: GgufHeader, ctx_size: int, kv_bytes: float, gpus: Sequence[Device]) -> int:
    """The context to make when `ctx_size` is asked for. Raises `ResourceError` when memory does not allow it."""
    on_gpus = sum(gpu.free_bytes for gpu in gpus)
    if header.file_bytes > total_memory() + on_gpus:
        raise ResourceError(
            f"{header.path} takes {header.file_bytes / 1e9:.1f} GB; this machine has {total_memory() / 1e9:.1f} GB.",
            hint="Use a smaller quant type: edgetune quantize",
        )
    free = available_memory() + on_gpus
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


def gpu_layers_for(header: GgufHeader, gpu_layers: int, kv_bytes: float, gpus: Sequence[Device]) -> int:
    """How many layers go to the GPU when `gpu_layers` is asked for; -1 is all that fit."""
    if gpu_layers >= 0:
        return gpu_layers
    return layers_that_fit(header, kv_bytes, sum(gpu.free_bytes for gpu in gpus)) if gpus else 0


assert set(CACHE_TYPES) == set(BYTES_PER_VALUE)
