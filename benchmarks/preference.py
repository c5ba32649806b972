"""What preference tuning learns from real pairs: pocket, held-out pairs before and after, as a table.

    python -m benchmarks.preference [TASK…] [--pairs ends|demo|order] [--folds N] [--epochs N] [--write]

`ends`: 400 replies of alpaca_en_demo that end with a sentence, against the same text broken off inside a sentence,
before that end or behind it. `demo`: the 300 pairs of dpo_en_demo. `order`: 180 answers of gsm8k, the rejected one with
its sentences in the opposite order; 120 to learn, 60 held out. Of the first two, three of five folds are held out
in turn. Beside the tasks stand two peers that see the same pairs: the shorter reply, and a logistic regression of the
words (tf-idf, chosen minus rejected). `--write` puts the rows into docs/preference.md, in place of those of the same
name. Prompts with replies are cut to 384 tokens. A pair is won where the chosen reply is rewarded more, in KTO too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.training import TrainSettings, train

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "datasets"
PAGE = ROOT / "docs" / "preference.md"
FOLDS, TRIED = 5, 3
COMMON: dict[str, Any] = {
    "max_length": 384,
    "epochs": 2,
    "batch_size": 8,
    "lr": 5e-4,
    "save_every": 10_000,
    "samples": 0,
}
CHOSEN: dict[str, dict[str, Any]] = {"ends": {"epochs": 1, "lr": 1.5e-3}}
"""1.5e-3 did better than 5e-4 for dpo in one trial on 80 replies of the same set, some of which are held out here."""
TASKS = ("dpo", "orpo", "simpo", "kto")
_BEGIN, _END = "<!-- benchmarks/preference.py -->", "<!-- end -->"

_SENTENCE = re.compile(r"[^.!?]+(?<!\d)[.!?]+(?=\s|$)")

Pairs = list[dict[str, Any]]
Folds = Sequence[tuple[Pairs, Pairs]]
Found = list[tuple[float, float]]
"""Accuracy and margin, by fold."""


def demo() -> Folds:
    """The pairs of dpo_en_demo."""
    return _folds(_read("dpo_en_demo"))


def ends() -> Folds:
    """Replies of alpaca_en_demo up to the end of a sentence, against the same reply broken off inside one."""
    made, chance = Pairs(), random.Random(0)
    for row in _read("alpaca_en_demo"):
        prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        sentences = list(_SENTENCE.finditer(row["output"]))
        if len(prompt) > 120 or len(sentences) < 2:
            continue
        count = chance.randrange(1, min(len(sentences), 4))
        if sentences[count - 1].end() > 160:
            count = 1
        broken = sentences[count - chance.randrange(2)]  # the next sentence, or the last one that is kept
        words = [word.end() for word in re.finditer(r"[\w']+", broken.group())][1:-1]
        if words and sentences[count - 1].end() <= 160:
            end = broken.start() + chance.choice(words)
            replies = {"chosen": row["output"][: sentences[count - 1].end()], "rejected": row["output"][:end]}
            made.append({"prompt": prompt, **{name: text.strip() for name, text in replies.items()}})
    return _folds(made)


def order() -> Folds:
    """Answers of gsm8k against themselves, the sentences in the opposite order: the same words, the same length."""
    made: Pairs = []
    with (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        for item in map(json.loads, file):
            lines = re.sub(r"<<.*?>>", "", item["answer"].split("####")[0]).strip().splitlines()
            if len(lines) > 1:
                row = {"chosen": "\n".join(lines), "rejected": "\n".join(reversed(lines))}
                made.append({"prompt": item["question"], **row})
            if len(made) == 600:
                break
    return [(made[:120], made[400:460])]


def _read(name: str) -> Pairs:
    found: Pairs = json.loads((DATA / "llama-factory-demos" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _folds(pairs: Pairs) -> Folds:
    """What is learned, and what is held out, in three of five folds."""
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    parts = [set(order[number::FOLDS]) for number in range(TRIED)]
    return [
        ([row for at, row in enumerate(pairs) if at not in held], [pairs[at] for at in sorted(held)]) for held in parts
    ]


SETS = {"ends": ends, "demo": demo, "order": order}


def measure(task: str, folds: Folds, given: dict[str, Any]) -> tuple[Found, Found]:
    """Before and after."""
    before, after = Found(), Found()
    for rows, held in folds:
        with tempfile.TemporaryDirectory() as name:
            for split, part in (("train", rows), ("valid", held)):
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
                Path(name, f"{split}.jsonl").write_text(text, encoding="utf-8")
            settings = TrainSettings(
                model=str(ROOT / "models" / "pocket"), data=(name,), out=f"{name}/run", task=task, **given
            )
            run = train(settings)
            rewards = _rewards(run.path / "predictions.jsonl")
        first, last = run.metrics["valid_before"], run.metrics["valid"]
        before.append((first["reward_accuracy"], first["reward_margin"]))
        after.append((_won([better - worse for better, worse in rewards]), last["reward_margin"]))
        print(task, first, last, after[-1], flush=True)
    return before, after


def _rewards(predictions: Path) -> list[tuple[float, float]]:
    """Those of each pair's replies; judged replies come one pair after the other, the good one first."""
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    if "reward" not in rows[0]:
        return [(row["chosen_reward"], row["rejected_reward"]) for row in rows]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert all(
        good["prompt"] == bad["prompt"] and (good["label"], bad["label"]) == (True, False) for good, bad in pairs
    )
    return [(good["reward"], bad["reward"]) for good, bad in pairs]


def shorter(folds: Folds) -> list[float]:
    """How often the shorter reply is the chosen one."""
    return [_won([len(_rejected(row)) - len(_chosen(row)) for row in held]) for _, held in folds]


def words(folds: Folds) -> list[float]:
    """How often a logistic regression of the replies' words is right."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    found = []
    for rows, held in folds:
        vectors = TfidfVectorizer(sublinear_tf=True, min_df=2)
        vectors.fit([*map(_chosen, rows), *map(_rejected, rows)])
        learned, asked = (
            vectors.transform(map(_chosen, part)) - vectors.transform(map(_rejected, part)) for part in (rows, held)
        )
        model = LogisticRegression(fit_intercept=False, max_iter=2000)
        model.fit(vstack([learned, -learned]), [1] * len(rows) + [0] * len(rows))
        found.append(_won(model.decision_function(asked)))
    return found


def _won(scores: Sequence[float]) -> float:
    """How often the chosen reply scores more; a tie counts half."""
    rounded = np.round(np.asarray(scores, dtype=float), 9)
    return float(((rounded > 0) + 0.5 * (rounded == 0)).mean())


def _chosen(row: dict[str, Any]) -> str:
    return str(row["chosen"]["value"] if isinstance(row["chosen"], dict) else row["chosen"])


def _rejected(row: dict[str, Any]) -> str:
    return str(row["rejected"]["value"] if isinstance(row["rejected"], dict) else row["rejected"])


def _accuracy(values: Sequence[float], folds: Folds) -> str:
    """The mean and its standard error: over the folds, or over the rows of the only one."""
    mean = float(np.mean(values))
    if len(values) > 1:
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    else:
        error = (mean * (1 - mean) / len(folds[0][1])) ** 0.5
    return f"{mean:.3f} ± {error:.3f}"


def line(name: str, pairs: str, tried: int, given: dict[str, Any]) -> str:
    """A row of the table: pairs, who judges in `tried` folds, accuracy before and after, margin after."""
    folds = SETS[pairs]()[:tried]
    if name in TASKS:
        before, after = (
            list(zip(*found, strict=True)) for found in measure(name, folds, COMMON | CHOSEN.get(pairs, {}) | given)
        )
        cells = [_accuracy(before[0], folds), _accuracy(after[0], folds), f"{np.mean(after[1]):.2f}"]
    else:
        found = shorter(folds) if name == "the shorter reply" else words(folds)
        cells = ["–", _accuracy(found, folds), "–"]
    called = f"{name}, {given['epochs']} epochs" if given and name in TASKS else name
    return f"| {pairs} | {called} | {' | '.join(cells)} |"


def write(lines: Sequence[str]) -> None:
    """Put `lines` into the page's table, in place of rows of the same name."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(_BEGIN)
    table, tail = rest.split(_END)
    rows = table.strip().splitlines()
    for new in lines:
        names = new.split("|")[1:3]
        rows = [*(row for row in rows if row.split("|")[1:3] != names), new]
    PAGE.write_text(f"{head}{_BEGIN}\n" + "\n".join(rows) + f"\n{_END}{tail}", encoding="utf-8")


def main() -> None:
    """Measure the tasks named, or all of them, and both peers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--pairs", choices=SETS, default="ends")
    parser.add_argument("--folds", type=int, default=TRIED, help="how many of them (3)")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/preference.md")
    parser.add_argument("--epochs", type=int, help="instead of those of the pairs, told in the row")
    given = parser.parse_args()
    settings = {"epochs": given.epochs} if given.epochs else {}
    lines, started = [], time.perf_counter()
    for name in (*(given.tasks or TASKS), "the shorter reply", "words, logistic regression"):
        lines.append(line(name, given.pairs, given.folds, settings))
        print(f"{lines[-1]}  ({time.perf_counter() - started:.0f} s)", flush=True)
    if given.write:
        write(lines)


if __name__ == "__main__":
    main()
