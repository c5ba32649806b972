"""Models that read: a name → an open encoder for vectors and labels; llama.cpp's, else torch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, UnsupportedError, UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.export import check_convertible, find_base_dir, load_run
from edgetune.gguf_header import read_gguf_header
from edgetune.library import check_pair_headers, classify, find_model
from edgetune.opening.files import choose_model
from edgetune.opening.torch_files import find_torch_files

if TYPE_CHECKING:
    from edgetune.engine.encoder import Encoder

_BESIDE_WEIGHTS = ("houlsby", "pfeiffer")
"""Methods whose adapters llama.cpp has no place for."""


def open_encoder(
    model: str,
    lora: Sequence[str] = (),
    *,
    engine: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    force: bool = False,
    sink: Sink = ignore,
    **llama_options: Any,
) -> Encoder:
    """Open `model` for vectors and labels, with the adapters `lora` (`FILE[:SCALE]`) and the heads they bring.

    `engine` is "llama", "torch", or "auto": llama.cpp where it can. `dtype` is torch's: "f32", "bf16" or "auto".
    `llama_options` (gpu_layers, flash_attn, verbose) are `open_llama_encoder`'s. Raises `UsageError` for what is not
    there, `UnsupportedError` for a model that has no vectors, `MismatchError` for an adapter of another base unless
    `force`.
    """
    if engine == "torch":
        return _open_torch(model, lora, force=force, dtype=dtype, threads=threads)
    if engine == "auto" and (reason := _what_llama_lacks(find_model(model))):
        sink(Notice(f"{reason} It runs in torch instead."))
        return _open_torch(model, lora, force=force, dtype=dtype, threads=threads)
    try:
        choice = choose_model(model, lora, sink=sink)
    except UnsupportedError as error:
        if engine == "llama" or not find_model(model).is_dir():
            raise
        sink(Notice(f"{error.message} It runs in torch instead."))
        return _open_torch(model, lora, force=force, dtype=dtype, threads=threads)
    from edgetune.engine.encoder_llama import open_llama_encoder

    for adapter in choice.lora:
        check_pair_headers(read_gguf_header(choice.base), read_gguf_header(adapter.path), force=force)
    return open_llama_encoder(choice.base, lora=choice.lora, threads=threads, **llama_options)


def _what_llama_lacks(path: Path) -> str:
    """Why llama.cpp cannot run the run's base; empty where it can, or where that shows later."""
    if classify(path) != "run":
        return ""
    try:
        base = find_base_dir(path)
    except EdgetuneError:
        return ""
    if (run := load_run(path)) and run.method in _BESIDE_WEIGHTS:
        return f"{path} has layers of its own between the model's, which a GGUF file does not hold."
    try:
        if base.is_dir():
            check_convertible(base)
    except UnsupportedError as error:
        return error.message
    return ""


def _open_torch(model: str, lora: Sequence[str], *, force: bool, dtype: str, threads: int) -> Encoder:
    files = find_torch_files(find_model(model), lora, force=force)
    adapters = [one for one in files.adapters if one.scale]
    if len(adapters) > 1:
        raise UsageError("In torch an encoder runs with one adapter.", hint="Leave out --engine torch, or all but one.")
    options: dict[str, Any] = {}
    if adapters:
        options = {"adapter_dir": adapters[0].path, "adapter_scale": adapters[0].scale}
    from edgetune.engine.torch.encoder import open_torch_encoder
    from edgetune.engine.torch.loading import require_torch

    require_torch()
    return open_torch_encoder(files.base, dtype=dtype, threads=threads, **options)  # type: ignore[arg-type]
