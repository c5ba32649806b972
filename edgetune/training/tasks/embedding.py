"""Sequence embeddings: texts that belong together come close, others go apart.

Pairs and triplets learn by InfoNCE against every other text of the batch (multiple negatives ranking); pairs with a
score by CoSENT or by the squared error of their cosine. The state is pooled as the base's sentence-transformers files
say, else by the mean over tokens (encoders) or the last token (decoders). Layers of those files stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, TextTokenizer
from edgetune.data.columns import EMBEDDING, Columns, Related
from edgetune.engine.torch.sentence_layers import apply_layer, load_layer, pool
from edgetune.errors import DataError, UsageError
from edgetune.events import Notice, Sink
from edgetune.head import POOLINGS, HeadLayer
from edgetune.sentence_modules import read_modules
from edgetune.training import metrics
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.choose import Kind
from edgetune.training.tasks.rows import Ids, ReadSequence, RowBatch, RowTask

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings


@dataclass(frozen=True)
class RelatedSequence(ReadSequence):
    """The texts of one row in ids, one after the other: anchor, positive, negatives."""

    parts: tuple[Ids, ...]
    example: Related


class EmbeddingTask(RowTask):
    """Anchors and what belongs to them."""

    auto_class: ClassVar[str] = "AutoModel"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    divisible: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("encoder", "decoder")
    way_out: ClassVar[str] = "Give an encoder, e.g. a sentence-transformers model."

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.modes: tuple[str, ...] = ("mean",)
        self.layers: list[HeadLayer] = []
        self.scored = False
        self.top_score = 1.0

    def formats(self) -> Sequence[Columns]:
        """Pairs, triplets, scored pairs."""
        return EMBEDDING

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Rows, and how the base pools."""
        dataset = super().read(settings, model_dir, has_template=has_template, sink=sink)
        default = "mean" if self.kind == "encoder" else "last"
        modules = read_modules(model_dir)
        own = modules.modes if modules else ()
        self.modes = own or (default,)
        self.layers = [load_layer(layer) for layer in modules.layers] if modules else []
        if settings.pooling != "auto":
            self.modes = (settings.pooling,)
            if own and own != self.modes:
                said = " and ".join(own)
                sink(Notice(f"--pooling {settings.pooling}, where the model's own files say {said}.", "warning"))
        elif not own:
            sink(Notice(f"The model does not say how its states become one: {default} pooling."))
        if self.kind == "decoder" and self.modes != ("last",):
            sink(Notice("In a decoder a token sees only those before it: --pooling last is usual.", "warning"))
        return dataset

    def check_rows(self, dataset: Dataset, sink: Sink) -> Dataset:
        """Scores for all pairs or for none; their range."""
        examples: Mapping[str, Sequence[tuple[str, Related]]] = dataset.examples
        self.scored = examples["train"][0][1].score is not None
        for rows in examples.values():
            for place, example in rows:
                if (example.score is not None) != self.scored:
                    raise DataError(f"{place}: some rows have a score and others none.", hint="Train on them apart.")
        if self.scored:
            scores = [example.score or 0.0 for _, example in examples["train"]]
            if min(scores) == max(scores):
                raise DataError(f"Every training pair has the score {scores[0]:g}: there is nothing to tell apart.")
            if self.settings.pair_loss == "cosine":
                self.top_score = max(1.0, max(map(abs, scores)))
                if self.top_score > 1:
                    sink(Notice(f"Scores go up to {self.top_score:g}; they are divided by it to compare with cosines."))
        elif self.settings.batch_size < 2:
            raise UsageError(
                "Pairs learn from the other texts of their batch, and --batch-size 1 has none.",
                hint="Use --batch-size 16 or more.",
            )
        return dataset

    def sequence(self, example: Related, tokenizer: TextTokenizer, max_length: int) -> tuple[RelatedSequence, bool]:
        """Each text as the tokenizer wraps it."""
        texts = (example.anchor, example.positive, *example.negatives)
        parts = [tokenizer.encode_whole(text, max_length=max_length) for text in texts]
        if not all(len(part.ids) for part in parts):
            return RelatedSequence(np.zeros(0, dtype=np.int32), (), example), False
        ids = tuple(part.ids for part in parts)
        return RelatedSequence(np.concatenate(ids), ids, example), any(part.cut for part in parts)

    def collate(self, sequences: Sequence[RelatedSequence], device: torch.device) -> RowBatch:
        """All anchors, all positives, then all negatives, as rows of one batch."""
        import torch

        rows = [sequence.parts[place] for place in (0, 1) for sequence in sequences]
        rows += [part for sequence in sequences for part in sequence.parts[2:]]
        scores = [(sequence.example.score or 0.0) / self.top_score for sequence in sequences]
        by_batch = self.scored and self.settings.pair_loss == "cosent"
        return RowBatch(
            inputs=self.padded(rows, device),
            labels=torch.tensor(scores, device=device),
            tokens=sum(map(len, rows)),
            learned_tokens=len(sequences),
            denominator=1 if by_batch else len(sequences),
            extra={"related": torch.from_numpy(_related(sequences)).to(device)},
        )

    def summed_loss(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """InfoNCE, CoSENT or the cosine's squared error."""
        return self._loss(self.embed(model, batch), batch)

    def predict(self, model: Any, batch: RowBatch) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss, and for each row the embeddings of its anchor and positive."""
        found = self.embed(model, batch)
        count = batch.learned_tokens
        vectors = found.cpu().numpy()
        return self._loss(found, batch), list(zip(vectors[:count], vectors[count : 2 * count], strict=True))

    def embed(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """Embeddings of the batch's rows in f32, of length 1: (rows, size)."""
        import torch

        extra = {"use_cache": False} if self.kind == "decoder" else {}
        states = model(**batch.inputs, **extra).last_hidden_state.float()  # (rows, tokens, hidden)
        lengths = batch.inputs["attention_mask"].sum(dim=1)
        found = torch.cat([pool(states, lengths, mode) for mode in self.modes], dim=-1)
        with torch.autocast(found.device.type, enabled=False):
            for layer in self.layers:
                found = apply_layer(layer, found)
        return torch.nn.functional.normalize(found, dim=-1)

    def _loss(self, found: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        import torch

        count = batch.learned_tokens
        anchors, others = found[:count], found[count:]
        if not self.scored:
            scores = anchors @ others.T / self.settings.temperature  # (anchors, positives and negatives)
            scores = scores.masked_fill(batch.extra["related"], -torch.inf)
            own = torch.arange(count, device=scores.device)
            return torch.nn.functional.cross_entropy(scores, own, reduction="sum")
        cosines = (anchors * others).sum(dim=-1)
        if self.settings.pair_loss == "cosine":
            return ((cosines - batch.labels) ** 2).sum()
        # Wherever a pair's score is below another's, its cosine should be too.
        differences = (cosines[:, None] - cosines[None, :]) / self.settings.temperature
        wrong = differences[batch.labels[:, None] < batch.labels[None, :]]
        return torch.logsumexp(torch.cat([wrong, wrong.new_zeros(1)]), dim=0)

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Correlation of scored pairs, else retrieval among the validation rows' positives."""
        return metrics.SIMILARITY if self.scored else metrics.RETRIEVAL

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """How well cosines order pairs, or find each anchor's positive among all of them."""
        anchors, positives = (np.stack([row[place] for row in said]) for place in (0, 1))
        examples: list[Related] = [sequence.example for sequence in sequences]
        cosines = (anchors * positives).sum(axis=1)
        rows = [
            {"anchor": example.anchor, "positive": example.positive, "similarity": round(float(cosine), 6)}
            for example, cosine in zip(examples, cosines, strict=True)
        ]
        if self.scored:
            scores = [example.score or 0.0 for example in examples]
            told = [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]
            return Measured(metrics.correlations(scores, cosines.tolist()), told)
        queries = {example.anchor: at for at, example in reversed(list(enumerate(examples)))}
        documents = {example.positive: at for at, example in reversed(list(enumerate(examples)))}
        query_of, document_of = _numbers(queries), _numbers(documents)
        relevant = np.zeros((len(queries), len(documents)), dtype=bool)
        for example in examples:
            relevant[query_of[example.anchor], document_of[example.positive]] = True
        scores_of_all = anchors[list(queries.values())] @ positives[list(documents.values())].T
        for row, example in zip(rows, examples, strict=True):
            found = scores_of_all[query_of[example.anchor]]
            row["rank"] = int((found > found[document_of[example.positive]]).sum()) + 1
        return Measured(metrics.retrieval(scores_of_all, relevant), rows)

    def data_record(self) -> dict[str, Any]:
        """How states become an embedding; empty for what only the base's own files can say."""
        return {"pooling": self.modes[0] if self.modes in [(one,) for one in POOLINGS] else ""}


def _related(sequences: Sequence[RelatedSequence]) -> NDArray[np.bool_]:
    """(anchors, positives and negatives): true where a text that belongs to an anchor is not its own row's.

    Such a text is neither to be found nor to be pushed away: the same question may have two answers in one batch.
    """
    owners = list(range(len(sequences)))
    texts = [sequence.example.positive for sequence in sequences]
    for row, sequence in enumerate(sequences):
        texts += sequence.example.negatives
        owners += [-1 - row] * len(sequence.example.negatives)
    positives: dict[str, set[str]] = {}
    for sequence in sequences:
        positives.setdefault(sequence.example.anchor, set()).add(sequence.example.positive)
    blocked = np.zeros((len(sequences), len(texts)), dtype=bool)
    for row, sequence in enumerate(sequences):
        belong = positives[sequence.example.anchor]
        blocked[row] = [text in belong and owner != row for text, owner in zip(texts, owners, strict=True)]
    return blocked


def _numbers(names: Mapping[str, int]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}
