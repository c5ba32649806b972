"""Models with a table of positions: no row of training, evaluation or writing is ever longer than the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.data import Tokenized
from edgetune.errors import UsageError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, prepare, train
from edgetune.training.batches import collate
from edgetune.training.forecast import forecast
from edgetune.training.packing import collate_packed
from edgetune.training.samples import read_samples
from tests.checkpoints import write_checkpoint
from tests.task_models import write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = 100
LENGTHS = [(20, 3), (60, 18), (60, 19), (40, 40), (70, 9), (72, 8), (75, 9)]
"""Words of a question and its answer; most end within the last sixteen places, or are cut there."""


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_positions": PLACES, "n_embd": 64, "n_head": 4}
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "gpt2", overrides=sizes)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": "fox " * n}, {"role": "assistant", "content": "dog " * m}]}
        for n, m in LENGTHS
    ]
    return write_rows(tmp_path / "chats", {"train": rows, "valid": rows})


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = [{"prompt": "fox " * n, "chosen": "dog " * m, "rejected": "lazy " * m} for n, m in LENGTHS]
    return write_rows(tmp_path / "preferences", {"train": rows, "valid": rows})


def settings(model: Path, data: Path, **changes: Any) -> TrainSettings:
    values = {"model": str(model), "data": (str(data),), "out": str(data.parent / "run"), "steps": 2, "batch_size": 2}
    return TrainSettings(**{**values, "rank": 2, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False, "eval_texts": 4},
        {"eval_texts": 4},
        {"method": "prompt", "prompt_tokens": 20},
        {"task": "dpo", "packing": False},
        {"task": "kto", "packing": False},
    ],
    ids=["padded", "packed", "prompt", "dpo", "kto"],
)
def test_rows_as_long_as_the_table_are_trained_measured_and_answered(
    changes: dict[str, Any], gpt2_dir: Path, chats: Path, preferences: Path
) -> None:
    chosen = settings(gpt2_dir, preferences if "task" in changes else chats, **changes)
    longest = max(len(one.ids) for one in _single(prepare(chosen).train))
    assert longest == PLACES - (20 if "method" in changes else 0)
    run = train(chosen)
    assert run.finished
    assert set(read_samples(run.path)) == {"before", "after"}


def _single(sequences: Any) -> list[Any]:
    """The rows that a model is given, of pairs and of judged replies as well."""
    return [
        getattr(sequence, name)
        for sequence in sequences
        for name in ("chosen", "rejected", "whole", "mismatched")
        if hasattr(sequence, name)
    ] or [*sequences]


def test_more_tokens_than_positions_are_refused(gpt2_dir: Path, chats: Path, tmp_path: Path) -> None:
    assert prepare(settings(gpt2_dir, chats)).max_length == PLACES
    for refused in (prepare, forecast):
        with pytest.raises(UsageError, match=r"--max-length is 200, but .* has 100 positions") as caught:
            refused(settings(gpt2_dir, chats, max_length=200))
        assert "--max-length 100 or less" in caught.value.hint
    with pytest.raises(UsageError, match="20 of them for the trained prompt") as caught:
        prepare(settings(gpt2_dir, chats, max_length=90, method="prompt"))
    assert "--max-length 80" in caught.value.hint
    with pytest.raises(UsageError, match="98 of them for the trained prompt") as caught:
        prepare(settings(gpt2_dir, chats, method="prompt", prompt_tokens=98))
    assert "--prompt-tokens" in caught.value.hint
    bert = write_model(tmp_path / "bert", "bert", overrides={"max_position_embeddings": 40})
    labelled = write_rows(tmp_path / "labels", {"train": [{"text": "fox " * n, "label": n % 2} for n in range(1, 50)]})
    with pytest.raises(UsageError, match="has 40 positions"):
        prepare(settings(bert, labelled, max_length=64))


def test_turned_positions_have_no_end_and_say_so(chats: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "tiny", "llama", overrides={"max_position_embeddings": PLACES})
    said: list[Event] = []
    prepared = prepare(settings(base, chats, max_length=200), sink=said.append)
    assert max(len(sequence.ids) for sequence in prepared.train) > PLACES
    assert any(isinstance(event, Notice) and "context of 100 tokens" in event.text for event in said)


def test_targets_as_long_as_a_decoders_table(tmp_path: Path) -> None:
    bart = write_model(tmp_path / "bart", "bart", overrides={"max_position_embeddings": 40})
    rows = [{"source": "fox " * n, "target": "dog " * (60 - n)} for n in range(1, 50)]
    data = write_rows(tmp_path / "rows", {"train": rows, "valid": rows[:4]})
    run = train(settings(bart, data, task="seq2seq", eval_texts=4))
    assert run.finished


def test_padding_and_filling_end_where_positions_end() -> None:
    def sequence(length: int) -> Tokenized:
        return Tokenized(np.arange(length, dtype=np.int32), np.ones(length, dtype=np.bool_))

    cpu = torch.device("cpu")
    assert collate([sequence(97)], cpu).input_ids.shape == (1, 112)
    assert collate([sequence(97)], cpu, most=100).input_ids.shape == (1, 100)
    assert collate([sequence(33)], cpu, most=100).input_ids.shape == (1, 48)
    row = collate_packed([sequence(20), sequence(13)], cpu)
    assert row.attention_mask.flatten().tolist() == [20, 13, 20, 11]
    assert int(row.position_ids.max()) == 19
    assert row.tokens == 33
