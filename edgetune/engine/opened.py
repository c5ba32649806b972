"""One model file opened by llama.cpp for chatting: its weights, a context, and what they take. Evaluates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.engine import native
from edgetune.engine.adapters import file_key
from edgetune.engine.backends import list_devices
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
from edgetune.engine.native import lib
from edgetune.engine.tokenizer import check_is_model, check_writes_text, load_header
from edgetune.errors import UsageError
from edgetune.gguf_header import GgufHeader


@dataclass
class OpenedModel:
    """llama.cpp's objects for a model, which are freed together."""

    header: GgufHeader
    file: MappedFile
    model: Any
    context: Any
    identity: str
    """What decides the numbers in the KV cache, adapters aside."""
    bytes_per_token: int
    """Of the KV cache."""
    is_on_gpu: bool
    """Whether any layer is computed on a GPU."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        ctx_size: int,
        gpu_layers: int,
        threads: int,
        batch_size: int,
        cache_type_k: CacheType,
        cache_type_v: CacheType,
        flash_attn: FlashAttention,
        eval_callback: Any,
        verbose: bool,
    ) -> OpenedModel:
        """Open `path`; see `LlamaEngine.open`, also for the errors."""
        header = load_header(path)
        check_is_model(header)
        check_writes_text(header)
        native.start(verbose=verbose)
        kv_bytes = kv_bytes_per_token(header, type_k=cache_type_k, type_v=cache_type_v)
        gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
        ctx_size = check_context(header, ctx_size, kv_bytes, gpus)
        gpu_layers = gpu_layers_for(header, gpu_layers, kv_bytes * ctx_size, gpus)
        identity = f"{file_key(path)} {cache_type_k} {cache_type_v} {flash_attn} {native.version()}"
        file = MappedFile(path)
        model = None
        try:
            model = load_model(path, header, gpu_layers=gpu_layers)
            file.watch()
            context = open_context(
                model,
                path,
                ctx_size=ctx_size,
                threads=threads,
                batch_size=max(batch_size, LOGIT_ROWS),
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                flash_attn=flash_attn,
                eval_callback=eval_callback,
            )
        except BaseException:
            file.close()
            if model is not None:
                lib.llama_model_free(model)
            raise
        return cls(header, file, model, context, identity, int(kv_bytes), bool(gpus and gpu_layers))

    @property
    def is_closed(self) -> bool:
        """Whether it was freed."""
        return self.context is None

    def check(self) -> None:
        """Raise `UsageError` when it was closed, `CorruptFileError` when its file is no longer what was opened."""
        if self.is_closed:
            raise UsageError(f"{self.header.path} was closed.", hint="Open it again.")
        self.file.check()

    def close(self) -> None:
        """Free all of it, adapters included, which belong to the model."""
        if not self.is_closed:
            self.file.close()
            lib.llama_free(self.context)
            lib.llama_model_free(self.model)
            self.context = self.model = None
