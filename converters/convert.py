"""Hugging Face base model → GGUF: reads the config, plans the tensors, reads the vocabulary, streams everything out.

Weights go through memory in pieces of about a million values, a few at a time, so the peak does not depend on the
model's size. Numbers are never changed silently: a tensor that float16 cannot hold stays in bfloat16 or float32.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from converters.adapter_head import TrainedHead
from converters.base import Family, find_family
from converters.card import card_metadata
from converters.checkpoint import STORAGE, Checkpoint, SafetensorsCheckpoint, load_float32, row_count
from converters.config import read_config
from converters.encoding import Q8_0_BLOCK, TensorType
from converters.errors import ConverterError
from converters.head import POOLING_KEY, POOLING_TYPES, TASK_KEY, head_metadata
from converters.plan import Output, Part, plan
from converters.sentence_transformers import (
    MAX_LENGTH_KEY,
    SentenceModel,
    read_sentence_model,
    tokenizer_limit,
    transformer_dir,
)
from converters.stream import write_tensor
from converters.vocab import harmless_name, read_vocabulary
from converters.writer import GgufWriter, Value, planned_bytes

OnTensor = Callable[[str, tuple[int, ...], int, int], None]
"""Called after each tensor: its GGUF name, its shape, bytes read so far, bytes to read in all."""

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What `convert_base` can write; "auto" keeps the checkpoint's own 16-bit type, or takes f16."""

_TYPES = {"f32": TensorType.F32, "f16": TensorType.F16, "bf16": TensorType.BF16, "q8_0": TensorType.Q8_0}
_FILE_TYPES = {TensorType.F32: 0, TensorType.F16: 1, TensorType.Q8_0: 7, TensorType.BF16: 32}
_ALWAYS_FLOAT32 = (
    *("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "attn_rel_b.weight"),
)
_OVER_WHOLE_TEXTS = ("classification", "multilabel", "regression", "embedding")
_QUANTIZATION_VERSION = 2


def convert_base(
    model_dir: Path,
    out_path: Path,
    *,
    outtype: str = "auto",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    merge: Path | None = None,
    trained: TrainedHead | None = None,
    on_tensor: OnTensor | None = None,
    check_space: Callable[[int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> None:
    """Convert the Hugging Face directory `model_dir` to the GGUF file `out_path`, which is written in place.

    `outtype` is one of `OUTTYPES`; `metadata` is added to the header; `merge` is a PEFT directory whose adapter is
    merged into the weights, `trained` what is known of the head that was trained with it; `check_space` is called with
    the file's size in bytes before anything is written; `on_notice` is told what of the checkpoint is left out on
    purpose. Raises `ConverterError`: `CorruptCheckpoint` for broken files, `UnsupportedModel` for what llama.cpp cannot
    run exactly.
    """
    if outtype not in OUTTYPES:
        raise ConverterError(f"There is no output type {outtype!r}.", hint=f"Use one of {', '.join(OUTTYPES)}.")
    sentence, inside = read_sentence_model(model_dir), transformer_dir(model_dir)
    values = read_config(inside)
    family, tokenizer_dir = find_family(values), inside
    with SafetensorsCheckpoint(inside) as base:
        checkpoint: Checkpoint = base
        if merge is not None:
            from converters.merge import merge_adapter

            merged = merge_adapter(base, merge, base_dir=inside, values=values, trained=trained)
            checkpoint, family, tokenizer_dir = merged.checkpoint, merged.family, merged.tokenizer_dir
        outputs = plan(family, checkpoint)
        wanted = _guess_type(checkpoint) if outtype == "auto" else _TYPES[outtype]
        vocabulary = read_vocabulary(
            tokenizer_dir,
            family.config.natural("vocab_size"),
            original=family.carries_tokenizer or sentence is not None,
            lower_case=sentence is not None and sentence.lower_case,
        )
        name = harmless_name(model_dir.resolve().name, vocabulary)
        general = {**_general_metadata(name, family, wanted, outputs), **card_metadata(model_dir)}
        head = _head_keys(family, checkpoint, sentence)
        if head.get(TASK_KEY) in _OVER_WHOLE_TEXTS and (limit := tokenizer_limit(tokenizer_dir)):
            head = {MAX_LENGTH_KEY: limit, **head}
        keys = {**general, **vocabulary, **head, **(metadata or {})}
        if on_notice is not None:
            for notice in _notices(family, checkpoint):
                on_notice(notice)
        _write(out_path, checkpoint, family, outputs, wanted, keys, on_tensor, check_space)


def _general_metadata(name: str, family: Family, wanted: TensorType, outputs: list[Output]) -> dict[str, Value]:
    architecture = family.gguf_architecture
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.size_label": _size_label(outputs),
        "general.file_type": _FILE_TYPES[wanted],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in family.metadata().items()},
        **family.other_metadata(),
    }


def _head_keys(family: Family, checkpoint: Checkpoint, sentence: SentenceModel | None) -> dict[str, Value]:
    """The keys of the model's head, or of what a sentence model does instead, and llama.cpp's own for the pooling."""
    keys: dict[str, Value] = {}
    if sentence is not None and not family.is_classifier:
        keys = {**head_metadata(sentence.head_of(family.hidden), sentence.load), **sentence.metadata()}
    elif family.head is not None:
        sources = {family.canonical(name): name for name in checkpoint.names}
        keys = head_metadata(family.head, lambda name: load_float32(checkpoint, sources[name]))
        keys |= sentence.metadata() if sentence is not None else {}
    if (pooling := str(keys.get(POOLING_KEY, ""))) in POOLING_TYPES:
        keys[f"{family.gguf_architecture}.pooling_type"] = POOLING_TYPES[pooling]
    return keys


def _notices(family: Family, checkpoint: Checkpoint) -> Iterator[str]:
    left_out = sorted({name.rpartition(".")[0] for name in checkpoint.names if family.is_left_out(name)})
    if left_out:
        yield f"Left out, as embeddings and classes do not need it: {', '.join(left_out)}."


def _size_label(outputs: list[Output]) -> str:
    """The number of parameters as llama.cpp writes it: "494M", or "8x7.3B" for eight experts."""
    experts = [out for out in outputs if "_exps." in out.name]
    count = experts[0].shape[0] if experts else 1
    size = sum(prod(out.shape) // (count if out in experts else 1) for out in outputs)
    power = next((power for power in (12, 9, 6) if size >= 10**power), 3)
    scaled = size / 10**power
    digits = max(0, 2 - len(str(round(scaled)).lstrip("0")))
    prefix = f"{count}x" if experts else ""
    return f"{prefix}{scaled:.{digits}f}{dict(zip((12, 9, 6, 3), 'TBMK', strict=True))[power]}"


def _guess_type(checkpoint: Checkpoint) -> TensorType:
    # All matrices, not the first: what an adapter was merged into is float32, and float16 keeps more of it.
    dtypes = {checkpoint.dtype(name) for name in checkpoint.names if len(checkpoint.shape(name)) >= 2}
    dtypes &= STORAGE.keys()
    return TensorType.BF16 if dtypes == {"BF16"} else TensorType.F16


def _tensor_type(output: Output, wanted: TensorType, family: Family) -> TensorType:
    if len(output.shape) < 2 or not output.name.endswith(".weight") or output.name.endswith(_ALWAYS_FLOAT32):
        return TensorType.F32
    if wanted is TensorType.Q8_0 and output.shape[-1] % Q8_0_BLOCK:
        wanted = TensorType.F16
    if wanted is TensorType.F16 and re.fullmatch(family.not_float16, output.name):
        return TensorType.F32
    return wanted


def _write(
    out_path: Path,
    checkpoint: Checkpoint,
    family: Family,
    outputs: list[Output],
    wanted: TensorType,
    keys: Mapping[str, Value],
    on_tensor: OnTensor | None,
    check_space: Callable[[int], None] | None,
) -> None:
    extra = family.extra_tensors()
    shapes = {name: values.shape for name, values in extra.items()} | {out.name: out.shape for out in outputs}
    if check_space is not None:
        types = [(out.name, out.shape, _tensor_type(out, wanted, family)) for out in outputs]
        check_space(planned_bytes(keys, types))
    total = sum(_stored_bytes(checkpoint, part) for out in outputs for part in out.parts)
    done = 0
    with GgufWriter(out_path) as writer, ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        writer.begin(keys, shapes)
        for name, values in extra.items():
            writer.write(values, writer.add(name, TensorType.F32))
        for output in outputs:
            write_tensor(writer, pool, checkpoint, output, _tensor_type(output, wanted, family))
            done += sum(_stored_bytes(checkpoint, part) for part in output.parts)
            if on_tensor is not None:
                on_tensor(output.name, output.shape, done, total)
        writer.finish()


def _stored_bytes(checkpoint: Checkpoint, part: Part) -> int:
    shape = checkpoint.shape(part.source)
    return row_count(shape) * shape[-1] * STORAGE[checkpoint.dtype(part.source)].itemsize
