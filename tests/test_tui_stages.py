"""Stages of the home screen: the words they are started with, the events that are heard of them, what is drawn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgetune.artifacts import RUN_RECORD
from edgetune.errors import UnsupportedError, UsageError
from edgetune.event_lines import EventLines, event_line, read_event
from edgetune.events import Event, Metrics, Notice, Progress
from edgetune.library import Entry, list_models, register
from edgetune.tui.details import details, read_losses
from edgetune.tui.stage_view import StageView
from edgetune.tui.stages import (
    Stage,
    StageEnd,
    actions_for,
    list_entries,
    train_arguments,
    use_arguments,
    verify_arguments,
)
from tests.drawn import PLAIN, text_of
from tests.gguf_files import write_adapter
from tests.ggufs import base_gguf, checkpoint
from tests.tui_pilot import write_run


def test_the_texts_to_use_a_model_on(tmp_path: Path) -> None:
    entry, rows = Entry("a", tmp_path / "m.gguf", "model", 0), tmp_path / "rows.jsonl"
    rows.touch()
    path = str(entry.path)
    assert use_arguments("classify", entry, "it's good") == ["classify", path, "it's good"]
    assert use_arguments("classify", entry, "slow -o but good") == ["classify", path, "slow -o but good"]
    assert use_arguments("embed", entry, f"'{rows}' -o v.npy") == ["embed", path, str(rows), "-o", "v.npy"]
    for answer in (" ", "--pair"):
        with pytest.raises(UsageError, match="No text"):
            use_arguments("classify", entry, answer)


def test_a_run_that_was_stopped_here_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs" / "cut", finished=False)
    register(write_run(tmp_path / "runs" / "done"))
    assert sorted(entry.name for entry in list_entries()) == ["cut", "done", "pocket"]
    cut = next(entry for entry in list_entries() if entry.name == "cut")
    assert [action.title for action in actions_for(cut)] == ["Go on"]


def test_training_arguments(tmp_path: Path) -> None:
    pocket = list_models()[0]
    assert train_arguments(pocket, "'my rows.jsonl' --epochs 2") == [
        "train", "-m", str(pocket.path), "-d", "my rows.jsonl", "--epochs", "2",
    ]  # fmt: skip
    done = Entry("done", write_run(tmp_path / "done"), "run", 0)
    assert train_arguments(done, "rows.jsonl") == ["train", "-m", "/models/base", "-d", "rows.jsonl"]
    cut = Entry("cut", write_run(tmp_path / "cut", finished=False), "run", 0)
    assert train_arguments(cut, "") == ["train", "--resume", str(cut.path)]
    for answer in ("", "  ", "--epochs 2", "'open"):
        with pytest.raises(UsageError):
            train_arguments(pocket, answer)


def test_verifying_finds_the_other_side(tmp_path: Path) -> None:
    gguf, source = base_gguf(), checkpoint()
    entry = Entry("base", gguf, "model", 0)
    with pytest.raises(UnsupportedError, match="is not in the library"):
        verify_arguments(entry)
    register(source)
    assert verify_arguments(entry) == ["verify", str(source.resolve()), str(gguf)]
    alone = Entry("alone", write_adapter(tmp_path / "alone.gguf"), "adapter", 0)
    with pytest.raises(UnsupportedError, match="lies in no run"):
        verify_arguments(alone)
    unconverted = Entry("run", write_run(tmp_path / "run"), "run", 0)
    with pytest.raises(UnsupportedError, match="no GGUF adapter yet"):
        verify_arguments(unconverted)


def test_events_pass_through_lines() -> None:
    events: list[Event] = [
        Progress("write", 1, 2, "tensors", "blk.0 \x1b[31m"),
        Notice("read ü", "warning"),
        Metrics(3, {"loss": 1.5}, split="valid", extra={"replayed": "yes"}),
    ]
    assert [read_event(event_line(event)) for event in events] == events
    assert all("\n" not in event_line(event) and "\x1b" not in event_line(event) for event in events)
    for other in ("", "error: no", '{"event": "dance"}', '{"event": "notice", "tex', '{"event": "notice", "words": 1}'):
        assert read_event(other) is None


def test_a_parent_is_told_events_in_place_of_words(capsys: pytest.CaptureFixture[str]) -> None:
    tell = EventLines()
    for done in range(1000):
        tell(Progress("write", done, 999, "tensors"))
    tell(Notice("made"))
    events = [read_event(line) for line in capsys.readouterr().err.splitlines()]
    assert events[0] == Progress("write", 0, 999, "tensors")
    assert events[-2:] == [Progress("write", 999, 999, "tensors"), Notice("made")]
    assert len(events) < 500


def test_a_stage_is_heard(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = tmp_path / "q.gguf"
    end = asyncio.run(Stage(["quantize", str(base_gguf()), str(made), "Q8_0"]).run(heard.append))
    assert (end.code, end.output, end.error) == (0, str(made), "")
    assert any(isinstance(event, Progress) and event.done == event.total for event in heard)
    assert any(isinstance(event, Notice) and event.text.startswith("Next: edgetune chat") for event in heard)
    end = asyncio.run(Stage(["quantize", str(tmp_path / "none.gguf"), "Q8_0"]).run(heard.append))
    assert end.code == 2
    assert "does not exist" in end.error
    assert "edgetune convert" in end.hint


def test_what_training_tells_is_drawn() -> None:
    view = StageView()
    for step in range(1, 30):
        view.take(Metrics(step, {"loss": 3 - step / 10, "lr": 1e-4, "tokens_per_second": 1234.0}))
        view.take(Progress("train", step, 60, "steps"))
    view.take(Metrics(0, {"loss": 3.0}, split="valid"))
    view.take(Metrics(29, {"loss": 0.25}, split="valid"))
    view.take(Notice("bad \x1b[2J row", "warning"))
    text = text_of(view.render("edgetune train", PLAIN, width=78), width=78)
    for part in ("running", "train 29/60 steps", "loss 0.1000", "3.0000 → 0.2500", "1,234", "bad ␛[2J row"):
        assert part in text
    view.end = StageEnd(130, "", "Stopped at step 29.", "edgetune train --resume runs/x")
    assert "stopped" in text_of(view.render("edgetune train", PLAIN, width=78))


def test_damaged_records_are_shown_as_such(tmp_path: Path) -> None:
    broken = write_run(tmp_path / "broken")
    (broken / RUN_RECORD).write_text("{")
    (broken / "metrics.jsonl").write_bytes(b'\xff\xfe{"loss": 1}\n[1]\n{"split": "train", "loss": "x"}\n')
    assert read_losses(broken) == ([], [])
    about = text_of(details(Entry("broken", broken, "run", 0), palette=PLAIN, width=60), width=300)
    assert "not a run record" in about
    assert actions_for(Entry("broken", broken, "run", 0))
    elsewhere = tmp_path / "peft"
    elsewhere.mkdir()
    (elsewhere / "adapter_config.json").write_text("{}")
    assert "trained elsewhere" in text_of(details(Entry("peft", elsewhere, "run", 0), palette=PLAIN, width=60))
