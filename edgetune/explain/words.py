"""How tokens and numbers are written for people, on every page that shows an explanation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from edgetune.explain.page import Explanation
from edgetune.explain.spelling import segments

STEPS = ("Prompt", "Tokens", "Embedding", "Blocks", "Head", "The next token")
"""The titles of the six steps."""

LABEL_STEPS = (*STEPS[:4], "Pooling and head", "The answer")
"""The same of a model that ends in labels, a number or a vector."""

FILLED_STEPS = (*STEPS[:5], "The gap")
"""The same of a model that fills gaps."""

_POOLED = {
    "cls": "The first token's state is taken",
    "last": "The last token's state is taken",
    "mean": "The mean of all tokens' states is taken",
    "max": "Of each dimension the largest is taken",
}
"""What a pooling does."""


def titles(explanation: Explanation) -> tuple[str, ...]:
    """The titles of the six steps of what is told."""
    run = explanation.runs[0]
    return STEPS if run.steps else FILLED_STEPS if run.gap >= 0 else LABEL_STEPS


def head_text(explanation: Explanation) -> str:
    """What becomes of the last states; empty where that is not known."""
    stack, run = explanation.anatomy.stacks[-1], explanation.runs[0]
    if run.steps or run.gap >= 0:
        whose = "The last" if run.steps else "Each"
        tied = " It is the embedding table again." if explanation.anatomy.tied else ""
        return (
            f"{whose} token's {stack.hidden_size:,} numbers become one score for each of "
            f"{explanation.anatomy.vocabulary:,} tokens.{tied}"
        )
    if not run.pooling:
        return ""
    normalized = ", brought to length 1" if run.is_normalized else ""
    return f"{_POOLED[run.pooling]}: {stack.hidden_size:,} numbers for the whole text{normalized}."


ADDED_BEFORE_NORM = "A norm follows each addition in these blocks; told is what is added before it."

_NAMED = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(piece: str) -> str:
    """A token's text with white space and control characters made visible, and ⟨bytes⟩ of a part of a character."""
    return "".join(f"⟨{part}⟩" if is_bytes else _written(part) for part, is_bytes in segments(piece))


def _written(text: str) -> str:
    return "".join(_NAMED.get(sign) or (f"\\x{ord(sign):02x}" if _acts(sign) else sign) for sign in text) or "∅"


def with_whole(piece: str, completes: str) -> str:
    """A token's text, and the character that it ends."""
    return visible(piece) + (f"→{visible(completes)}" if completes else "")


def readable(text: str) -> str:
    """A text of several lines with its control characters made visible."""
    lines = (line.split(" ") for line in text.split("\n"))
    return "\n".join(" ".join(visible(word) if word else "" for word in words) for words in lines)


def _acts(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co")


def counted(count: int, what: str) -> str:
    """So many of something: "1 block", "2 blocks"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share of one: "97 %", "0.3 %", "<0.01 %"."""
    value = 100 * share
    if value >= 99.5:
        return f"{value:,.0f} %"
    if 0 < value < 0.01:
        return "<0.01 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.1 else f"{value:.2g} %"


def number(value: float | None) -> str:
    """Three digits of it; empty for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lengths(values: Sequence[float]) -> str:
    """How long some vectors are: "lengths 6.7 to 12"."""
    low, high = number(min(values)), number(max(values))
    return f"length {low}" if low == high else f"lengths {low} to {high}"


def grouped(value: float) -> str:
    """A large number with its thousands apart, a small one with one decimal."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
