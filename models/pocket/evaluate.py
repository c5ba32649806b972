"""Held-out exact match of a model directory, greedy, with plain transformers: right or wrong to the last character.

Knows nothing of training; `python -m models.pocket.evaluate [DIRECTORY]` prints the table that stands in the card.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.pocket.generate import Message, Question, held_out

HERE = Path(__file__).parent
SEED = 1


@dataclass(frozen=True)
class Score:
    """What came out for some questions."""

    asked: int
    right: int
    ended: int
    """Replies that ended by themselves."""

    @property
    def exact_match(self) -> float:
        """Share of replies that equal the right one."""
        return self.right / self.asked


def replies(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], *, limit: int = 64
) -> list[tuple[str, bool]]:
    """The greedy reply to each prompt (at most `limit` tokens), and whether it ended by itself."""
    import torch

    texts = [tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=limit, do_sample=False, eos_token_id=2, pad_token_id=0)
        for i, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            found[i] = (tokenizer.decode(ids, skip_special_tokens=True), 2 in ids)
    return [found[i] for i in range(len(texts))]


def score(model: Any, tokenizer: Any, questions: Sequence[Question], *, show: int = 0) -> dict[str, Score]:
    """Score by skill, in the questions' order, with "all" last; prints the first `show` wrong replies of each skill."""
    got = replies(model, tokenizer, [question.messages for question in questions])
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    wrong: dict[str, int] = defaultdict(int)
    for question, (reply, ended) in zip(questions, got, strict=True):
        right = ended and reply == question.reply
        for name in (question.skill, "all"):
            counts[name] = [a + b for a, b in zip(counts[name], (1, right, ended), strict=True)]
        if not right and wrong[question.skill] < show:
            wrong[question.skill] += 1
            asked = " / ".join(message["content"] for message in question.messages)
            print(f"  {question.skill}: {asked!r} → {reply!r}, not {question.reply!r}")
    counts["all"] = counts.pop("all")
    return {name: Score(*values) for name, values in counts.items()}


def evaluate(directory: Path = HERE, *, per_skill: int = 100, show: int = 0) -> dict[str, Score]:
    """Load the model in `directory` and score it on `per_skill` held-out questions of every skill."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return score(model.eval(), tokenizer, held_out(SEED, per_skill), show=show)


def table(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| skill | questions | exact match | ended by itself |", "|---|---:|---:|---:|"]
    for name, s in scores.items():
        lines.append(f"| {name} | {s.asked} | {s.exact_match:.1%} | {s.ended / s.asked:.1%} |")
    return "\n".join(lines)


def demo_questions(name: str, split: str = "test") -> list[Question]:
    """The rows of a demo dataset as questions."""
    lines = (HERE / "demos" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    return [Question(name, tuple(row[:-1]), row[-1]["content"]) for row in rows]


if __name__ == "__main__":
    print(table(evaluate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, show=6)))
