"""A GGUF file → a transformers model whose matrices stay in the file's blocks, proved against llama.cpp.

What a file does not say of its model's shape, transformers fills in; whether the result computes what llama.cpp does is
not believed but measured, on every load.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from edgetune.engine.llama import LlamaEngine
from edgetune.errors import MismatchError
from edgetune.export import locate_gguf_weights
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors
from edgetune.training.device import release_memory
from edgetune.training.gguf_base.fill import Filler
from edgetune.training.gguf_base.modules import InBlocks

LARGEST_KL = 0.01
"""Mean KL(llama.cpp ‖ torch) in nats up to which both certainly compute the same."""

_NOISE_FACTOR = 4.0
"""How many times the KL that rounded activations cause may be seen."""

PROBE = "The quick brown fox jumps over the lazy dog. In 1969, 3 people flew to the moon; 12 have walked on it since."
_PROBE_TOKENS = 48


def load_gguf_base(path: Path, config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The decoder in `path`, frozen, as the transformers model that `config` describes.

    Raises `UnsupportedError` for a family that cannot be used from a file, `CorruptFileError` for a file that lacks
    tensors or has some of another shape, `MismatchError` when torch and llama.cpp do not compute the same from it.
    """
    import transformers
    from accelerate import init_empty_weights

    header = read_gguf_header(path)
    tensors = GgufTensors(header)
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    places = locate_gguf_weights(header, config.to_dict(), list(model.state_dict()))
    Filler(path, tensors, places, dtype=torch.float32, device=device).fill(model)
    _take_rope_factors(model, tensors)
    model.requires_grad_(False)
    model = model.to(device)
    # In float32, as llama.cpp adds up; what bfloat16 loses is no sign of a wrong model.
    prove(model, path, header)
    release_memory(device)  # logits of the whole vocabulary leave holes behind
    for module in model.modules():
        if isinstance(module, InBlocks):
            module.dtype = dtype
    return model.to(dtype)


def _take_rope_factors(model: Any, tensors: GgufTensors) -> None:
    """Llama 3 slows some rotary pairs down. Files say so in a tensor, and configs read from their keys do not."""
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "rope_freqs.weight" not in tensors or settings.get("rope_type", "default") != "default":
        return
    factors = torch.from_numpy(tensors.read("rope_freqs.weight"))
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(speeds := getattr(module, name, None), torch.Tensor):
                setattr(module, name, speeds / factors.to(speeds))


def prove(model: Any, path: Path, header: GgufHeader) -> tuple[float, float]:
    """Mean KL(llama.cpp ‖ torch) on a short text, and its bound; raises `MismatchError` when it is above that.

    llama.cpp rounds activations to 8 bits before it multiplies; what such rounding does to this very model in torch
    says how much of a difference is owed to it.
    """
    with LlamaEngine.open(path, ctx_size=256, gpu_layers=0) as engine:
        ids = engine.tokenizer.encode(PROBE)[:_PROBE_TOKENS]
        expected = torch.from_numpy(engine.logits(ids)).log_softmax(-1)
    exact, rounded = (_log_probabilities(model, ids, rounds=rounds) for rounds in (False, True))
    kl, noise = float(divergence(expected, exact).mean()), float(divergence(exact, rounded).mean())
    bound = max(LARGEST_KL, _NOISE_FACTOR * noise)
    if not kl <= bound:
        raise MismatchError(
            f"torch does not compute from {path} what llama.cpp does (KL {kl:.2g}, {bound:.2g} is allowed): the "
            f"file does not say enough of its {header.architecture} model.",
            hint="Convert the model with edgetune, or train on the Hugging Face directory that it was made from.",
        )
    return kl, bound


def _log_probabilities(model: Any, ids: list[int], *, rounds: bool) -> torch.Tensor:
    """After every token of `ids`: (tokens, vocabulary)."""
    training = model.training
    model.eval()
    with torch.no_grad(), rounding(model) if rounds else nullcontext():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    model.train(training)
    result: torch.Tensor = logits.float().cpu().log_softmax(-1)
    return result


@contextmanager
def rounding(model: Any) -> Iterator[None]:
    """While it lasts, the model rounds what it multiplies with its blocks, as llama.cpp does."""
    layers = [module for module in model.modules() if isinstance(module, InBlocks)]
    for layer in layers:
        layer.rounds = True
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds = False


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first ‖ second) of log-probabilities (tokens, vocabulary), in nats: (tokens,)."""
    return (first.exp() * (first - second)).sum(-1)
