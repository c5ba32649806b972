"""Gradient checkpointing by need: decided before the run or in the middle of it, remembered, and without any effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli.main import edgetune
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Event, Metrics, Notice
from edgetune.training import TrainSettings, resume, train
from edgetune.training.layout_lean import start_checkpointing
from edgetune.training.loop import Loop
from edgetune.training.settings import merge_settings, parse_setting, read_recipe
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture
def settings(base_dir: Path, tmp_path: Path) -> TrainSettings:
    rows = [{"prompt": "the " * count, "completion": " quick fox" * (1 + count % 3)} for count in range(1, 9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = str(tmp_path / "run")
    given: dict[str, Any] = {"task": "completion", "dtype": "f32", "rank": 4, "steps": 4, "lr": 5e-3, "dropout": 0.1}
    return TrainSettings(model=str(base_dir), data=(str(data),), out=out, eval=False, save_every=1, **given)


PREPARE = import_module("edgetune.training.prepare")


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREPARE, "free_memory_bytes", lambda device: 1 << 50)


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter_model.safetensors").read_bytes()


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, *, step: int, times: int) -> None:
    """Memory runs out `times` times in the step after `step`, at the end of a backward pass."""
    original, left = Loop._backward, [times]

    def backward(loop: Loop, *args: Any) -> float:
        loss = original(loop, *args)
        if loop.position.step == step and left[0]:
            left[0] -= 1
            raise MemoryError
        return loss

    monkeypatch.setattr(Loop, "_backward", backward)


def collect() -> tuple[list[str], Callable[[Event], None]]:
    told: list[str] = []
    return told, lambda event: told.append(event.text) if isinstance(event, Notice) else None


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [((), "auto"), (("--grad-checkpointing",), "on"), (("--no-grad-checkpointing",), "off"),
     (("--gradient-checkpointing", "off"), "off"), (("--gradient-checkpointing", "auto"), "auto")],
)  # fmt: skip
def test_every_spelling_of_the_flag(settings: TrainSettings, flags: tuple[str, ...], chosen: str) -> None:
    command = ["train", "-m", settings.model, "-d", *settings.data, "--task", "completion", "--dry-run", "--json"]
    told = CliRunner().invoke(edgetune, [*command, *flags])
    assert told.exit_code == 0, told.stderr
    record = json.loads(told.stdout)
    assert record["settings"]["grad_checkpointing"] == chosen
    assert record["plan"]["grad_checkpointing"] == (chosen == "on")


def test_yes_and_no_are_understood(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for name, value, wanted in (
        ("grad-checkpointing", "true", "on"), ("grad_checkpointing", "false", "off"),
        ("gradient-checkpointing", '"auto"', "auto"),
    ):  # fmt: skip
        recipe.write_text(f"{name} = {value}\n", encoding="utf-8")
        assert merge_settings(read_recipe(recipe), {}).grad_checkpointing == wanted
    assert parse_setting("grad_checkpointing", "yes") == "on"
    assert TrainSettings.from_record({"grad_checkpointing": False}).grad_checkpointing == "off"
    with pytest.raises(UsageError, match="grad_checkpointing"):
        merge_settings({"grad_checkpointing": "perhaps"}, {})


def test_a_run_that_would_not_fit_checkpoints_and_comes_to_the_same(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = train(settings)
    assert free.metrics["settled"]["checkpointing"] == 0
    monkeypatch.setattr(PREPARE, "free_memory_bytes", lambda device: 1000)
    told, sink = collect()
    lean = train(replace(settings, out=str(tmp_path / "lean")), sink=sink)
    assert any(text.startswith("Gradient checkpointing is on") for text in told)
    assert lean.metrics["settled"]["checkpointing"] == 1
    assert adapter_bytes(lean.path) == adapter_bytes(free.path)
    told, sink = collect()
    off = train(replace(settings, out=str(tmp_path / "off"), grad_checkpointing="off"), sink=sink)
    assert off.metrics["settled"]["checkpointing"] == 0
    assert not any(text.startswith("Gradient checkpointing is on") for text in told)


def test_memory_that_runs_out_first_costs_checkpointing_then_the_batch(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings)
    settings = replace(settings, packing=False)
    run_out_of_memory(monkeypatch, step=1, times=3)
    told, sink = collect()
    run = train(replace(settings, out=str(tmp_path / "lean")), sink=sink)
    shortages = [text.split(": going on with ")[1].split(";")[0] for text in told if text.startswith("Out of memory")]
    assert shortages == ["gradient checkpointing", "2 sequences in a pass", "1 sequence in a pass"]
    assert run.metrics["settled"] == {"checkpointing": 1, "sequences": 1}
    assert run.metrics["tokens"] == whole.metrics["tokens"]
    assert run.metrics["learned_tokens"] == whole.metrics["learned_tokens"]


def test_checkpointing_in_the_middle_changes_nothing(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout as well: the step that is tried again draws the same numbers.
    assert settings.dropout > 0
    whole = train(settings)
    run_out_of_memory(monkeypatch, step=2, times=1)
    run = train(replace(settings, out=str(tmp_path / "lean")))
    assert run.metrics["settled"]["checkpointing"] == 1
    assert adapter_bytes(run.path) == adapter_bytes(whole.path)


def test_a_resumed_run_begins_with_what_its_checkpoint_came_to(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, packing=False, dropout=0.0)
    run_out_of_memory(monkeypatch, step=0, times=2)
    whole = train(settings)

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 3:
            raise Stop

    run_out_of_memory(monkeypatch, step=0, times=2)
    with pytest.raises(Stop):
        train(replace(settings, out=str(tmp_path / "cut")), sink=stop)
    told, sink = collect()
    run = resume(tmp_path / "cut", sink=sink)
    assert not any(text.startswith("Out of memory") for text in told)
    assert run.metrics["settled"] == whole.metrics["settled"] == {"checkpointing": 1, "sequences": 2}
    assert adapter_bytes(run.path) == adapter_bytes(whole.path)


def test_a_model_that_cannot_is_refused_in_a_sentence() -> None:
    with pytest.raises(UnsupportedError, match="does not compute its layers again"):
        start_checkpointing(object())
