"""The gate for encoder-decoders: ids of texts, where the decoder starts and stops, and its next-token distributions.

The decoder is led along a given target, so that both sides see the same text at every position. Bounds are those of
decoders (see `proof`). Prints nothing, writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifacts import LogitsParity, ParityCheck, ParityReport
from edgetune.data.columns import REWRITING, languages, translations
from edgetune.data.dataset import first_row, read_columns
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.seq2seq import SEQ2SEQ_ARCHITECTURES as ARCHITECTURES
from edgetune.engine.seq2seq import Seq2SeqEngine
from edgetune.errors import CorruptFileError, ResourceError, UnsupportedError
from edgetune.events import Progress, Sink
from edgetune.gguf_header import GgufHeader
from edgetune.hardware import available_memory
from edgetune.library import read_config
from edgetune.parity import structure
from edgetune.parity.bounds import Logits
from edgetune.parity.proof import Proof
from edgetune.parity.reference import NO_TORCH, Reference, load_reference
from edgetune.parity.sequences import context_length, token_budget
from edgetune.parity.texts import PROBES, stress_texts
from edgetune.parity.tokens import describe_ids, shorten
from edgetune.parity.torch_model import TorchModel, parameter_count

__all__ = ["ARCHITECTURES", "verify"]

Pair = tuple[list[int], list[int]]
"""A source and a target, which begins with the decoder's start token."""

_WHOLE = 1 << 30
"""A length that cuts no text."""
_LONG = 200
"""Tokens of a source and of a target that reach past the largest distance that T5 tells apart."""
_ROWS_OF_DATA = 16


def verify(
    base_dir: Path,
    header: GgufHeader,
    *,
    adapter_dir: Path | None,
    lora: GgufHeader | None,
    merged: bool,
    data_path: Path | None,
    sink: Sink,
) -> ParityReport:
    """Compare as `gate.verify` does, for a GGUF of one of `ARCHITECTURES`."""
    tokenizer_dir = adapter_dir if merged and adapter_dir and (adapter_dir / "tokenizer.json").is_file() else base_dir
    checks = [structure.check_structure(header, base_dir, lora=lora, merged=merged)]
    not_checked: list[str] = []
    logits: LogitsParity | None = None
    try:
        reference: Reference | None = load_reference(tokenizer_dir, template=None)
    except UnsupportedError as error:
        reference = None
        not_checked.append(f"token ids: {error.message}")
    with Seq2SeqEngine.open(header.path, gpu_layers=0) as engine:
        checks = [*_check_tokens(reference, engine, base_dir), *checks]
        start = engine.start_id
    if not checks[-1].passed:
        not_checked.append("next-token distributions: the files' structure already differs")
        return ParityReport(header.path, lora.path if lora else None, tuple(checks), None, tuple(not_checked))
    try:
        model = TorchModel.load(
            base_dir, adapter_dir, available_bytes=available_memory(), auto_class="AutoModelForSeq2SeqLM"
        )
    except ImportError:
        not_checked.append(f"next-token distributions: {NO_TORCH}")
    except ResourceError as error:
        not_checked.append(f"next-token distributions: {error.message}")
    else:
        config = structure.text_config(base_dir)
        pairs = choose_pairs(reference, config, start=start, parameters=parameter_count(base_dir), data_path=data_path)
        proof = Proof(
            base_dir,
            header,
            lora,
            model,
            expected=lambda label: model.target_logits(pairs, label=label, sink=sink),
            found=lambda lora_path: llama_logits(header.path, pairs, lora_path=lora_path, sink=sink),
            sink=sink,
        )
        logits = proof.run()
        checks += proof.checks
        not_checked += proof.not_checked
    return ParityReport(header.path, lora.path if lora else None, tuple(checks), logits, tuple(not_checked))


def choose_pairs(
    reference: Reference | None,
    config: Mapping[str, Any],
    *,
    start: int,
    parameters: int,
    data_path: Path | None = None,
) -> list[Pair]:
    """Sources and targets to compare on: random ids, text or the user's rows, and one pair of both long texts."""
    vocabulary = int(config.get("vocab_size") or 0) or 256
    budget = token_budget(parameters)
    longest = min(context_length(config), budget, _LONG)
    random = np.random.default_rng(7).integers(0, vocabulary, (2, min(48, longest))).tolist()
    pairs: list[Pair] = [(random[0], [start, *random[1][1:]])]
    texts = _rows(reference, data_path, longest) if data_path is not None else _probes(reference, longest)
    for source, target in texts:
        if sum(len(one) + len(other) for one, other in pairs) + len(source) + len(target) > budget:
            break
        pairs.append((source, [start, *target]))
    joined = [token for source, target in texts or [(random[0], random[1])] for token in (*source, *target)]
    long = (joined * (longest // len(joined) + 1))[:longest]
    pairs.append((long, [start, *reversed(long)][:longest]))
    return [tuple([token for token in ids if token < vocabulary] for ids in pair) for pair in pairs]  # type: ignore[misc]


def llama_logits(gguf_path: Path, pairs: Sequence[Pair], *, lora_path: Path | None, sink: Sink) -> list[Logits]:
    """llama.cpp's logits of every pair, each (target tokens, vocabulary)."""
    found: list[Logits] = []
    sizes = [len(source) + len(target) for source, target in pairs]
    longest = max(len(ids) for pair in pairs for ids in pair)
    lora = [LoraSpec(lora_path)] if lora_path else []
    with Seq2SeqEngine.open(gguf_path, ctx_size=longest, gpu_layers=0, lora=lora) as engine:
        for number, (source, target) in enumerate(pairs, 1):
            found.append(engine.logits(source, target))
            sink(Progress("llama.cpp", sum(sizes[:number]), sum(sizes), "tokens", f"sequence {number}"))
    return found


def _check_tokens(reference: Reference | None, engine: Seq2SeqEngine, base_dir: Path) -> list[ParityCheck]:
    template = ParityCheck("template", 0, 0, skipped="an encoder-decoder has no chat template")
    if reference is None:
        return [ParityCheck("tokenizer", 0, 0, skipped="the checkpoint has no tokenizer to compare with"), template]
    return [_check_tokenizer(reference, engine), template, _check_stop(reference, engine, base_dir)]


def _check_tokenizer(reference: Reference, engine: Seq2SeqEngine) -> ParityCheck:
    """Ids of texts, with what is put around them, all of it text, and back to text."""
    checked = equal = 0
    difference = ""
    for text in dict.fromkeys(stress_texts(reference.tokenizer.control_ids, added_tokens=reference.added_tokens)):
        expected, found = _encode(reference, text), engine.tokenizer.encode(text)
        checked += 1
        equal += expected == found
        if expected != found and not difference:
            difference = f"text {shorten(text)}: {describe_ids(expected, found)}"
    return ParityCheck("tokenizer", checked, equal, difference)


def _check_stop(reference: Reference, engine: Seq2SeqEngine, base_dir: Path) -> ParityCheck:
    problems = []
    wanted = _start_token(base_dir)
    if wanted != engine.start_id:
        problems.append(f"the decoder starts with the token {engine.start_id} instead of {wanted}")
    expected, found = _encode(reference, "a"), engine.tokenizer.encode("a")
    if expected != found:
        problems.append(f"the text 'a' becomes {found} instead of {expected}")
    stops = sorted(reference.tokenizer.eog_ids)
    problems += [
        f"the token {stop} ends a text, but llama.cpp would not stop at it"
        for stop in stops
        if stop not in engine.tokenizer.eog_ids
    ]
    return ParityCheck("stop", 2 + len(stops), 2 + len(stops) - len(problems), "".join(problems[:1]))


def _start_token(base_dir: Path) -> int:
    """What transformers starts a target with; configs that do not say it mean the padding token."""
    config, path = read_config(base_dir), base_dir / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
    key = "decoder_start_token_id"
    named = (config.get(key), generation.get(key), config.get("pad_token_id"))
    return next((number for number in named if isinstance(number, int)), 0)


def _encode(reference: Reference, text: str) -> list[int]:
    if any(token in text for token in reference.tokenizer.control_ids):
        return [int(token) for token in reference.tokenizer.encode_whole(text, max_length=_WHOLE).ids]
    return reference.encode(text)


def _probes(reference: Reference | None, longest: int) -> list[Pair]:
    if reference is None:
        return []
    texts = [_encode(reference, text)[:longest] for text in PROBES]
    return list(zip(texts, [*texts[1:], texts[0]], strict=True))


def _rows(reference: Reference | None, data_path: Path, longest: int) -> list[Pair]:
    """Held-out rows of the user's data, else rows that were trained on."""
    if reference is None:
        return []
    row = first_row([data_path])
    spoken = languages(row) if row else []
    formats = [*REWRITING, *([translations(*spoken[:2])] if len(spoken) > 1 else [])]
    dataset = read_columns([data_path], formats, task="seq2seq", skip_bad_rows=True, splits=("train", "valid", "test"))
    splits = (dataset.examples.get(split) for split in ("valid", "test", "train"))
    held_out: Sequence[tuple[str, Any]] = next(filter(None, splits), [])
    return [
        (_encode(reference, one.source)[:longest], _encode(reference, one.target)[:longest])
        for _, one in held_out[:_ROWS_OF_DATA]
    ]
