"""Rows held out by themselves, rows that are there twice, rows that leak into what is measured."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import Dataset, read_dataset
from edgetune.data.columns import Labelled
from edgetune.data.overlap import MOST_ROWS, find_overlap, hold_out
from edgetune.data.preferences import Judged, Preference, Prompt
from edgetune.events import Event, Notice


def write_rows(path: Path, numbers: Sequence[int]) -> Path:
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*paths: Path, **options: Any) -> tuple[Dataset, dict[str, str]]:
    """The dataset, and what was said of it by level."""
    said: list[Event] = []
    dataset = read_dataset(list(paths), has_template=False, **{"valid_share": 0.05, **options}, sink=said.append)
    levels = ("info", "warning")
    texts = [[n.text for n in said if isinstance(n, Notice) and n.level == level] for level in levels]
    return dataset, dict(zip(levels, map("\n".join, texts), strict=True))


def prompts(dataset: Dataset, split: str) -> list[str]:
    return [example.prompt for _, example in dataset.examples.get(split, ())]


def test_rows_are_held_out_by_their_content(tmp_path: Path) -> None:
    dataset, said = read(write_rows(tmp_path / "rows.jsonl", range(100)))
    held = prompts(dataset, "valid")
    assert len(held) == 5
    assert sorted(held + prompts(dataset, "train")) == sorted(f"question {number}" for number in range(100))
    assert "valid: 5 of the training rows are held out" in said["info"]

    shuffled = random.Random(1).sample(range(100), 100)
    again, _ = read(write_rows(tmp_path / "other.jsonl", [*shuffled, *range(20)]))
    assert set(prompts(again, "valid")) == set(held)
    assert not set(held) & set(prompts(again, "train"))
    assert len(prompts(again, "valid")) == 5

    grown, _ = read(write_rows(tmp_path / "grown.jsonl", range(120)), valid_share=5 / 120)
    assert len(set(prompts(grown, "valid")) & set(held)) >= 3


@pytest.mark.parametrize(
    ("numbers", "options"),
    [
        (list(range(39)), {}),
        ([0] * 100, {}),
        (list(range(100)), {"valid_share": 0.0}),
        (list(range(100)), {"splits": ("train",)}),
    ],
)
def test_too_few_rows_and_those_not_asked_for_are_not_split(
    tmp_path: Path, numbers: list[int], options: dict[str, Any]
) -> None:
    dataset, said = read(write_rows(tmp_path / "rows.jsonl", numbers), **options)
    assert "valid" not in dataset.examples
    assert len(dataset.examples["train"]) == len(numbers)
    assert "held out" not in said["info"]


def test_given_validation_rows_are_the_validation_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", range(100))
    write_rows(tmp_path / "valid.jsonl", range(100, 103))
    dataset, said = read(tmp_path)
    assert (len(dataset.examples["train"]), len(dataset.examples["valid"])) == (100, 3)
    assert said["warning"] == ""
    assert "repeat" not in said["info"]


@pytest.mark.parametrize("options", [{}, {"splits": ("train",)}])
def test_repeated_and_leaked_rows_are_told(tmp_path: Path, options: dict[str, Any]) -> None:
    write_rows(tmp_path / "train.jsonl", [0, 1, 2, 2, 2])
    write_rows(tmp_path / "valid.jsonl", [5, 2, 6])
    write_rows(tmp_path / "test.jsonl", [0, 1, 9, 10])
    _, said = read(tmp_path, **options)
    assert "train: 2 of 5 rows repeat another one exactly." in said["info"]
    assert "valid: 1 of 3 rows are training rows too" in said["warning"]
    assert "test: 2 of 4 rows are training rows too" in said["warning"]


def test_preferences_of_one_prompt_stay_together_and_leak_by_it() -> None:
    rows = [
        (f"line {number}", Judged(Prompt(f"question {number // 2}"), f"answer {number}", bool(number % 2)))
        for number in range(120)
    ]
    train, valid = hold_out(rows, 0.1)
    assert len(valid) == 12
    assert not {row.prompt for _, row in train} & {row.prompt for _, row in valid}
    said: list[Event] = []
    pair = Preference(Prompt("question 1"), "yes", "no")
    splits: dict[str, list[tuple[str, Any]]] = {
        "train": [("1", pair)],
        "valid": [("2", Preference(pair.prompt, "no", "perhaps")), ("3", rows[9][1])],
    }
    assert find_overlap(splits, said.append).leaked == {"valid": 1}
    assert said == [Notice("valid: 1 of 2 rows have a training row's prompt and tell little.", "warning")]


def test_a_test_file_of_another_kind_is_passed_over(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [0, 1])
    (tmp_path / "test.jsonl").write_text('{"what": 1}\n{broken\n', encoding="utf-8")
    dataset, said = read(tmp_path)
    assert said["warning"] == ""
    assert dataset.skipped.problems == []


def test_every_label_keeps_a_row_and_few_rows_are_enough() -> None:
    rows = [(str(number), Labelled(f"text {number}", None, (f"label {min(number, 30)}",))) for number in range(200)]
    train, valid = hold_out(rows, 0.5)
    assert {example.labels for _, example in train} == {example.labels for _, example in rows}
    assert len(valid) == 100
    many = [(str(number), Labelled(str(number), None, ("a",))) for number in range(2000)]
    assert len(hold_out(many, 0.5)[1]) == MOST_ROWS
