"""What a report comes to: nothing said, or one sentence with what differs first."""

from __future__ import annotations

from edgetune.artifacts import ParityReport, VectorParity
from edgetune.errors import ParityError

WHAT = {
    "tokenizer": "token ids",
    "template": "chat template",
    "adapter_template": "adapter's chat template",
    "stop": "BOS, EOS, stop tokens",
    "structure": "structure",
    "adapter_effect": "adapter's effect",
    "head": "head",
}
"""Check → what a person calls it."""


def require_passed(report: ParityReport) -> None:
    """Raise `ParityError` with what differs first, unless `report` passed."""
    if report.passed:
        return
    failed = next((check for check in report.checks if not check.passed), None)
    logits = report.logits
    if failed is not None:
        what = WHAT.get(failed.name, failed.name)
        difference = f"{what} {'differ' if what.endswith('s') else 'differs'}: {failed.first_difference}"
    elif report.vectors is not None and not report.vectors.passed:
        difference = _vector_difference(report.vectors)
    else:
        assert logits is not None
        measured = getattr(logits, logits.bounded)
        kind = "mean" if logits.bounded == "mean_kl" else "largest"
        difference = (
            f"next-token distributions differ: {kind} KL {measured:.3g}, expected of this file type is at most "
            f"{logits.bound:.3g}; {logits.top1:.1%} of the most likely tokens agree"
        )
    name = report.lora_path or report.gguf_path
    raise ParityError(
        f"{name} is not what was trained: {difference}.",
        hint="Do not use this file. Convert again; if it stays so, please report the model's architecture.",
    )


def _vector_difference(vectors: VectorParity) -> str:
    scores = vectors.score_difference
    if scores is not None and not scores <= vectors.score_bound:
        return f"scores differ by {scores:.3g}, expected of this file type is at most {vectors.score_bound:.2g}"
    if vectors.bounded == "min_cosine":
        return f"vectors differ: the least cosine is {vectors.min_cosine:.6f}, expected is at least {vectors.bound:.6f}"
    return (
        f"vectors differ: 1 - cosine is {vectors.mean_distance:.3g} on average, expected of this file type is at most "
        f"{vectors.bound:.3g}"
    )
