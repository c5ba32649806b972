"""What predictions are worth, by the field's own libraries: scikit-learn, scipy, sacrebleu, rouge-score.

Pure functions of predictions and truths; each library is imported when it is needed. Nothing here runs a model.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RECALL_AT = (1, 5, 10)

CLASSIFICATION = {"accuracy": True, "macro_f1": True, "weighted_f1": True}
MULTILABEL = {"micro_f1": True, "macro_f1": True, "exact_match": True}
REGRESSION = {"mse": False, "mae": False, "pearson": True, "spearman": True}
TEXT = {
    "exact_match": True,
    "token_f1": True,
    "bleu": True,
    "chrf": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
}
RETRIEVAL = {**{f"recall@{k}": True for k in RECALL_AT}, "ndcg@10": True}
SIMILARITY = {"spearman": True, "pearson": True}
"""Names → whether more is better."""


def classification(true: Sequence[int], found: Sequence[int], labels: int) -> tuple[dict[str, float], list[list[int]]]:
    """Metrics and the confusion matrix (true by found) of one class a row."""
    from sklearn import metrics

    every = list(range(labels))
    scores = {
        average: float(metrics.f1_score(true, found, labels=every, average=average, zero_division=0))
        for average in ("macro", "weighted")
    }
    values = {"accuracy": float(metrics.accuracy_score(true, found))}
    values |= {f"{average}_f1": score for average, score in scores.items()}
    return values, metrics.confusion_matrix(true, found, labels=every).tolist()


def multilabel(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """Metrics of any number of classes a row; both (rows, labels)."""
    from sklearn import metrics

    values = {
        f"{average}_f1": float(metrics.f1_score(true, found, average=average, zero_division=0))
        for average in ("micro", "macro")
    }
    return {**values, "exact_match": float(metrics.accuracy_score(true, found))}


def regression(true: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Errors and correlations of numbers."""
    from sklearn import metrics

    values = {
        "mse": float(metrics.mean_squared_error(true, found)),
        "mae": float(metrics.mean_absolute_error(true, found)),
    }
    return {**values, **correlations(true, found)}


def correlations(true: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side never changes, of which they say nothing."""
    from scipy import stats

    if len(set(true)) < 2 or len(set(found)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(true, found).statistic),
        "spearman": float(stats.spearmanr(true, found).statistic),
    }


def texts(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """How close written texts are to the wanted ones: BLEU and chrF from 0 to 100, the others from 0 to 1."""
    import sacrebleu
    from rouge_score import rouge_scorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(list(kinds))
    scored = [scorer.score(target, prediction) for prediction, target in zip(found, wanted, strict=True)]
    pairs = [(_normal(prediction), _normal(target)) for prediction, target in zip(found, wanted, strict=True)]
    return {
        "exact_match": float(np.mean([prediction == target for prediction, target in pairs])),
        "token_f1": float(np.mean([_overlap(*pair) for pair in pairs])),
        "bleu": float(sacrebleu.corpus_bleu(list(found), [list(wanted)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(found), [list(wanted)]).score),
        **{kind: float(np.mean([row[kind].fmeasure for row in scored])) for kind in kinds},
    }


def _normal(text: str) -> str:
    """SQuAD's way to compare answers: no case, punctuation, articles or extra white space."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap(found: str, wanted: str) -> float:
    found_words, wanted_words = found.split(), wanted.split()
    if not found_words or not wanted_words:
        return float(found_words == wanted_words)
    common = sum((Counter(found_words) & Counter(wanted_words)).values())
    return 2 * common / (len(found_words) + len(wanted_words))


def retrieval(scores: Floats, relevant: NDArray[np.bool_]) -> dict[str, float]:
    """How high the relevant documents of each query come; both (queries, documents)."""
    from sklearn import metrics

    # A stable sort on the negative: of equal scores the first document comes first, on every machine.
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(relevant, order, axis=1)
    wanted = relevant.sum(axis=1)
    values = {f"recall@{k}": float(np.mean(ranked[:, :k].sum(axis=1) / np.minimum(wanted, k))) for k in RECALL_AT}
    if scores.shape[1] < 2:
        return {**values, "ndcg@10": 1.0}
    return {**values, "ndcg@10": float(metrics.ndcg_score(relevant.astype(float), scores, k=10))}


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """A weight a class, so that every class counts as much as any other and the mean weight of a row is 1."""
    from sklearn.utils.class_weight import compute_class_weight

    rows: Any = np.repeat(np.arange(len(counts)), counts)
    return [float(weight) for weight in compute_class_weight("balanced", classes=np.arange(len(counts)), y=rows)]
