"""Engines: a model loaded and run, token by token. llama.cpp's is in `llama`; the seam for others is `protocol`.

The only home of llama.cpp's low-level bindings beside `quantize`. Knows nothing of conversations or front ends.
Models that turn texts into vectors or labels open with `open_encoder`:

    with open_encoder(Path("minilm-F16.gguf")) as encoder:
        vectors = encoder.embed(["a text", "another"])          # (2, dimensions), float32
    with open_encoder(Path("sentiment-F16.gguf"), lora=[LoraSpec(Path("adapter-F16.gguf"))]) as encoder:
        for found in encoder.classify(["a text", ("a question", "an answer")]):
            print(found.labels, found.scores)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.engine.encoder import Encoder


def open_encoder(path: Path, **options: Any) -> Encoder:
    """Open a GGUF model through llama.cpp, or a Hugging Face directory in torch, for vectors and labels.

    `options` are those of `encoder_llama.open_llama_encoder` (lora, threads, gpu_layers, flash_attn) and
    `torch.encoder.open_torch_encoder` (adapter_dir, dtype). Raises as they do.
    """
    if path.is_dir():
        from edgetune.engine.torch.encoder import open_torch_encoder

        return open_torch_encoder(path, **options)
    from edgetune.engine.encoder_llama import open_llama_encoder

    return open_llama_encoder(path, **options)
