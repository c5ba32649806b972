"""A GGUF file → a transformers model whose matrices stay in the file's blocks, proved against llama.cpp.

What a file does not say of its model's shape, transformers fills in; whether the result computes what llama.cpp does is
not believed but measured, on every load.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.engine.llama import LlamaEngine
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError
from edgetune.export import locate_gguf_weights
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors
from edgetune.training.device import release_memory
from edgetune.training.gguf_base.blocks import Blocks, join
from edgetune.training.gguf_base.modules import BlockEmbedding, BlockLinear

LARGEST_KL = 0.01
"""Mean KL(llama.cpp ‖ torch) in nats up to which both certainly compute the same."""

_NOISE_FACTOR = 4.0
"""How many times the KL that rounded activations cause may be seen."""

PROBE = "The quick brown fox jumps over the lazy dog. In 1969, 3 people flew to the moon; 12 have walked on it since."
_PROBE_TOKENS = 48


def load_gguf_base(path: Path, config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The decoder in `path`, frozen, as the transformers model that `config` describes.

    Raises `UnsupportedError` for a family that cannot be used from a file, `CorruptFileError` for one that lacks
    tensors, `MismatchError` when torch and llama.cpp do not compute the same from it.
    """
    import transformers
    from accelerate import init_empty_weights

    header = read_gguf_header(path)
    tensors = GgufTensors(header)
    places = locate_gguf_weights(header, config.to_dict())
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    _Filler(tensors, places, torch.float32, device).fill(model, path)
    _take_rope_factors(model, tensors)
    model.requires_grad_(False)
    model = model.to(device)
    # In float32, as llama.cpp adds up; what bfloat16 loses is no sign of a wrong model.
    prove(model, path, header)
    release_memory(device)  # logits of the whole vocabulary leave holes behind
    for module in model.modules():
        if isinstance(module, BlockLinear | BlockEmbedding):
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


class _Filler:
    """Puts the file's weights into an empty model."""

    def __init__(
        self, tensors: GgufTensors, places: Mapping[str, Sequence[Any]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tensors, self.places, self.dtype, self.device = tensors, places, dtype, device

    def fill(self, model: Any, path: Path) -> None:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and self._name_of(model, head) + ".weight" not in self.places
        for name, module in list(model.named_modules()):
            if module is embedding:
                scale = float(getattr(module, "embed_scale", 1.0))
                table = self._blocks(f"{name}.weight")
                self._replace(model, name, BlockEmbedding(table, scale=scale, dtype=self.dtype, device=self.device))
                if tied:
                    linear = BlockLinear(table, None, dtype=self.dtype, device=self.device)
                    self._replace(model, self._name_of(model, head), linear)
            elif type(module) is torch.nn.Linear and f"{name}.weight" in self.places:
                bias = self._vector(f"{name}.bias") if module.bias is not None else None
                linear = BlockLinear(self._blocks(f"{name}.weight"), bias, dtype=self.dtype, device=self.device)
                self._replace(model, name, linear)
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                self._replace(model, name, self._parameter(name, parameter, path))

    def _parameter(self, name: str, parameter: torch.Tensor, path: Path) -> torch.nn.Parameter:
        if name not in self.places or len(parameter.shape) > 1:
            raise UnsupportedError(
                f"{name} of the model in {path} is neither a linear layer's nor an embedding's, and is not used from a "
                "GGUF file's blocks.",
                hint="Train on the Hugging Face directory that it was made from.",
            )
        values = self._vector(name)
        if values.shape != parameter.shape:
            raise CorruptFileError(f"{name} in {path} has {len(values)} numbers instead of {len(parameter)}.")
        return torch.nn.Parameter(values.to(self.device, self.dtype), requires_grad=False)

    def _blocks(self, name: str) -> Blocks:
        parts = []
        for piece in self.places[name]:
            if piece.factor != 1.0:
                raise UnsupportedError(f"{name} was rescaled on its way into the file, and is not used from there.")
            raw = self.tensors.raw(piece.tensor)
            raw = raw if piece.rows is None else raw[piece.rows]
            parts.append(Blocks(raw, self.tensors.type(piece.tensor), self.tensors.shape(piece.tensor)[-1]))
        return join(parts)

    def _vector(self, name: str) -> torch.Tensor:
        parts = []
        for piece in self.places[name]:
            values = self.tensors.read(piece.tensor).reshape(-1)
            values = values if piece.rows is None else values[piece.rows]
            parts.append(values * np.float32(piece.factor) + np.float32(piece.add))
        return torch.from_numpy(np.concatenate(parts))

    @staticmethod
    def _name_of(model: Any, wanted: Any) -> str:
        return next(str(name) for name, module in model.named_modules() if module is wanted)

    @staticmethod
    def _replace(model: Any, name: str, value: Any) -> None:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, value)


def prove(model: Any, path: Path, header: GgufHeader) -> tuple[float, float]:
    """Mean KL(llama.cpp ‖ torch) on a short text, and its bound; raises `MismatchError` when it is above that.

    llama.cpp rounds activations to 8 bits before it multiplies; what such rounding does to this very model in torch
    says how much of a difference is owed to it.
    """
    with LlamaEngine.open(path, ctx_size=256, gpu_layers=0) as engine:
        ids = engine.tokenizer.encode(PROBE)[:_PROBE_TOKENS]
        expected = torch.from_numpy(engine.logits(ids)).log_softmax(-1)
    layers = [module for module in model.modules() if isinstance(module, BlockLinear)]
    exact, rounded = (_log_probabilities(model, layers, ids, rounds=rounds) for rounds in (False, True))
    kl, noise = float(divergence(expected, exact).mean()), float(divergence(exact, rounded).mean())
    bound = max(LARGEST_KL, _NOISE_FACTOR * noise)
    if not kl <= bound:
        raise MismatchError(
            f"torch does not compute from {path} what llama.cpp does (KL {kl:.2g}, {bound:.2g} is allowed): the "
            f"file does not say enough of its {header.architecture} model.",
            hint="Convert the model with edgetune, or train on the Hugging Face directory that it was made from.",
        )
    return kl, bound


def _log_probabilities(model: Any, layers: Sequence[BlockLinear], ids: list[int], *, rounds: bool) -> torch.Tensor:
    """After every token of `ids`: (tokens, vocabulary)."""
    training = model.training
    model.eval()
    for layer in layers:
        layer.rounds = rounds
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=layers[0].device), use_cache=False).logits[0]
    for layer in layers:
        layer.rounds = False
    model.train(training)
    result: torch.Tensor = logits.float().cpu().log_softmax(-1)
    return result


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first ‖ second) of log-probabilities (tokens, vocabulary), in nats: (tokens,)."""
    return (first.exp() * (first - second)).sum(-1)
