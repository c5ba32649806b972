"""A base checkpoint with a PEFT adapter merged into it, read tensor by tensor in float32: W + scale · B @ A, and more.

What PEFT computes at run time is what is merged: LoRA and DoRA, whole trained modules and biases, trained token rows,
an enlarged vocabulary. A head that shares the embedding's values goes its own way when only one of them was adapted
(PEFT's own merge_and_unload would change both). Writes nothing; the base converter reads from here as from any
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.adapter_config import MERGE_WITH_PEFT, AdapterConfig, read_adapter_config
from converters.adapter_head import TrainedHead, adapted_family
from converters.adapter_weights import AdapterFile, AdapterWeights, Lora, Pair, is_transposed, read_adapter_weights
from converters.base import Family, find_family
from converters.checkpoint import Checkpoint, row_count, to_float32
from converters.errors import CorruptCheckpoint, UnsupportedAdapter

_ROWS_AT_ONCE = 1024
_PAIRS_KEPT = 2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class MergedModel:
    """What the base converter needs to write a base with an adapter merged into it."""

    checkpoint: Checkpoint
    family: Family
    tokenizer_dir: Path
    """Where the vocabulary is: the base's directory, or the adapter's when it brings its own."""


def merge_adapter(
    base: Checkpoint,
    adapter_dir: Path,
    *,
    base_dir: Path,
    values: Mapping[str, Any],
    trained: TrainedHead | None = None,
) -> MergedModel:
    """Merge the adapter in `adapter_dir` into the checkpoint `base`, whose config.json holds `values`.

    Raises `CorruptCheckpoint` for broken files, `UnsupportedAdapter` for an adapter that no weights can stand for.
    """
    config = read_adapter_config(adapter_dir)
    family = adapted_family(values, config, AdapterFile(adapter_dir), trained or TrainedHead())
    weights = read_adapter_weights(adapter_dir, config, family)
    sources = _sources(base, family)
    _share_replacements(config, family, weights, sources)
    vocabulary = _vocabulary(family, weights, sources, base)
    tokenizer_dir = base_dir
    if vocabulary != family.config.natural("vocab_size"):
        tokenizer_dir = _own_tokenizer(adapter_dir, vocabulary)
        family = find_family({**family.config, "vocab_size": vocabulary})
    return MergedModel(_Merged(base, family, config, weights, sources), family, tokenizer_dir)


def _sources(base: Checkpoint, family: Family) -> dict[str, str]:
    """Table name → the base checkpoint's name; a head that shares the embedding is there under both names."""
    sources = {canonical: name for name in base.names if (canonical := family.canonical(name)) in family.table}
    if family.tied:
        shared = sources.get(family.embedding_name) or sources.get(family.head_name)
        if shared is not None:
            sources.setdefault(family.embedding_name, shared)
            sources.setdefault(family.head_name, shared)
    return sources


def _vocabulary(family: Family, weights: AdapterWeights, sources: Mapping[str, str], base: Checkpoint) -> int:
    """How many rows the embedding has after the merge; the head must have as many."""
    rows = {}
    for name in (family.embedding_name, family.head_name):
        if name in weights.replaced:
            rows[name] = weights.file.shape(weights.replaced[name])[0]
        elif name in sources:
            rows[name] = base.shape(sources[name])[0]
    if len(set(rows.values())) > 1:
        text = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise UnsupportedAdapter(
            f"The adapter changes the vocabulary's size in one place only: {text} rows.",
            hint='Train with modules_to_save=["embed_tokens", "lm_head"], so that the adapter holds both.',
        )
    return next(iter(rows.values()), family.config.natural("vocab_size"))


def _own_tokenizer(adapter_dir: Path, vocabulary: int) -> Path:
    if any((adapter_dir / name).is_file() for name in _TOKENIZER_FILES):
        return adapter_dir
    raise UnsupportedAdapter(
        f"The adapter makes the vocabulary {vocabulary} entries long, but {adapter_dir} has no tokenizer for them.",
        hint=f"Save it there: tokenizer.save_pretrained({str(adapter_dir)!r}).",
    )


class _Merged:
    """The base's tensors with every change of the adapter applied; a `Checkpoint`."""

    def __init__(
        self,
        base: Checkpoint,
        family: Family,
        config: AdapterConfig,
        weights: AdapterWeights,
        sources: Mapping[str, str],
    ) -> None:
        self._base, self._family, self._weights = base, family, weights
        self._sources = dict(sources)
        self._biases = self._collect_biases()
        self._tokens = {name: _token_rows(config, name, weights) for name in weights.tokens}
        self._dora: dict[str, NDArray[np.float32]] = {}
        self._pairs: dict[str, Pair] = {}
        self._settle_head()
        others = [name for name in base.names if name not in self._sources.values()]
        self._others = {name: name for name in others}
        """What the family has no table entry for; passed through, for the plan to judge."""
        new = [name for name in weights.replaced if name not in self._sources and family.is_head_weight(name)]
        self._names = (*self._sources, *others, *new)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._weights.replaced:
            return self._weights.file.shape(self._weights.replaced[name])
        return self._base.shape(self._source(name))

    def dtype(self, name: str) -> str:
        if self._is_computed(name):
            return "F32"
        if name in self._weights.replaced:
            return self._weights.file.dtype(self._weights.replaced[name])
        return self._base.dtype(self._source(name))

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if not self._is_computed(name):
            return self._stored(name, start, stop)
        values = to_float32(self._stored(name, start, stop), self._stored_dtype(name))
        if name in self._weights.loras:
            values = self._adapted(self._weights.loras[name], name, values, start, stop)
        if name in self._biases:
            values = values + self._biases[name]
        if name in self._tokens:
            values = self._with_tokens(name, values, start, stop)
        return values

    def _is_computed(self, name: str) -> bool:
        return name in self._weights.loras or name in self._biases or name in self._tokens

    def _source(self, name: str) -> str:
        return self._sources.get(name) or self._others[name]

    def _stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name in self._weights.replaced:
            return self._weights.file.raw(self._weights.replaced[name], start, stop)
        return self._base.rows(self._source(name), start, stop)

    def _stored_dtype(self, name: str) -> str:
        if name in self._weights.replaced:
            return self._weights.file.dtype(self._weights.replaced[name])
        return self._base.dtype(self._source(name))

    def _adapted(
        self, lora: Lora, name: str, values: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        a, b = self._pair(lora, name)
        transposed = is_transposed(self._family, name)
        scale = np.float32(lora.scale)
        # (rows, in) of a weight kept as (out, in), or (rows, out) of one kept as (in, out)
        delta = (a[:, start:stop].T @ b.T) * scale if transposed else (b[start:stop] @ a) * scale
        merged = np.asarray(values + delta)
        if not lora.magnitude:
            return merged
        if transposed or lora.embedding:
            return np.asarray(merged * self._column_factors(lora, name))
        magnitude = self._weights.file.load(lora.magnitude).reshape(-1)[start:stop]
        return np.asarray(merged * (magnitude / np.linalg.norm(merged, axis=1))[:, None])

    def _pair(self, lora: Lora, name: str) -> Pair:
        # A weight is read in pieces, one weight after another: the last few pairs are all that is needed again.
        if name not in self._pairs:
            while len(self._pairs) >= _PAIRS_KEPT:
                self._pairs.pop(next(iter(self._pairs)), None)
            self._pairs[name] = lora.read()
        return self._pairs[name]

    def _column_factors(self, lora: Lora, name: str) -> NDArray[np.float32]:
        """DoRA's magnitude / norm where the norm runs over the stored rows; one pass over the whole tensor."""
        if name not in self._dora:
            plain = Lora(lora.module, lora.weight, lora.rank, lora.scale, lora.read, lora.embedding)
            rows = row_count(self.shape(name))
            squares = np.zeros(self.shape(name)[-1], np.float64)
            for start in range(0, rows, _ROWS_AT_ONCE):
                stop = min(rows, start + _ROWS_AT_ONCE)
                values = to_float32(self._stored(name, start, stop), self._stored_dtype(name))
                merged = self._adapted(plain, name, values, start, stop)
                squares += np.square(merged, dtype=np.float64).sum(axis=0)
            magnitude = self._weights.file.load(lora.magnitude).reshape(-1)
            self._dora[name] = (magnitude / np.sqrt(squares)).astype(np.float32)
        return self._dora[name]

    def _collect_biases(self) -> dict[str, NDArray[np.float32]]:
        biases = {}
        for lora in self._weights.loras.values():
            if not lora.bias:
                continue
            name = lora.weight.removesuffix(".weight") + ".bias"
            if name not in self._sources:
                raise UnsupportedAdapter(
                    f"The adapter adds a bias to {lora.module!r} (lora_bias), which has none in the base.",
                    hint="PEFT cannot merge it either; train without lora_bias.",
                )
            biases[name] = self._weights.file.load(lora.bias) * np.float32(lora.scale)
        return biases

    def _with_tokens(self, name: str, values: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        indices, rows = self._tokens[name]
        inside = (indices >= start) & (indices < stop)
        values = np.array(values)
        values[indices[inside] - start] = rows[inside]
        return values

    def _settle_head(self) -> None:
        """Where head and embedding are one tensor in the base, and still are, only one of them is there."""
        embedding, head = self._family.embedding_name, self._family.head_name
        if self._sources.get(embedding) != self._sources.get(head) or head not in self._sources:
            return
        if embedding in self._tokens:
            # PEFT ties the trained rows of a tied model, unless other rows were asked for on the head.
            self._tokens.setdefault(head, self._tokens[embedding])
        if not any(name in self._weights.replaced or self._is_computed(name) for name in (embedding, head)):
            del self._sources[head]


def _share_replacements(
    config: AdapterConfig, family: Family, weights: AdapterWeights, sources: Mapping[str, str]
) -> None:
    """Loaded into a tensor that head and embedding share, a replacement reaches both; a saved module is a copy."""
    names = (family.embedding_name, family.head_name)
    if not family.tied or sources.get(names[0]) != sources.get(names[1]):
        return
    for name, other in (names, names[::-1]):
        if name in weights.replaced and not _is_saved_module(config, name):
            weights.replaced.setdefault(other, weights.replaced[name])


def _is_saved_module(config: AdapterConfig, name: str) -> bool:
    module = name.removesuffix(".weight")
    return any(module == saved or module.endswith(f".{saved}") for saved in config.modules_to_save)


def _token_rows(
    config: AdapterConfig, name: str, weights: AdapterWeights
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    wanted = config.trainable_token_indices
    module = name.removesuffix(".weight")
    if isinstance(wanted, Mapping):
        wanted = next((value for key, value in wanted.items() if module == key or module.endswith(f".{key}")), None)
        wanted = wanted or next(iter(config.trainable_token_indices.values()), None)  # type: ignore[union-attr]
    rows = weights.file.load(weights.tokens[name])
    if not isinstance(wanted, list) or len(wanted) != len(rows):
        raise CorruptCheckpoint(
            f"{weights.file.path} holds {len(rows)} trained rows of {name!r}, adapter_config.json names "
            f"{len(wanted) if isinstance(wanted, list) else 'none'}.",
            hint=MERGE_WITH_PEFT,
        )
    return np.asarray(wanted, np.int64), rows
