"""Data with weights: what an epoch holds, for every kind of task, and that a resumed run has the same epochs."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.cli.main import run as edgetune
from edgetune.errors import InterruptedRun, UnsupportedError, UsageError
from edgetune.events import Event, Metrics
from edgetune.training import TrainSettings, merge_settings, prepare, resume, train
from edgetune.training.mixing import Mix, Part, mix
from edgetune.training.settings import split_weight
from tests.checkpoints import write_checkpoint
from tests.task_models import write_model

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> TrainSettings:
    one = write(tmp_path / "a.jsonl", [{"prompt": word, "completion": f" {word}!"} for word in WORDS])
    other = write(tmp_path / "b.jsonl", [{"prompt": word * 2, "completion": " no"} for word in WORDS[:4]])
    return TrainSettings(
        model=str(decoder),
        data=(f"{one}:0.5", f"{other}:2"),
        out=str(tmp_path / "run"),
        dtype="f32",
        rank=2,
        batch_size=2,
        epochs=2,
        eval=False,
        task="completion",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl", 1.0)),
        ("a.jsonl:2", ("a.jsonl", 2.0)),
        ("dir/a:.25", ("dir/a", 0.25)),
        ("a:2:0.5", ("a:2", 0.5)),
        ("a.jsonl:2x", ("a.jsonl:2x", 1.0)),
        ("C:2", ("C:2", 1.0)),
    ],
)
def test_a_weight_stands_behind_the_path(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


def test_an_epoch_has_what_the_weights_say_and_all_come_in_turn() -> None:
    indices = np.arange(100, 110)
    part = Part("a", 2.3, indices)
    found = Counter(part.epoch(0, 0).tolist())
    assert part.size == sum(found.values()) == 23
    assert sorted(found.values()) == [2] * 7 + [3] * 3
    quarter = Part("b", 0.2, indices)
    epochs = [quarter.epoch(0, epoch).tolist() for epoch in range(5)]
    assert sorted(index for epoch in epochs for index in epoch) == indices.tolist()
    assert epochs == [quarter.epoch(0, epoch).tolist() for epoch in range(5)]
    assert epochs != [quarter.epoch(1, epoch).tolist() for epoch in range(5)]
    assert Part("c", 0.01, indices).size == 1
    assert Mix.even(4).epoch(3, 9).tolist() == [0, 1, 2, 3]
    assert Mix.even(4).record() == []


ROWS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": word, "completion": f" {word}!"} for word in WORDS],
    "dpo": [{"prompt": word, "chosen": " yes", "rejected": " no"} for word in WORDS],
    "kto": [{"prompt": word, "chosen": " yes", "rejected": " no"} for word in WORDS],
    "classification": [{"text": f"the {word}", "label": str(len(word) > 3)} for word in WORDS],
    "embedding": [{"anchor": f"the {word}", "positive": word} for word in WORDS],
}


@pytest.mark.parametrize("task", list(ROWS))
def test_the_sequences_of_every_task_know_their_file(task: str, decoder: Path, tmp_path: Path) -> None:
    base = decoder if task in ("completion", "dpo", "kto") else write_model(tmp_path / "bert", "bert")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "rows.jsonl", ROWS[task][:3])
    other = write(tmp_path / "b.jsonl", ROWS[task][3:])
    prepared = prepare(TrainSettings(model=str(base), data=(str(other), f"{folder}:3"), task=task, dtype="f32"))
    each = 2 if task == "kto" else 1
    assert [(part["data"], part["sequences"], part["in_an_epoch"]) for part in prepared.mix.record()] == [
        (str(other), 5 * each, 5 * each),
        (str(folder), 3 * each, 9 * each),
    ]
    (part,) = [part for part in prepared.mix.parts if part.weight == 3]
    chosen = {prepared.splits["train"].rows_of[index] for index in part.indices}  # type: ignore[index]
    assert {prepared.dataset.examples["train"][row][0].rpartition(",")[0] for row in chosen} == {
        str(folder / "rows.jsonl")
    }


def test_a_resumed_run_has_the_same_epochs(settings: TrainSettings, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 7 and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(replace(settings, out=str(tmp_path / "whole")))
    assert whole.metrics["step"] == 2 * (4 + 8) // 2
    assert [part["weight"] for part in whole.data["mix"]] == [0.5, 2.0]
    with pytest.raises(InterruptedRun):
        train(settings, sink=stop)
    changed = replace(settings, data=(settings.data[0], settings.data[1].replace(":2", ":3")))
    with pytest.raises(UsageError, match=r"b\.jsonl:3.* was .*b\.jsonl:2"):
        resume(Path(settings.out), settings=changed)
    resumed = resume(Path(settings.out))
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()

    plain = tuple(split_weight(text)[0] for text in settings.data)
    ones = train(replace(settings, data=tuple(f"{path}:1" for path in plain), out=str(tmp_path / "ones")))
    bare = train(replace(settings, data=plain, out=str(tmp_path / "bare")))
    assert (ones.path / name).read_bytes() == (bare.path / name).read_bytes()
    assert "mix" not in bare.data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a.jsonl:0",), "a.jsonl has the weight 0, expected more than 0"),
        (("a.jsonl:2000",), "expected more than 0 and at most 1000"),
        (("a.jsonl:2", "a.jsonl:3"), "the same data are given with several weights"),
    ],
)
def test_weights_that_make_no_sense_are_refused(data: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"(?i){message}"):
        merge_settings({"data": list(data)}, {})


def test_a_weight_needs_training_rows_and_a_task_that_knows_them(settings: TrainSettings, tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", [{"prompt": "fox", "completion": " dog"}])
    with pytest.raises(UsageError, match=r"valid\.jsonl has the weight 2, but no training rows"):
        prepare(replace(settings, data=(*settings.data, f"{valid}:2"), eval=True))
    prepared = prepare(settings)
    unknown = replace(prepared.splits["train"], rows_of=None)
    with pytest.raises(UnsupportedError, match="does not say which row a sequence is of"):
        mix(settings.data_weights, prepared.dataset, unknown)


def test_the_plan_shows_the_mix(settings: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "-m", settings.model, "-d", settings.data[0], "-d", settings.data[1], "--task", "completion"]
    assert edgetune([*words, "--dry-run", "--no-eval", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [part["in_an_epoch"] for part in said["data"]["mix"]] == [4, 8]
    assert said["plan"]["steps_per_epoch"] == 3
    assert edgetune([*words, "--dry-run", "--no-eval"]) == 0
    assert "b.jsonl: weight 2, 8 of its 4 sequences an epoch" in capsys.readouterr().err
