"""A PEFT adapter's tensors, matched to the weights of a base family: LoRA pairs, replaced tensors, trained token rows.

Every tensor of adapter_model.safetensors must find its place, and every module that the configuration targets must have
its pair; what remains is an error. Values are read when asked for. Decides nothing about what a GGUF adapter can hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.adapter_config import AdapterConfig
from converters.base import Family
from converters.checkpoint import STORAGE, read_header, to_float32
from converters.errors import CorruptCheckpoint, UnsupportedAdapter

WEIGHTS_NAME = "adapter_model.safetensors"

_AGAIN = "Save or download the adapter again."
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)\.(?P<what>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_TRAINING_ONLY = re.compile(r".+\.lora_velora_embed(\..+)?")
_WRAPPED = re.compile(r"\.(base_layer|token_adapter|modules_to_save)\b")
_UNUSED_COPY = re.compile(r".+\.original_module\..+")
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<slot>\d+)\.(?P<projection>[^.]+)\.weight")
_GATE, _UP, _DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Lora:
    """A low-rank change of one base weight, seen as (out, in): scale · B @ A."""

    module: str
    """The module's name in torch, e.g. "model.layers.0.self_attn.q_proj"."""
    weight: str
    """The base weight's name in the family's table."""
    rank: int
    scale: float
    read: Callable[[], Pair]
    """Reads A (rank, in) and B (out, rank); of an embedding, `out` are the tokens."""
    embedding: bool = False
    bias: str = ""
    """The adapter tensor added to the module's bias, times `scale`; empty when there is none."""
    magnitude: str = ""
    """The adapter tensor with DoRA's magnitudes; empty when there is none."""


@dataclass
class AdapterWeights:
    """Everything in an adapter's file, by the base weight it changes (names as in the family's table)."""

    file: AdapterFile
    loras: dict[str, Lora] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    """Base tensor → the adapter tensor that takes its place."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Embedding or head → the adapter tensor with the trained rows."""


class AdapterFile:
    """The tensors of one adapter_model.safetensors; opened anew for every read."""

    def __init__(self, adapter_dir: Path) -> None:
        """Raises `UnsupportedAdapter` for a pickle, `CorruptCheckpoint` for a missing or broken file."""
        self.path = adapter_dir / WEIGHTS_NAME
        if not self.path.is_file():
            if pickles := sorted(path.name for pattern in ("*.bin", "*.pt") for path in adapter_dir.glob(pattern)):
                raise UnsupportedAdapter(
                    f"{adapter_dir} holds its adapter as a pickle ({pickles[0]}), which can run code when loaded.",
                    hint="Load it with PEFT where you trust it; its save_pretrained() writes safetensors.",
                )
            raise CorruptCheckpoint(
                f"{adapter_dir} has no {WEIGHTS_NAME}.", hint="Point to a finished adapter directory."
            )
        header, self._data_start = read_header(self.path)
        if odd := next((name for name, (dtype, _, _) in header.items() if dtype not in STORAGE), None):
            raise UnsupportedAdapter(f"{self.path} holds {odd!r} as {header[odd][0]}, which is no plain number.")
        self._entries = header
        self.names = tuple(header)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> str:
        return self._entries[name][0]

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of a tensor seen as (product of the other axes, last axis), as stored (see `checkpoint.STORAGE`)."""
        dtype, shape, begin = self._entries[name]
        width = shape[-1] if shape else 1
        count = (stop - start) * width
        offset = self._data_start + begin + start * width * STORAGE[dtype].itemsize
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(count * STORAGE[dtype].itemsize)
        if len(data) != count * STORAGE[dtype].itemsize:
            raise CorruptCheckpoint(f"{self.path} ended while it was read.", hint=_AGAIN)
        return np.frombuffer(data, STORAGE[dtype]).reshape(stop - start, width)

    def load(self, name: str) -> NDArray[np.float32]:
        """A whole tensor in float32. Raises `CorruptCheckpoint` when it holds something that is no number."""
        shape = self.shape(name)
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        values = to_float32(self.raw(name, 0, rows), self.dtype(name)).reshape(shape)
        if not np.isfinite(values).all():
            raise CorruptCheckpoint(f"{self.path} holds infinite or undefined values in {name!r}.", hint=_AGAIN)
        return values


def read_adapter_weights(adapter_dir: Path, config: AdapterConfig, family: Family) -> AdapterWeights:
    """Match the tensors in `adapter_dir` to the weights of `family`.

    Raises `CorruptCheckpoint` for a broken file, half a pair or a missing module, `UnsupportedAdapter` for tensors that
    the base has no place for.
    """
    file = AdapterFile(adapter_dir)
    parts, weights = _sort(file, family)
    for module, found in parts.items():
        _complete(file, module, found)
        for lora in _loras(weights, config, family, module, found):
            weights.loras[lora.weight] = lora
    for changed in (*weights.loras, *weights.replaced, *weights.tokens):
        family.check_adapted(changed)
    _check_complete(config, family, weights)
    if not (weights.loras or weights.replaced or weights.tokens):
        raise CorruptCheckpoint(f"{file.path} holds no tensors.", hint=_AGAIN)
    return weights


def base_names(name: str) -> str:
    """What the base calls the tensor that an adapter's file calls `name`."""
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def table_name(family: Family, name: str) -> str | None:
    """The torch parameter `name` as the family's table spells it; None when the base has no such weight."""
    # transformers 5 renamed Mixtral's block; its checkpoints keep the old name.
    for spelling in (name, name.replace(".mlp.", ".block_sparse_moe.")):
        if (canonical := family.canonical(spelling)) in family.table:
            return canonical
    return None


def _sort(file: AdapterFile, family: Family) -> tuple[dict[str, dict[str, str]], AdapterWeights]:
    """Module → its parts ("A", "B", "embedding_A", …) → tensor; and everything that is not part of a pair."""
    parts: dict[str, dict[str, str]] = {}
    weights = AdapterWeights(file)
    left_over = []
    prefixed = any(name.startswith(_PREFIX) for name in file.names)
    for name in file.names:
        key = name.removeprefix(_PREFIX)
        if prefixed and key == name:
            left_over.append(name)
        elif match := _LORA.fullmatch(key):
            part = match["part"] if match["what"] == "weight" else f"bias_{match['part']}"
            parts.setdefault(match["module"], {})[part] = name
        elif match := _EMBEDDING.fullmatch(key):
            parts.setdefault(match["module"], {})[f"embedding_{match['part']}"] = name
        elif match := _MAGNITUDE.fullmatch(key):
            parts.setdefault(match["module"], {})["magnitude"] = name
        elif (match := _TOKENS.fullmatch(key)) and (base := table_name(family, f"{match['module']}.weight")):
            weights.tokens[base] = name
        elif base := table_name(family, plain := _WRAPPED.sub("", key)):
            # A saved module may be there twice, under its own name and under the wrapper's; PEFT loads the first.
            if base not in weights.replaced or plain == key:
                weights.replaced[base] = name
        elif not (_TRAINING_ONLY.fullmatch(key) or _UNUSED_COPY.fullmatch(key)):
            left_over.append(name)
    if left_over:
        raise _no_place(left_over, family)
    return parts, weights


def _no_place(names: list[str], family: Family) -> UnsupportedAdapter:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return UnsupportedAdapter(
        f"The adapter holds the tensor {names[0]!r}{more}, which {family.architectures[0]} has no place for.",
        hint="Check that this is the base it was trained on; name another with --base.",
    )


def _complete(file: AdapterFile, module: str, found: Mapping[str, str]) -> None:
    kinds = {"A", "B"} if {"A", "B"} & found.keys() else {"embedding_A", "embedding_B"}
    if missing := sorted(kinds - found.keys()):
        half = missing[0].replace("embedding_", "lora_embedding_") if "_" in missing[0] else f"lora_{missing[0]}"
        raise CorruptCheckpoint(f"{file.path} lacks {half} of {module!r}.", hint=_AGAIN)
    allowed = kinds | {"magnitude", "bias_B"}
    if extra := sorted(found.keys() - allowed):
        raise CorruptCheckpoint(f"{file.path} holds {found[extra[0]]!r}, which belongs to no LoRA layer.", hint=_AGAIN)
    for kind in kinds:
        if len(file.shape(found[kind])) != 2 or 0 in file.shape(found[kind]):
            raise CorruptCheckpoint(
                f"{file.path} holds {found[kind]!r} of shape {file.shape(found[kind])}, not a matrix.", hint=_AGAIN
            )


def _loras(
    weights: AdapterWeights, config: AdapterConfig, family: Family, module: str, found: Mapping[str, str]
) -> Iterator[Lora]:
    if weight := table_name(family, f"{module}.weight"):
        yield _lora(weights, config, family, module, weight, found)
    elif re.sub(r"(\.base_layer)+$", "", module).endswith(".experts"):
        yield from _expert_loras(weights.file, config, family, module, found)
    else:
        raise _no_place([next(iter(found.values()))], family)


def _lora(
    weights: AdapterWeights, config: AdapterConfig, family: Family, module: str, weight: str, found: Mapping[str, str]
) -> Lora:
    file = weights.file
    key = _pattern_key(config, family, module, weight)
    embedding = "embedding_A" in found
    a_name, b_name = (found["embedding_A"], found["embedding_B"]) if embedding else (found["A"], found["B"])
    rank = config.rank(key)
    _check_rank(file, a_name, b_name, rank)

    def read() -> Pair:
        a, b = file.load(a_name), file.load(b_name)
        return (b.T, a.T) if embedding else (a, b)

    outputs = file.shape(a_name)[1] if embedding else file.shape(b_name)[0]
    inputs = file.shape(b_name)[0] if embedding else file.shape(a_name)[1]
    if weight in weights.replaced and (outputs, inputs) != family.table[weight].shape:
        _check_equal_shapes(module, (outputs, inputs), file.shape(weights.replaced[weight]))
    else:
        _check_shape(family, module, weight, (outputs, inputs))
    return Lora(
        module, weight, rank, config.scaling(key), read, embedding, found.get("bias_B", ""), found.get("magnitude", "")
    )


def _pattern_key(config: AdapterConfig, family: Family, module: str, weight: str) -> str:
    """What PEFT matches rank and alpha patterns with: the module's name, or the parameter's where that is targeted."""
    # With ensure_weight_tying a tied head is adapted along with the embedding, named or not.
    tied = config.ensure_weight_tying and family.tied and weight == family.head_name
    if tied or config.targets(module):
        return module
    if _ends_with_any(f"{module}.weight", config.target_parameters):
        return f"{module}.weight"
    raise UnsupportedAdapter(
        f"The adapter holds tensors of {module!r}, which target_modules leaves out; PEFT would not use them.",
        hint="Use the adapter_config.json that was saved with these tensors.",
    )


def _is_expert(weight: str) -> bool:
    return _EXPERT.fullmatch(weight) is not None


def _check_rank(file: AdapterFile, a_name: str, b_name: str, rank: int, experts: int = 1) -> None:
    for name, axis in ((a_name, 0), (b_name, 1)):
        if file.shape(name)[axis] != rank * experts:
            raise CorruptCheckpoint(
                f"{file.path} holds {name!r} with rank {file.shape(name)[axis] // experts}; "
                f"adapter_config.json makes it {rank}.",
                hint="Use the adapter_config.json that was saved with these tensors.",
            )


def _check_shape(family: Family, module: str, weight: str, shape: tuple[int, int]) -> None:
    base = family.table[weight].shape
    _check_equal_shapes(module, shape, base[::-1] if is_transposed(family, weight) else base)


def _check_equal_shapes(module: str, shape: tuple[int, int], base: tuple[int, ...]) -> None:
    if shape != base:
        text = " x ".join(map(str, shape))
        raise UnsupportedAdapter(
            f"The adapter's {module!r} is made for a weight of {text}, the base has {' x '.join(map(str, base))}.",
            hint="This is not the base the adapter was trained on; name the right one with --base.",
        )


def is_transposed(family: Family, weight: str) -> bool:
    """Whether torch keeps the weight as (in, out): GPT-2's Conv1D."""
    from converters.operations import Transpose

    return any(isinstance(one, Transpose) for target in family.table[weight].targets for one in target.operations)


def _expert_loras(
    file: AdapterFile,
    config: AdapterConfig,
    family: Family,
    module: str,
    found: Mapping[str, str],
) -> Iterator[Lora]:
    """LoRA on transformers 5's stacked expert parameters (PEFT's `target_parameters`), an expert at a time.

    Nested wrappers, one for each parameter: the first parameter's is innermost. A is (experts · rank, in), experts
    outermost; B is (out, rank · experts), experts innermost.
    """
    block = re.sub(r"(\.base_layer)+$", "", module)
    targeted = [
        name for name in ("gate_up_proj", "down_proj") if _ends_with_any(f"{block}.{name}", config.target_parameters)
    ]
    depth = len(re.findall(r"\.base_layer", module.removeprefix(block)))
    outside_in = targeted[::-1]
    if depth >= len(outside_in):
        raise _no_place([next(iter(found.values()))], family)
    parameter = outside_in[depth]
    experts = _experts(family, block)
    slots = len({slot for slot, _ in experts})
    rank, scale = config.rank(f"{block}.{parameter}"), config.scaling(f"{block}.{parameter}")
    _check_rank(file, found["A"], found["B"], rank, slots)
    outputs, inputs = file.shape(found["B"])[0], file.shape(found["A"])[1]
    halves = [(_DOWN, 0, outputs)]
    if parameter == "gate_up_proj":
        halves = [(_GATE, 0, outputs // 2), (_UP, outputs // 2, outputs)]
    for (slot, projection), weight in experts.items():
        for names, start, stop in halves:
            if projection in names:
                _check_shape(family, module, weight, (stop - start, inputs))
                read = _expert_reader(file, found["A"], found["B"], slot, slots, rank, start, stop)
                yield Lora(f"{block}.{slot}.{projection}", weight, rank, scale, read)


def _experts(family: Family, block: str) -> dict[tuple[int, str], str]:
    """(slot, projection) → weight, of the experts that torch keeps in the module `block`."""
    blocks = {block.removesuffix(".experts"), block.removesuffix(".experts").replace(".mlp", ".block_sparse_moe")}
    found = {}
    for weight in family.table:
        if (match := _EXPERT.fullmatch(weight)) and match["block"] in blocks:
            found[int(match["slot"]), match["projection"]] = weight
    return found


def _expert_reader(
    file: AdapterFile, a_name: str, b_name: str, slot: int, slots: int, rank: int, start: int, stop: int
) -> Callable[[], Pair]:
    def read() -> Pair:
        a = to_float32(file.raw(a_name, slot * rank, (slot + 1) * rank), file.dtype(a_name))
        b = to_float32(file.raw(b_name, start, stop), file.dtype(b_name))
        return a, b.reshape(stop - start, rank, slots)[:, :, slot]

    return read


def _check_complete(config: AdapterConfig, family: Family, weights: AdapterWeights) -> None:
    """Every matrix of the base that PEFT would adapt must have its pair: a dropped one would be zero, silently."""
    named = config.values.get("exclude_modules")
    # What is left out by its full name has the body's name in front, which the base's own table need not have.
    excluded = {family.canonical(str(one)) for one in named} if isinstance(named, list) else set()
    for name, entry in family.table.items():
        module = name.removesuffix(".weight")
        if len(entry.shape) != 2 or _is_expert(name) or name in weights.loras or module in excluded:
            continue
        if str(config.values.get("target_modules", "")).lower() == "all-linear":
            continue
        if config.targets(module) and not (family.tied and name == family.head_name):
            raise CorruptCheckpoint(
                f"{weights.file.path} holds nothing for {module!r}, which its target_modules name.",
                hint=f"{_AGAIN} Or it was trained on another base; name it with --base.",
            )


def _ends_with_any(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
