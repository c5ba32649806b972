"""The reference side of distributions: the checkpoint in torch with PEFT's adapter, and the same model with noise.

The noise answers what a quant type may cost: weights are moved by as much as that type's rounding moves them, and the
distributions that result tell how much of a difference is owed to the type on this very model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import ResourceError, UnsupportedError
from edgetune.events import Progress, Sink
from edgetune.fingerprint import read_safetensors_header, safetensors_files

_POOL = 1_000_003
"""Noise values drawn; a prime, so that their repetition never falls in step with a matrix's rows."""
_HEADROOM = 1.3
"""Memory the model needs, as a multiple of its weights."""


class TorchModel:
    """A checkpoint, with an adapter or without, in evaluation."""

    def __init__(self, model: Any, dtype: str) -> None:
        self._model = model
        self._scales: dict[str, float] = {}
        self.dtype = dtype
        """"float32", or "bfloat16" where memory does not allow it."""

    @classmethod
    def load(
        cls,
        base_dir: Path,
        adapter_dir: Path | None,
        *,
        available_bytes: int,
        auto_class: str = "AutoModelForCausalLM",
    ) -> TorchModel:
        """Load the checkpoint at `base_dir` by transformers' `auto_class`, and PEFT's adapter on it.

        Raises `ImportError` without torch, transformers or PEFT, `ResourceError` when memory does not suffice,
        `UnsupportedError` for a model or adapter that they cannot load.
        """
        import torch
        import transformers

        dtype = _choose_dtype(parameter_count(base_dir), available_bytes)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = getattr(transformers, auto_class).from_pretrained(
                    base_dir,
                    dtype=getattr(torch, dtype),
                    attn_implementation="eager",
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
                if adapter_dir is not None:
                    model = _with_adapter(model, adapter_dir)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200].rstrip(".")
                what = f"{base_dir} with {adapter_dir}" if adapter_dir else str(base_dir)
                raise UnsupportedError(f"transformers cannot load {what}: {reason}.") from error
        return cls(model.eval(), dtype)

    def logits(self, sequences: Sequence[Sequence[int]], *, label: str, sink: Sink) -> list[NDArray[np.float32]]:
        """Logits of every sequence, each (tokens, vocabulary)."""
        return self._logits([{"input_ids": ids} for ids in sequences], label, sink)

    def target_logits(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, label: str, sink: Sink
    ) -> list[NDArray[np.float32]]:
        """An encoder-decoder's logits of every (source, target), each (target tokens, vocabulary)."""
        return self._logits(
            [{"input_ids": source, "decoder_input_ids": target} for source, target in pairs], label, sink
        )

    def _logits(self, inputs: Sequence[Mapping[str, Sequence[int]]], label: str, sink: Sink) -> list[Any]:
        import torch

        found: list[NDArray[np.float32]] = []
        sizes = [sum(map(len, one.values())) for one in inputs]
        for number, one in enumerate(inputs, 1):
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensors = {name: torch.tensor([list(ids)]) for name, ids in one.items()}
                found.append(self._model(**tensors, use_cache=False).logits[0].float().numpy())
            sink(Progress(label, sum(sizes[:number]), sum(sizes), "tokens", f"sequence {number}"))
        return found

    def without_adapter(self) -> AbstractContextManager[None]:
        """Switch PEFT's adapter off for the block's duration."""
        context: AbstractContextManager[None] = self._model.disable_adapter()
        return context

    @contextmanager
    def noise(self, levels: NoiseLevels, *, seed: int) -> Iterator[None]:
        """Add rounding-like noise to the matrices for the block's duration."""
        self._add_noise(levels, seed, sign=1.0)
        try:
            yield
        finally:
            self._add_noise(levels, seed, sign=-1.0)

    def _add_noise(self, levels: NoiseLevels, seed: int, *, sign: float) -> None:
        import torch

        pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        start = 0
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                if weight.ndim < 2:
                    continue
                level = levels.of(name, weight.shape[0])
                flat = weight.data.view(-1)
                # The same scale in both directions, though the noise itself has changed the weights meanwhile.
                scale = self._scales.setdefault(name, float(flat.float().pow(2).mean().sqrt())) * level * sign
                for begin in range(0, len(flat), _POOL):
                    part = flat[begin : begin + _POOL]
                    part += (torch.roll(pool, start)[: len(part)] * scale).to(part.dtype)
                start += 7919


class NoiseLevels:
    """Relative size of the noise: for the layers' matrices, for embedding and head, for the adapter's."""

    def __init__(self, *, layers: float, vocabulary: float, adapter: float, vocabulary_size: int) -> None:
        self.layers, self.vocabulary, self.adapter = layers, vocabulary, adapter
        self._vocabulary_size = vocabulary_size

    def of(self, name: str, rows: int) -> float:
        """The level of the parameter `name` with this many rows."""
        if ".lora_" in name:
            return self.adapter
        return self.vocabulary if rows >= self._vocabulary_size else self.layers


def parameter_count(base_dir: Path) -> int:
    """Numbers in the checkpoint's tensors."""
    headers = (read_safetensors_header(path)[0] for path in safetensors_files(base_dir))
    return sum(prod(entry["shape"]) for header in headers for entry in header.values())


def _choose_dtype(parameters: int, available_bytes: int) -> str:
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        if parameters * width * _HEADROOM < available_bytes:
            return dtype
    raise ResourceError(
        f"{parameters * 2 * _HEADROOM / 1e9:.1f} GB of memory are needed to run the model in torch, "
        f"{available_bytes / 1e9:.1f} GB are free.",
        hint="Close other programs, or convert with --no-verify.",
    )


def _with_adapter(model: Any, adapter_dir: Path) -> Any:
    import peft

    rows = _vocabulary_of_adapter(adapter_dir)
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(model, adapter_dir, torch_device="cpu")


def _vocabulary_of_adapter(adapter_dir: Path) -> int:
    """Rows of the embedding that the adapter brings along whole; 0 when it brings none."""
    path = adapter_dir / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    for name, entry in read_safetensors_header(path)[0].items():
        if "embed_tokens" in name and "lora_" not in name and len(entry["shape"]) == 2:
            return int(entry["shape"][0])
    return 0
