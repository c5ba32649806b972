"""`edgetune bench`: what is measured, and that the context holds what each test says it holds. No times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from edgetune import bench
from edgetune.bench import BenchPlan, Speed, measure, measure_replies
from edgetune.cli.main import run
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import UsageError
from edgetune.events import Event, Notice, Progress
from tests.ggufs import base_gguf, lora_gguf

PLAN = BenchPlan(prompt=64, generated=8, depths=(0, 96), repetitions=2)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), ctx_size=256, threads=1) as opened:
        yield opened


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(Prompt tokens, tokens evaluated of them, tokens generated) of each reply that is made."""
    seen: list[tuple[int, int, int]] = []
    original = bench._run

    def recording(engine: LlamaEngine, ids: Sequence[int], tokens: int) -> Any:
        generation = original(engine, ids, tokens)
        timings = generation.timings
        seen.append((len(ids), len(ids) - timings.reused_tokens, tokens))
        return generation

    monkeypatch.setattr(bench, "_run", recording)
    return seen


def test_every_test_runs_behind_its_depth(engine: LlamaEngine, evaluated: list[tuple[int, int, int]]) -> None:
    engine.set_adapters([])
    speeds = list(measure(engine, PLAN))
    assert [(speed.test, speed.depth) for speed in speeds] == [("pp64", 0), ("tg8", 0), ("pp64", 96), ("tg8", 96)]
    assert all(len(speed.samples) == 2 and min(speed.samples) > 0 for speed in speeds)
    assert evaluated.count((64, 64, 1)) == 2  # the prompt alone
    assert evaluated.count((160, 64, 1)) == 2  # the same number behind 96 known tokens
    assert evaluated.count((96, 1, 8)) == 2  # generating: the history's last token, for its logits
    assert evaluated.count((128, 128, 1)) == 2  # a message behind a history, cold
    assert evaluated.count((128, 32, 1)) == 2  # and warm


def test_an_adapter_is_switched_there_and_back(engine: LlamaEngine, evaluated: list[tuple[int, int, int]]) -> None:
    adapter = LoraSpec(lora_gguf(), 1.0)
    engine.set_adapters([adapter])
    (speed,) = measure(engine, BenchPlan(prompt=0, generated=8, depths=(96,), repetitions=2))
    assert {"adapter_switch", "adapter_switch_back"} < set(speed.seconds)
    # Another scale knows nothing of what was evaluated under this one; on the way back the old entries are there.
    assert evaluated[-5:] == [(128, 128, 1), (128, 128, 1), (128, 1, 1), (128, 128, 1), (128, 1, 1)]
    assert speed.facts == {"adapter_switch_back_evaluated": 1}
    assert engine.adapters == (adapter,)
    engine.set_adapters([])


def test_without_adapters_there_is_no_switch(engine: LlamaEngine) -> None:
    engine.set_adapters([])
    (speed,) = measure(engine, BenchPlan(prompt=0, generated=8, depths=(0,), repetitions=1))
    assert set(speed.seconds) == {"first_token_cold", "first_token_warm"}


def test_what_the_context_does_not_take_is_left_out_and_said(engine: LlamaEngine) -> None:
    events: list[Event] = []
    plan = BenchPlan(prompt=512, generated=8, depths=(0, 96, 4096), repetitions=1)
    speeds = list(measure(engine, plan, sink=events.append))
    assert [(speed.test, speed.depth) for speed in speeds] == [("pp254", 0), ("tg8", 0), ("tg8", 96)]
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert "256 tokens" in notice.text
    assert "tg8 behind 4096" in notice.text
    assert events[-1] == Progress("measure", 3, 3, "tests")


def test_a_plan_that_measures_nothing_is_refused() -> None:
    for plan in (BenchPlan(prompt=0, generated=0), BenchPlan(generated=1)):
        with pytest.raises(UsageError):
            plan.check()


def test_the_median_is_not_moved_by_one_disturbed_repetition() -> None:
    record = Speed("tg8", 0, 8, (10.0, 11.0, 1.0), seconds={"first_token_cold": (0.5, 9.0, 0.25)}).record()
    assert record["tokens_per_second"] == 10.0
    assert record["first_token_cold_seconds"] == 0.5
    assert record["samples"] == [10.0, 11.0, 1.0]


def test_replies_with_and_without_guessing_compare(engine: LlamaEngine) -> None:
    plain = measure_replies(engine, tokens=40, repetitions=1)
    with LlamaEngine.open(base_gguf(), ctx_size=256, threads=1, draft="ngram") as guessing:
        drafted = measure_replies(guessing, tokens=40, repetitions=1)
    assert plain.keys() == drafted.keys() >= {"free"}
    assert all(plain[name].ids == drafted[name].ids for name in plain)
    assert all(replies.drafted.proposed == 0 for replies in plain.values())


def test_the_command_prints_a_list_of_tests(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-c", "512", "-p", "32", "-n", "8", "-d", "0,16", "-r", "1", "-t", "1"]
    arguments = ["bench", str(base_gguf()), "--lora", str(lora_gguf()), "--draft", "ngram", *flags, "--json"]
    assert run(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["test"], row["depth"]) for row in rows[:4]] == [("pp32", 0), ("tg8", 0), ("pp32", 16), ("tg8", 16)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert all(row["weights_bytes"] > 0 and row["kv_bytes"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[0]["adapters"] == [{"path": str(lora_gguf()), "scale": 1.0}]
    assert rows[3]["adapter_switch_seconds"] > 0
    assert {row["reply"] for row in rows[4:]} == {"quoting", "free"}
    assert all(row["same_tokens"] and row["gain"] > 0 for row in rows[4:])


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(base_gguf()), "-c", "128", "-p", "16", "-n", "4", "-d", "8", "-r", "1", "-t", "1"]) == 0
    shown = capsys.readouterr().out
    assert "pp16" in shown
    assert "tg4" in shown
    assert "memory: weights" in shown


@pytest.mark.parametrize("flags", [["-d", "x"], ["-d", ""], ["-d", "-5"], ["-p", "0", "-n", "0"], ["-r", "0"]])
def test_wrong_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(base_gguf()), *flags]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["auto", "-1", "0"])
def test_layers_on_the_gpu_may_be_left_to_us(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(base_gguf()), "the", "--raw", "-n", "1", "-ngl", value]) == 0
    assert run(["generate", str(base_gguf()), "the", "--raw", "-n", "1", "-ngl", "many"]) == 2
    assert "'many' is neither a number nor auto" in capsys.readouterr().err


def test_a_draft_model_of_another_vocabulary_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(base_gguf()), "the", "--raw", "-n", "1", "--draft", "pocket"]) == 3
    assert "another vocabulary" in capsys.readouterr().err
