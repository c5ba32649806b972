"""Texts → vectors, labels or numbers: the one way of doing it, over a backend that computes hidden states.

Tokenizes, cuts or splits what is too long, sorts by length so that a batch wastes little, and puts results back into
the order of the texts. What runs the model is a `Backend`: llama.cpp on a GGUF, or torch on a Hugging Face directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, get_args

import numpy as np

from edgetune.engine import workers
from edgetune.engine.encoder_tokens import Encoded, EncoderTokenizer, Text
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.workers import Crew
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError
from edgetune.events import Notice, Progress, Sink, ignore
from edgetune.head import POOLINGS, Array, Head, Pooling, normalized, sigmoid, softmax

Long = Literal["truncate", "window", "error"]
"""What is done with a text over the model's limit: cut it, average over windows of it, or refuse."""
LONG: tuple[Long, ...] = get_args(Long)

_CHUNK = 2048
"""Texts tokenized and sorted at once: bounds memory, and how long progress stands still."""


@dataclass(frozen=True)
class Profile:
    """What a model is for, as its files say."""

    path: Path
    hidden_size: int
    max_tokens: int
    """The longest text it takes, the tokens around it included."""
    head: Head | None
    pooling: Pooling
    """How a vector is made of hidden states where nobody says otherwise."""
    normalize: bool
    """Whether vectors have length 1 where nobody says otherwise."""
    is_encoder: bool = True
    """False for a decoder, whose tokens see only what is before them."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by the name of its purpose, e.g. "query"."""
    has_foreign_head: bool = False
    """Whether the only head is one that llama.cpp's converter wrote."""
    default_prompt: str = ""
    """The name of the prompt that is used where none is named; empty for none."""


@dataclass(frozen=True)
class Classification:
    """What a classifier or a regression model says of a text."""

    scores: Mapping[str, float]
    """Label → probability, in the model's order; empty for regression."""
    labels: tuple[str, ...] = ()
    """The label of the highest probability; with several labels a text all that reach the threshold."""
    values: tuple[float, ...] = ()
    """Regression: the numbers."""


class Backend(Crew, Protocol):
    """What runs the model."""

    profile: Profile

    def pool(self, batch: Sequence[Encoded], pooling: Pooling | None) -> Array:
        """Pooled last hidden states, (n, hidden); None is the model's own pooling."""

    def score(self, batch: Sequence[Encoded]) -> Array:
        """What the head makes of the texts, (n, outputs), before any softmax."""

    def close(self) -> None:
        """Free the model."""


class Encoder:
    """A model that turns texts into vectors and, where it has a head for it, into labels or numbers."""

    def __init__(self, backend: Backend, tokenizer: EncoderTokenizer) -> None:
        """Take over both; use `open_encoder`."""
        self._backend, self._tokenizer = backend, tokenizer
        self.profile = backend.profile
        """What the model is for."""
        self.cut_texts = 0
        """How many texts were longer than the model takes, and cut."""
        self.windowed_texts = 0
        """How many were averaged over windows."""

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its vocabulary."""
        self._backend.close()
        self._tokenizer.close()

    @property
    def scores_texts(self) -> bool:
        """Whether `classify` can be asked."""
        return self.profile.head is not None and self.profile.head.scores_texts

    def embed(
        self,
        texts: Sequence[Text],
        *,
        pooling: Pooling | Literal["auto"] = "auto",
        normalize: bool | None = None,
        prompt_name: str | None = None,
        long: Long = "truncate",
        sink: Sink = ignore,
    ) -> Array:
        """A vector for each text: (texts, dimensions), in float32.

        `pooling` and `normalize` are the model's own unless given; `prompt_name` names one of `profile.prompts`.
        Raises `UsageError` for an empty text, an unknown prompt, or with `long="error"` a text over the limit.
        """
        if pooling not in ("auto", *POOLINGS):
            raise UsageError(f"There is no pooling {pooling!r}.", hint=f"One of auto, {', '.join(POOLINGS)}.")
        profile = self.profile
        chosen: Pooling | None = None if pooling == "auto" else pooling
        prompt = self._prompt(prompt_name)
        prompted = [_with_prompt(prompt, text) for text in texts] if prompt else texts
        head = profile.head if profile.head and profile.head.task == "embedding" else None
        rows: list[Array] = []
        for windows, owners in self._prepare(prompted, long=long):
            pooled = self._run(windows, lambda batch: self._backend.pool(batch, chosen), len(texts), sink)
            if head:
                pooled = head.apply(pooled)
            rows.append(_average(pooled, owners, [len(window) for window in windows]))
        if not rows:
            return np.zeros((0, profile.hidden_size), np.float32)
        result = np.concatenate(rows)
        wanted = profile.normalize if normalize is None else normalize
        return normalized(result) if wanted else result

    def classify(
        self, texts: Sequence[Text], *, threshold: float | None = None, long: Long = "truncate", sink: Sink = ignore
    ) -> list[Classification]:
        """Labels with probabilities, or numbers, for each text.

        `threshold` is the least probability of a label that is given: 0.5 where a text may have several, else none.
        Raises `UnsupportedError` for a model without a head, `UsageError` for an empty text.
        """
        head = self.profile.head
        if head is None or not head.scores_texts:
            if self.profile.has_foreign_head:
                raise UnsupportedError(
                    f"{self.profile.path} has its head in llama.cpp's own form, which lacks layers of some models.",
                    hint="Convert the checkpoint once more, with: edgetune convert",
                )
            raise UnsupportedError(
                f"{self.profile.path} has no head that gives labels or numbers.",
                hint="Train one on it: edgetune train --task classification; or name an adapter that has one: --lora",
            )
        if long == "window":
            raise UsageError("Only vectors can be averaged over windows.", hint="Take --long truncate or error.")
        found: list[Classification] = []
        for windows, _ in self._prepare(texts, long=long):
            scores = self._run(windows, self._backend.score, len(texts), sink)
            found += [_classification(head, row, threshold) for row in scores]
        return found

    def logits(self, texts: Sequence[Text], *, sink: Sink = ignore) -> Array:
        """What the head gives before any softmax, (texts, outputs). Raises as `classify`."""
        if not self.scores_texts:
            self.classify(texts)
        parts = [
            self._run(windows, self._backend.score, len(texts), sink)
            for windows, _ in self._prepare(texts, long="truncate")
        ]
        return np.concatenate(parts)

    def token_ids(self, texts: Sequence[Text]) -> list[Encoded]:
        """What each text becomes, cut to what the model takes."""
        return [tokens.windows[0] for tokens in self._tokenizer.encode(list(texts), max_tokens=self.profile.max_tokens)]

    def score_ids(self, texts: Sequence[Sequence[int]]) -> Array:
        """What the head gives of texts that are token ids already, (texts, outputs)."""
        return self._run([Encoded(list(ids)) for ids in texts], self._backend.score, len(texts), ignore)

    def _prompt(self, name: str | None) -> str:
        prompts = self.profile.prompts
        name = self.profile.default_prompt if name is None else name
        if name and name not in prompts:
            known = f"It has {', '.join(prompts)}." if prompts else "It has none."
            raise UsageError(f"{self.profile.path} has no prompt {name!r}.", hint=known)
        return prompts.get(name, "")

    def _prepare(self, texts: Sequence[Text], *, long: Long) -> Iterator[tuple[list[Encoded], list[int]]]:
        """Windows of the texts, chunk by chunk, and how many each text has."""
        for number, text in enumerate(texts):
            if not (text.strip() if isinstance(text, str) else all(part.strip() for part in text)):
                raise UsageError(f"Text {number + 1} of {len(texts)} is empty.", hint="There is nothing to look at.")
        for start in range(0, len(texts), _CHUNK):
            windows: list[Encoded] = []
            counts: list[int] = []
            part = texts[start : start + _CHUNK]
            for number, tokens in enumerate(self._tokenizer.encode(list(part), max_tokens=self.profile.max_tokens)):
                if tokens.is_cut and long == "error":
                    raise UsageError(
                        f"Text {start + number + 1} is longer than the {self.profile.max_tokens} tokens that the model "
                        "takes.",
                        hint="Cut it with --long truncate; embed can also average over its parts (--long window).",
                    )
                split = tokens.is_cut and long == "window" and isinstance(part[number], str)
                chosen = tokens.windows if split else tokens.windows[:1]
                self.windowed_texts += split
                self.cut_texts += tokens.is_cut and not split
                windows += chosen
                counts.append(len(chosen))
            yield windows, counts

    def _run(self, windows: Sequence[Encoded], compute: _Compute, total: int, sink: Sink) -> Array:
        """`compute` on all windows, batch by batch, in their own order."""
        places: list[int] = []
        results: list[Array] = []
        lengths = [len(window) for window in windows]
        for group, found in workers.run(lengths, lambda group: compute([windows[at] for at in group]), self._backend):
            places += group
            results.append(found)
            sink(Progress("encode", min(len(places), total), total, "texts"))
        rows = np.concatenate(results)
        if not np.isfinite(rows).all():
            raise CorruptFileError(
                f"{self.profile.path} answers with what is no number.", hint="Is it damaged? Convert it again."
            )
        back = np.empty(len(windows), np.int64)
        back[places] = np.arange(len(windows))
        return np.asarray(rows[back], np.float32)


class _Compute(Protocol):
    def __call__(self, batch: Sequence[Encoded], /) -> Array: ...


def check_heads(adapters: Sequence[LoraSpec], brings_head: Callable[[Path], bool]) -> None:
    """Raise `UnsupportedError` for a head in part, or for two: a head takes the place of the base's, or does not."""
    active = [one for one in adapters if one.scale and brings_head(one.path)]
    for one in active:
        if one.scale != 1:
            raise UnsupportedError(
                f"{one.path} brings a head, which cannot be scaled by {one.scale:g}.", hint="Use 1, or 0."
            )
    if len(active) > 1:
        raise UnsupportedError(
            f"{active[0].path} and {active[1].path} both bring a head, and the model has one.", hint="Give one of them."
        )


def with_adapter_heads(profile: Profile, heads: Iterable[Head | None]) -> Profile:
    """`profile` with what adapters bring, in any order: one that only pools does not take away another's layers."""
    for head in sorted(heads, key=lambda head: bool(head and head.layers)):
        profile = _with_adapter_head(profile, head)
    return profile


def _with_adapter_head(profile: Profile, head: Head | None) -> Profile:
    if head is None or not (head.layers or head.pooling):
        return profile
    head.check_width(profile.hidden_size, profile.path)
    if head.task != "embedding":
        return replace(profile, head=head)
    return replace(profile, head=head, pooling=head.pooling or profile.pooling, normalize=head.normalize)


def notice_of_decoder(profile: Profile, sink: Sink) -> None:
    """Say where vectors come from a model that was not made for them."""
    if not profile.is_encoder and profile.head is None:
        sink(
            Notice(
                f"{profile.path.name} writes text; its last hidden states ({profile.pooling!r} of them) "
                "tell texts apart worse than a sentence-embedding model's do.",
                level="warning",
            )
        )


def _with_prompt(prompt: str, text: Text) -> Text:
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])


def _average(rows: Array, counts: Sequence[int], lengths: Sequence[int]) -> Array:
    """One row a text: the mean of its windows' rows, weighted by their tokens."""
    if len(counts) == len(rows):
        return rows
    weights = np.asarray(lengths, np.float32)[:, None]
    starts = np.cumsum([0, *counts[:-1]])
    return np.asarray(np.add.reduceat(rows * weights, starts) / np.add.reduceat(weights, starts), np.float32)


def _classification(head: Head, row: Array, threshold: float | None) -> Classification:
    if head.task == "regression":
        return Classification({}, values=tuple(float(value) for value in row))
    several = head.task == "multilabel"
    labels = _distinct(head.labels) or tuple(f"LABEL_{number}" for number in range(len(row)))
    scores = dict(zip(labels, map(float, sigmoid(row) if several else softmax(row)), strict=True))
    least = 0.5 if threshold is None and several else threshold or 0.0
    if several:
        return Classification(scores, tuple(label for label, score in scores.items() if score >= least))
    best = max(scores, key=lambda label: scores[label])
    return Classification(scores, (best,) if scores[best] >= least else ())


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """`labels`, the later ones of a name that several classes have with their class's number after it."""
    return tuple(f"{label} ({at})" if label in labels[:at] else label for at, label in enumerate(labels))
