"""The proof for models that turn texts into vectors, labels or numbers: ids, vectors and scores against torch.

The reference is the checkpoint in float32 with PEFT's adapter, its head transformers' own, what is pooled read from the
sentence-transformers files; none of it comes from the converter. llama.cpp runs as `edgetune embed` runs it. F32 and
F16 files have fixed bounds; beyond those, and for coarser types, the bound is `bounds.MARGIN` times what noise of the
type's size does to this very model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetune.artifacts import ParityCheck, ParityReport, VectorParity
from edgetune.engine.encoder import Encoder
from edgetune.engine.encoder_llama import open_llama_encoder
from edgetune.engine.encoder_tokens import Encoded, Text
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import ResourceError
from edgetune.events import Event, Progress, Sink
from edgetune.gguf_header import GgufHeader
from edgetune.hardware import available_memory
from edgetune.head import Array, Head, normalized, sigmoid, softmax
from edgetune.parity import bounds, structure
from edgetune.parity.reference import NO_TORCH, first_difference
from edgetune.parity.texts import PROBES, stress_texts
from edgetune.parity.torch_model import TorchModel, parameter_count

if TYPE_CHECKING:
    from edgetune.engine.torch.encoder_backend import TorchBackend

TASK_KEY = "edgetune.task"
LEAST_COSINE = 0.9999
"""For F32 and F16 files, at every text."""
SCORE_DIFFERENCE = 2e-3
"""The same for probabilities, and for a regression's values relative to the largest."""
_NEARNESS = 0.1
"""Vectors of unlike texts can be nearly parallel: a right file stays below this share of their distance."""
_ROWS_OF_DATA = 32
_SMALL = 20_000_000
_FLOAT32_BYTES = 5.2
"""Memory a parameter takes in torch, what is computed with it included."""
_SPELLED = ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "<s>", "</s>", "<mask>", "<pad>")
"""Control tokens that a text may spell, without ever becoming one."""
_PAIRS = (
    ("Where does the train to Bern leave?", "It leaves from platform 7, ten minutes late."),
    ("short", PROBES[0]),
)


def is_encoder(header: GgufHeader) -> bool:
    """Whether the file is of a model that this proof is for."""
    causal = header.metadata.get(f"{header.architecture}.attention.causal")
    return causal is False or "bert" in header.architecture or header.metadata.get(TASK_KEY) not in (None, "seq2seq")


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
    """Compare as `gate.verify` does, for a GGUF of which `is_encoder` holds."""
    checks = [structure.check_structure(header, base_dir, lora=lora, merged=merged)]
    not_checked: list[str] = []
    vectors: VectorParity | None = None
    try:
        _check_memory(base_dir)
        from edgetune.engine.torch.encoder import load_backend

        backend, tokenizer = load_backend(base_dir, adapter_dir=adapter_dir, dtype="f32", device="cpu")
    except ImportError:
        not_checked.append(f"token ids, vectors and scores: {NO_TORCH}")
    except ResourceError as error:
        not_checked.append(f"token ids, vectors and scores: {error.message}")
    else:
        specs = [LoraSpec(lora.path)] if lora else []
        with Encoder(backend, tokenizer) as torch, _open(header, specs) as llama:
            checks = [_check_tokens(torch, llama), _check_head(torch, llama), *checks]
            if all(check.passed for check in checks):
                proof = _Proof(torch, llama, backend, header, lora, sink)
                vectors = proof.run(_choose_texts(data_path))
                if lora is not None:
                    checks.append(proof.check_effect())
            else:
                not_checked.append("vectors and scores: what differs already would make them differ")
    return ParityReport(
        header.path, lora.path if lora else None, tuple(checks), None, tuple(not_checked), vectors=vectors
    )


def _open(header: GgufHeader, adapters: list[LoraSpec]) -> Encoder:
    """On the CPU; threads that wait for each other cost more than they help a small model on a busy machine."""
    threads = 1 if sum(tensor.nbytes for tensor in header.tensors) < _SMALL else 0
    return open_llama_encoder(header.path, lora=adapters, gpu_layers=0, threads=threads)


def _check_memory(base_dir: Path) -> None:
    needed, free = parameter_count(base_dir) * _FLOAT32_BYTES, available_memory()
    if needed > free:
        raise ResourceError(f"the model needs {needed / 1e9:.1f} GB in torch, {free / 1e9:.1f} GB are free")


def _check_tokens(torch: Encoder, llama: Encoder) -> ParityCheck:
    """Ids, token types and where texts are cut."""
    texts: list[Text] = [text for text in stress_texts(_SPELLED) if text]
    texts += [*PROBES, " ".join(PROBES) * 200, *_PAIRS, (PROBES[0] * 200, PROBES[1] * 100)]
    expected, found = torch.token_ids(texts), llama.token_ids(texts)
    problems = [
        f"{_short(text)} becomes {_shown(theirs, mine)} instead of {_shown(mine, theirs)}"
        for text, mine, theirs in zip(texts, expected, found, strict=True)
        if list(mine.ids) != list(theirs.ids) or _types(mine) != _types(theirs)
    ]
    return ParityCheck("tokenizer", len(texts), len(texts) - len(problems), "".join(problems[:1]))


def _check_head(torch: Encoder, llama: Encoder) -> ParityCheck:
    """What the numbers mean: task, labels, pooling, normalising, prompts."""
    problems: list[str] = []
    mine, theirs = torch.profile, llama.profile
    pairs: list[tuple[str, object, object]] = [
        ("pooling", mine.pooling, theirs.pooling),
        ("prompts", dict(mine.prompts), dict(theirs.prompts)),
    ]
    if torch.scores_texts or llama.scores_texts:
        pairs += [
            ("task", _scoring(mine.head).task, _scoring(theirs.head).task),
            ("labels", _labels(mine.head), _labels(theirs.head)),
        ]
    else:
        pairs.append(("normalising", mine.normalize, theirs.normalize))
    problems = [f"the {what} is {found!r} instead of {wanted!r}" for what, wanted, found in pairs if wanted != found]
    return ParityCheck("head", len(pairs), len(pairs) - len(problems), "".join(problems[:1]))


def _scoring(head: Head | None) -> Head:
    return head if head is not None and head.scores_texts else Head("embedding")


def _labels(head: Head | None) -> tuple[str, ...]:
    return head.labels if head is not None and head.task != "regression" else ()


class _Proof:
    """Both sides' vectors and scores on the same texts, and how far they may be apart."""

    def __init__(
        self,
        torch: Encoder,
        llama: Encoder,
        backend: TorchBackend,
        header: GgufHeader,
        lora: GgufHeader | None,
        sink: Sink,
    ) -> None:
        self._torch, self._llama, self._backend, self._sink = torch, llama, backend, sink
        self._model = TorchModel(backend.model, "float32")
        self._header, self._lora = header, lora
        self._scores = torch.scores_texts
        self._texts: list[Text] = []
        self._expected = self._found = np.zeros((0, 0), np.float32)

    def run(self, texts: Sequence[Text]) -> VectorParity:
        """Compare on `texts` and grade."""
        self._texts = list(texts)
        expected, found = self._embed(self._torch, "torch"), self._embed(self._llama, "llama.cpp")
        self._expected, self._found = expected, found
        distances = _distances(expected, found)
        chance = float(_distances(expected, np.roll(expected, len(expected) // 2, axis=0)).mean())
        least = max(LEAST_COSINE, 1 - _NEARNESS * chance)
        scores = self._compare_scores() if self._scores else None
        headers = [self._header, *([self._lora] if self._lora else [])]
        is_fine = bounds.coarsest_type(*headers) in bounds.FIXED_BOUNDS
        measured = {
            "texts": len(texts),
            "min_cosine": float(1 - distances.max()),
            "mean_distance": float(distances.mean()),
            "max_difference": float(np.abs(normalized(expected) - normalized(found)).max()),
            "score_difference": scores,
        }
        if is_fine and 1 - distances.max() >= least and (scores is None or scores <= SCORE_DIFFERENCE):
            return VectorParity(**measured, bound=least, score_bound=SCORE_DIFFERENCE)  # type: ignore[arg-type]
        noise, noise_scores = self._noise()
        return VectorParity(
            **measured,  # type: ignore[arg-type]
            bound=max(bounds.MARGIN * noise, 1e-6),
            bounded="mean_distance",
            score_bound=max(bounds.MARGIN * noise_scores, SCORE_DIFFERENCE),
        )

    def check_effect(self) -> ParityCheck:
        """An adapter that is weak, or a base that is coarse, hides a lost adapter; what it changes does not."""
        if not self._lora or not any(tensor.name.endswith(".lora_a") for tensor in self._lora.tensors):
            return ParityCheck("adapter_effect", 0, 0, skipped="the adapter changes the head alone")
        with self._model.without_adapter():
            plain = self._embed(self._torch, "effect")
        with _open(self._header, []) as llama:
            if self._scores:  # the adapter's classifier took the place of what follows the base's pooling
                llama.profile = replace(llama.profile, head=None)
            plain_found = self._embed(llama, "effect")
        change, found = self._expected - plain, self._found - plain_found
        total = float((change * change).sum(dtype=np.float64))
        if total <= 1e-12 * float((plain * plain).sum(dtype=np.float64)):
            return ParityCheck("adapter_effect", 0, 0, skipped="the adapter changes nothing")
        ratio = float((change * found).sum(dtype=np.float64)) / total
        low, high = bounds.EFFECT
        fits = low <= ratio <= high
        difference = "" if fits else f"the adapter changes the vectors {ratio:.2f} times as much as PEFT's does"
        return ParityCheck("adapter_effect", 1, int(fits), difference)

    def _noise(self) -> tuple[float, float]:
        """What noise of the files' size does: mean distance of vectors, largest difference of scores."""
        levels = bounds.noise_levels(self._header, self._lora, torch_dtype="float32")
        distances: list[float] = []
        differences: list[float] = []
        expected_scores = self._outputs(self._torch) if self._scores else None
        for seed in range(3):
            with self._model.noise(levels, seed=seed):
                distances.append(float(_distances(self._expected, self._embed(self._torch, "bound")).mean()))
                if expected_scores is not None:
                    differences.append(_difference(expected_scores, self._outputs(self._torch)))
        return float(np.mean(distances)), max(differences, default=0.0)

    def _embed(self, encoder: Encoder, label: str) -> Array:
        return encoder.embed(self._texts, normalize=False, prompt_name="", sink=_named(label, self._sink))

    def _compare_scores(self) -> float:
        return _difference(self._outputs(self._torch), self._outputs(self._llama))

    def _outputs(self, encoder: Encoder) -> Array:
        head = encoder.profile.head
        assert head is not None
        rows = encoder.logits([*self._texts, *_PAIRS])
        if head.task == "regression":
            return rows
        return sigmoid(rows) if head.task == "multilabel" else softmax(rows)


def _difference(expected: Array, found: Array) -> float:
    """Largest difference; values beyond 1 are compared relative to the largest one."""
    return float(np.abs(expected - found).max() / max(1.0, float(np.abs(expected).max())))


def _distances(expected: Array, found: Array) -> Array:
    """1 - cosine of each row's two vectors; NaN where one of them is none."""
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    return np.asarray(1 - (expected.astype(np.float64) * found).sum(axis=1) / lengths, np.float32)


def _choose_texts(data_path: Path | None) -> list[Text]:
    """Texts of several lengths, up to beyond most limits, or the user's own."""
    if data_path is not None and (rows := list(_data_texts(data_path))):
        return list(rows)
    words = " ".join(PROBES).split()
    lengths = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 120)
    spans: list[Text] = [" ".join(words[at : at + length]) for at, length in enumerate(lengths)]
    return [*spans, *PROBES, *(text for text in stress_texts(())[14:26] if text.strip()), " ".join(words * 4)]


def _data_texts(path: Path) -> Iterator[str]:
    from edgetune.data.sources import Row, find_splits, iter_rows

    splits = find_splits([path])
    count = 0
    for file in splits["valid"] or splits["test"] or splits["train"]:
        for row in iter_rows(file):
            texts = [value for value in row.values.values() if isinstance(value, str)] if isinstance(row, Row) else []
            for line in texts[0].splitlines() if len(texts) == 1 else texts[:1]:
                if line.strip() and count < _ROWS_OF_DATA:
                    count += 1
                    yield line


def _named(label: str, sink: Sink) -> Sink:
    def hear(event: Event) -> None:
        sink(Progress(label, event.done, event.total, event.unit) if isinstance(event, Progress) else event)

    return hear


def _types(one: Encoded) -> list[int]:
    return list(one.types) if any(one.types) else []


def _shown(one: Encoded, other: Encoded) -> str:
    if list(one.ids) == list(other.ids):
        return f"token types {_types(one)[:12]}"
    begin = max(0, first_difference(one.ids, other.ids) - 2)
    return f"{'… ' if begin else ''}{list(one.ids[begin : begin + 12])} ({len(one)} ids)"


def _short(text: Text) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…") if isinstance(text, str) else "a pair of texts"
