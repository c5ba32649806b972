"""PEFT adapter → GGUF adapter, with PEFT's exact meaning, or a refusal that says what the file format cannot hold.

llama.cpp adds (alpha / rank) · B @ A to a weight as it stands in the GGUF base, so every pair goes through its weight's
own operations. It knows one alpha for the whole file: where the true scales differ, they are folded into B and alpha is
0, which llama.cpp reads as "no scaling". Nothing here changes a base; see `merge` for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.adapter_config import AdapterConfig, read_adapter_config
from converters.adapter_head import TrainedHead, adapted_family, head_loader
from converters.adapter_weights import AdapterFile, AdapterWeights, Lora, Pair, read_adapter_weights
from converters.base import EMBEDDING, HEAD, Family, Target, find_family
from converters.checkpoint import Checkpoint, SafetensorsCheckpoint, load_float32
from converters.config import read_config
from converters.encoding import Q8_0_BLOCK, OutOfRange, TensorType, encode
from converters.errors import ConverterError, UnsupportedAdapter
from converters.head import Head, head_metadata
from converters.layout import GgufModel
from converters.plan import plan
from converters.sentence_transformers import read_sentence_model, transformer_dir
from converters.writer import GgufWriter, Value, planned_bytes

ADAPTER_OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What `convert_adapter` can write; "auto" is f16."""

OnTensor = Callable[[str, tuple[int, ...], int, int], None]

_TYPES = {
    "f32": TensorType.F32,
    "f16": TensorType.F16,
    "bf16": TensorType.BF16,
    "q8_0": TensorType.Q8_0,
    "auto": TensorType.F16,
}
_FILE_TYPES = {TensorType.F32: 0, TensorType.F16: 1, TensorType.Q8_0: 7, TensorType.BF16: 32}
_MERGE = "Merge it into the base instead: edgetune convert BASE --merge ADAPTER."
_ADAPTABLE = re.compile(
    r"token_embd\.weight|output\.weight|"
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down|gate_inp|gate_exps|up_exps|down_exps))\.weight|"
    r"(enc|dec)\.blk\.\d+\.((cross_)?attn_(q|k|v|o)|ffn_(gate|up|down))\.weight"
)
"""The tensors that llama.cpp's graphs read through `build_lora_mm`, `build_lora_mm_id` or `build_inp_embd`; it ignores
an adapter's change of any other, without a word."""
_F16_LOSS = 2.0**-10
"""Largest relative error (of the whole matrix) up to which a matrix is kept in float16."""


@dataclass
class _Pairs:
    """The LoRA pair of one GGUF tensor: one slot, or one for each expert."""

    name: str
    slots: dict[int | None, Lora]
    targets: dict[int | None, Target]
    stack: int
    """Experts in the GGUF tensor; 0 when it is no stack."""
    inputs: int
    outputs: int
    embedding: bool = False

    @property
    def rank(self) -> int:
        return max(lora.rank for lora in self.slots.values())

    @property
    def alphas(self) -> set[float]:
        """What `adapter.lora.alpha` would have to be for llama.cpp to arrive at each slot's scale."""
        return {lora.scale * self.rank for lora in self.slots.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stack = (self.stack,) if self.stack else ()
        a, b = (*stack, self.rank, self.inputs), (*stack, self.outputs, self.rank)
        if self.embedding:
            a, b = (self.outputs, self.rank), (self.inputs, self.rank)
        return {f"{self.name}.lora_a": a, f"{self.name}.lora_b": b}

    def matrices(self, *, fold: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """lora_a and lora_b as they lie in the file; `fold` multiplies B by the true scale."""
        pairs = {slot: self._transformed(slot, fold=fold) for slot in self.slots}
        if not self.stack:
            a, b = pairs[None]
            # llama.cpp looks token rows up in lora_a and multiplies them by lora_b: the other way round.
            return (b, np.ascontiguousarray(a.T)) if self.embedding else (a, b)
        stacked_a = np.zeros((self.stack, self.rank, self.inputs), np.float32)
        stacked_b = np.zeros((self.stack, self.outputs, self.rank), np.float32)
        for slot, (a, b) in pairs.items():
            stacked_a[slot, : a.shape[0]], stacked_b[slot, :, : b.shape[1]] = a, b
        return stacked_a, stacked_b

    def _transformed(self, slot: int | None, *, fold: bool) -> Pair:
        lora = self.slots[slot]
        a, b = lora.read()
        if fold:
            b = b * np.float32(lora.scale)
        for operation in self.targets[slot].operations:
            a, b = operation.apply_lora(a, b)
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


def convert_adapter(
    adapter_dir: Path,
    base: Path | GgufModel,
    out_path: Path,
    *,
    outtype: str = "f16",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    on_tensor: OnTensor | None = None,
    check_space: Callable[[int], None] | None = None,
    trained: TrainedHead | None = None,
) -> None:
    """Convert the PEFT adapter in `adapter_dir`, made for `base`, to the GGUF file `out_path`.

    `base` is the directory of a Hugging Face model, or what is known of a GGUF file that was trained on.
    The arguments are those of `convert_base`, which explains `trained` as well. Raises `ConverterError`:
    `CorruptCheckpoint` for broken files, `UnsupportedAdapter` for what a GGUF adapter cannot hold, with the reason.
    """
    if outtype not in ADAPTER_OUTTYPES:
        raise ConverterError(f"There is no output type {outtype!r}.", hint=f"Use one of {', '.join(ADAPTER_OUTTYPES)}.")
    wanted = _TYPES[outtype]
    config = read_adapter_config(adapter_dir)
    trained = trained or TrainedHead()
    values = base.values if isinstance(base, GgufModel) else read_config(transformer_dir(base))
    family = adapted_family(values, config, AdapterFile(adapter_dir), trained)
    with base if isinstance(base, GgufModel) else SafetensorsCheckpoint(transformer_dir(base)) as checkpoint:
        outputs = {output.name: output.shape for output in plan(find_family(values), checkpoint)}
        weights = read_adapter_weights(adapter_dir, config, family)
        _refuse_more_than_lora(config, family, weights, checkpoint)
        head = {} if isinstance(base, GgufModel) else _head_keys(family, weights, checkpoint, base, trained)
    pairs = _collect(family, weights, outputs)
    alphas = set().union(*(one.alphas for one in pairs))
    fold = len(alphas) != 1 or 0.0 in alphas
    keys: dict[str, Value] = {
        "general.architecture": family.gguf_architecture,
        "general.type": "adapter",
        "general.name": adapter_dir.resolve().name,
        "general.file_type": _FILE_TYPES[wanted],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0 if fold else float(next(iter(alphas))),
        **head,
        **(metadata or {}),
    }
    types = {name: _wanted_type(family, one, wanted) for one in pairs for name in one.shapes()}
    _write(out_path, pairs, types, keys, fold, on_tensor, check_space)


def _head_keys(
    family: Family, weights: AdapterWeights, base: Checkpoint, base_dir: Path, trained: TrainedHead
) -> dict[str, Value]:
    """The keys of the head that replaces the base's while the adapter is on."""
    if family.is_classifier and family.head is not None:
        return head_metadata(family.head, head_loader(family, weights, base))
    if trained.task != "embedding" or not trained.pooling:
        return {}
    sentence = read_sentence_model(base_dir)
    if sentence is None:
        return head_metadata(Head("embedding", trained.pooling), weights.file.load)
    return head_metadata(replace(sentence.head_of(family.hidden), pooling=trained.pooling), sentence.load)


def _refuse_more_than_lora(config: AdapterConfig, family: Family, weights: AdapterWeights, base: Checkpoint) -> None:
    """A GGUF adapter holds LoRA pairs, and a head's values, and nothing else."""
    if config.values.get("use_dora") or any(lora.magnitude for lora in weights.loras.values()):
        raise UnsupportedAdapter("The adapter uses DoRA, which a GGUF adapter cannot hold.", hint=_MERGE)
    if weights.tokens:
        name = next(iter(weights.tokens))
        raise UnsupportedAdapter(
            f"The adapter trained rows of {name!r} (trainable_token_indices), which a GGUF adapter cannot hold.",
            hint=_MERGE,
        )
    for lora in weights.loras.values():
        if lora.bias and weights.file.load(lora.bias).any():
            raise UnsupportedAdapter(
                f"The adapter has a bias of its own on {lora.module!r} (lora_bias), which a GGUF adapter cannot hold.",
                hint=_MERGE,
            )
    sources = {family.canonical(name): name for name in base.names}
    for name, tensor in weights.replaced.items():
        if family.is_head_weight(name):
            continue
        _refuse_unless_equal(name, tensor, weights, base, sources.get(name) or _tied_source(family, name, sources))


def _tied_source(family: Family, name: str, sources: Mapping[str, str]) -> str | None:
    if family.tied and name in (family.head_name, family.embedding_name):
        return sources.get(family.embedding_name) or sources.get(family.head_name)
    return None


def _refuse_unless_equal(name: str, tensor: str, weights: AdapterWeights, base: Checkpoint, source: str | None) -> None:
    """PEFT saves embeddings that were not trained beside an adapter of them; those change nothing."""
    shape = weights.file.shape(tensor)
    if source is not None and shape == base.shape(source):
        if np.array_equal(weights.file.load(tensor), load_float32(base, source)):
            return
    elif source is not None and len(shape) == 2 and shape[1:] == base.shape(source)[1:]:
        more = shape[0] - base.shape(source)[0]
        change = f"{more} added to" if more > 0 else f"{-more} taken from"
        raise UnsupportedAdapter(
            f"The adapter comes with a vocabulary of its own ({change} the base's {base.shape(source)[0]} tokens), "
            "which a GGUF adapter cannot hold.",
            hint=_MERGE,
        )
    what = "a trained bias" if name.endswith(".bias") else "a whole trained tensor (modules_to_save)"
    raise UnsupportedAdapter(f"The adapter holds {what}, {name!r}, which a GGUF adapter cannot hold.", hint=_MERGE)


def _collect(family: Family, weights: AdapterWeights, outputs: Mapping[str, tuple[int, ...]]) -> list[_Pairs]:
    """The pairs by GGUF tensor, in the adapter's order."""
    found: dict[str, _Pairs] = {}
    for lora in weights.loras.values():
        for target in family.table[lora.weight].targets:
            _refuse_target(family, lora, target.name, outputs)
            shape = outputs[target.name]
            pairs = found.setdefault(
                target.name,
                _Pairs(
                    target.name,
                    {},
                    {},
                    stack=shape[0] if len(shape) == 3 else 0,
                    inputs=shape[-1],
                    outputs=shape[-2],
                    embedding=target.name == EMBEDDING,
                ),
            )
            pairs.slots[target.expert], pairs.targets[target.expert] = lora, target
    if not found:
        raise UnsupportedAdapter("The adapter holds no LoRA pairs.", hint=_MERGE)
    return list(found.values())


def _refuse_target(family: Family, lora: Lora, name: str, outputs: Mapping[str, tuple[int, ...]]) -> None:
    tied = family.writes_text and HEAD not in outputs
    if tied and name in (EMBEDDING, HEAD):
        part = "the token embedding" if name == EMBEDDING else "the output head"
        raise UnsupportedAdapter(
            f"The adapter changes {part} ({lora.module!r}) of a model whose head and embedding are one tensor; "
            "llama.cpp would change both, and aborts.",
            hint=_MERGE,
        )
    if not _ADAPTABLE.fullmatch(name):
        raise UnsupportedAdapter(
            f"The adapter changes {lora.module!r} ({name}), which llama.cpp reads without looking at adapters.",
            hint=_MERGE,
        )


def _write(
    out_path: Path,
    pairs: list[_Pairs],
    types: Mapping[str, TensorType],
    keys: Mapping[str, Value],
    fold: bool,
    on_tensor: OnTensor | None,
    check_space: Callable[[int], None] | None,
) -> None:
    shapes = {name: shape for one in pairs for name, shape in one.shapes().items()}
    if check_space is not None:
        kinds = [(name, shape, _row_type(types[name], shape)) for name, shape in shapes.items()]
        check_space(planned_bytes(keys, kinds))
    total = sum(int(np.prod(shape)) * 4 for shape in shapes.values())
    done = 0
    with GgufWriter(out_path) as writer:
        writer.begin(keys, shapes)
        for one in pairs:
            for name, matrix in zip(one.shapes(), one.matrices(fold=fold), strict=True):
                data, tensor_type = _encode(matrix, types[name])
                writer.write(data, writer.add(name, tensor_type))
                done += matrix.nbytes
                if on_tensor is not None:
                    on_tensor(name, matrix.shape, done, total)
        writer.finish()


def _wanted_type(family: Family, pairs: _Pairs, wanted: TensorType) -> TensorType:
    narrow = wanted is TensorType.F16 and re.fullmatch(family.not_float16, pairs.name)
    return TensorType.F32 if narrow else wanted


def _row_type(wanted: TensorType, shape: tuple[int, ...]) -> TensorType:
    """Rows of B are as short as the rank: too short for blocks, most of the time."""
    return TensorType.F16 if wanted is TensorType.Q8_0 and shape[-1] % Q8_0_BLOCK else wanted


def _encode(matrix: NDArray[np.float32], wanted: TensorType) -> tuple[NDArray[np.generic], TensorType]:
    """The matrix in `wanted`, or in float32 where float16's range would cost it more than its usual precision."""
    tensor_type = _row_type(wanted, matrix.shape)
    rows = matrix.reshape(-1, matrix.shape[-1])
    try:
        data = encode(rows, "F32", tensor_type)
    except OutOfRange:
        return rows, TensorType.F32
    if tensor_type is TensorType.F16:
        loss = np.linalg.norm(data.astype(np.float32) - rows)
        if loss > _F16_LOSS * np.linalg.norm(rows):
            return rows, TensorType.F32
    return data, tensor_type
