"""Guessing ahead changes how many evaluations a reply takes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from converters import convert_base
from edgetune.engine.draft import DraftModel
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampling import Sampling
from edgetune.engine.speculation import DraftLength, NgramDrafter, StepCosts
from edgetune.errors import MismatchError
from edgetune.library import embedded_model_dir
from tests.ggufs import base_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)


@pytest.fixture(scope="module")
def plain() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def ngram() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), threads=1, draft="ngram") as opened:
        opened.costs.record(1, 1.0)
        for tokens in range(2, 17):
            opened.costs.record(tokens, 1.1)  # so cheap that guessing always pays
        opened.costs.record = lambda tokens, seconds: None  # type: ignore[method-assign]
        yield opened


def reply(engine: LlamaEngine, ids: Sequence[int], sampling: Sampling = GREEDY, count: int = 60, **options: Any) -> Any:
    generation = engine.generate(ids, sampling, max_tokens=count, **options)
    list(generation)
    return generation


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(seed=1, temp=0.3, ignore_eos=True),
        Sampling(seed=2, temp=0.2, repeat_penalty=1.05, ignore_eos=True),
        Sampling(seed=3, temp=0.2, mirostat=2, ignore_eos=True),
        Sampling(temp=0, grammar='root ::= ("a" | "b" | "the ")+'),
    ],
)
def test_the_same_tokens_come_out(plain: LlamaEngine, ngram: LlamaEngine, sampling: Sampling) -> None:
    ids = plain.tokenizer.encode("the dog was here and the dog was there and the dog was " * 3)
    expected = reply(plain, ids, sampling)
    found = reply(ngram, ids, sampling)
    assert found.ids == expected.ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason


def test_repetition_is_guessed(plain: LlamaEngine, ngram: LlamaEngine) -> None:
    # A greedy random model falls into a loop sooner or later.
    ids = plain.tokenizer.encode("the dog")
    found = reply(ngram, ids, count=300)
    assert found.ids == reply(plain, ids, count=300).ids
    assert found.drafted.accepted > 20
    assert found.drafted.accepted <= found.drafted.proposed
    assert reply(plain, ids).drafted.proposed == 0


def test_the_limit_and_the_context_hold(plain: LlamaEngine, ngram: LlamaEngine) -> None:
    ids = (plain.tokenizer.encode("one two three four " * 60))[:480]
    for count in (1, 2, 7, -1):
        found, expected = reply(ngram, ids, count=count), reply(plain, ids, count=count)
        assert found.ids == expected.ids
        assert found.context_full == expected.context_full


def test_what_was_guessed_wrong_is_not_reused(plain: LlamaEngine, ngram: LlamaEngine) -> None:
    ids = plain.tokenizer.encode("a b c d e f a b c d e f a b c ")
    first = reply(ngram, ids, count=40)
    longer = [*ids, *first.ids, 300]
    assert reply(ngram, longer, count=20).ids == reply(plain, longer, count=20).ids


def test_a_draft_model_changes_nothing_but_the_number_of_evaluations(plain: LlamaEngine) -> None:
    ids = plain.tokenizer.encode("hello world, the dog was here")
    with LlamaEngine.open(base_gguf(), threads=1, draft=str(base_gguf())) as engine:
        assert engine._draft is not None
        engine._draft._engine.costs.record(1, 1.0)
        engine.costs.record(1, 100.0)
        for tokens in range(2, 17):
            engine.costs.record(tokens, 100.0)
        engine.costs.record = lambda tokens, seconds: None  # type: ignore[method-assign]
        found = reply(engine, ids, count=40)
        assert found.ids == reply(plain, ids, count=40).ids
        # The draft is the model itself here: whatever it guesses is right.
        assert found.drafted.accepted == found.drafted.proposed > 10
        warm = Sampling(seed=5, temp=0.7, ignore_eos=True)
        assert reply(engine, ids, warm, 24).ids == reply(plain, ids, warm, 24).ids


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    pocket = tmp_path / "pocket.gguf"
    convert_base(embedded_model_dir(), pocket)
    with pytest.raises(MismatchError, match="another vocabulary"):
        LlamaEngine.open(base_gguf(), threads=1, draft=str(pocket))


def test_a_draft_model_is_tried_before_anything_was_measured(plain: LlamaEngine) -> None:
    class Small(DraftModel):
        cost = 0.1

    ids = plain.tokenizer.encode("hello world")
    with LlamaEngine.open(base_gguf(), threads=1) as engine:
        drafter = Small(engine, plain)
        assert DraftLength(StepCosts(), drafter).choose(drafter.find(ids), 15) > 0


def test_ngrams_find_the_latest_and_longest_context() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 9, 9, 5, 1, 2, 3, 7, 8, 6, 5, 1, 2, 3]
    assert drafter.find(text) == 4
    assert drafter.guess(text, 2) == [7, 8]
    assert drafter.find([*text, 4]) == 0
    assert NgramDrafter().find([1, 2]) == 0
    assert NgramDrafter().find([1, 2, 3]) == 0


def test_the_number_of_guesses_follows_cost_and_record() -> None:
    class Free:
        cost = 0.0

        def find(self, ids: Sequence[int]) -> int:
            return 8

        def guess(self, ids: Sequence[int], count: int) -> list[int]:
            return []

    cheap, dear = StepCosts(), StepCosts()
    for tokens in range(1, 17):
        cheap.record(tokens, 1.0 + 0.01 * tokens)
        dear.record(tokens, float(tokens))
    assert DraftLength(cheap, Free()).choose(8, 15) > 5
    assert DraftLength(dear, Free()).choose(8, 15) == 0
    length = DraftLength(cheap, Free())
    for _ in range(20):
        length.record(8, 5, 0)
    assert length.choose(8, 15) == 0
    for _ in range(20):
        length.record(8, 5, 5)
    assert length.choose(8, 15) == 15
    assert length.choose(8, 4) == 4


def paying(costs: StepCosts) -> int:
    class Sure:
        cost = 0.0

    length = DraftLength(costs, Sure())  # type: ignore[arg-type]
    for _ in range(20):
        length.record(8, 5, 5)
    return length.choose(8, 15)


def test_steps_that_something_else_delayed_do_not_end_guessing() -> None:
    costs = StepCosts()
    costs.record(12, 2.0)  # the end of the first prompt: nothing is in memory yet
    for _ in range(20):
        costs.record(1, 0.016)
    assert paying(costs) == 15
    for seconds in (0.080, 0.400, 0.081, 0.900, 0.079):
        costs.record(16, seconds)
    assert costs.ratio(16) == pytest.approx(0.081 / 0.016)
    assert paying(costs) == 15


def test_costs_of_a_busy_machine_are_forgotten() -> None:
    costs = StepCosts()
    costs.record(1, 0.016)
    for tokens in range(2, 17):
        for _ in range(3):
            costs.record(tokens, 2.0)
    for _ in range(120):
        costs.record(1, 0.016)
    assert paying(costs) == 0
    for _ in range(10):
        costs.record(1, 0.016)
    assert paying(costs) == 15


def test_a_machine_that_becomes_calm_does_not_make_guesses_look_dear() -> None:
    costs = StepCosts()
    for _ in range(9):
        costs.record(1, 0.160)
        costs.record(16, 0.800)
    for _ in range(9):
        costs.record(1, 0.016)
    assert costs.ratio(16) == pytest.approx(5)


def test_guessing_ends_once_it_has_become_dear() -> None:
    costs = StepCosts()
    for _ in range(9):
        costs.record(1, 1.0)
        costs.record(16, 2.0)
    assert paying(costs) == 15
    for _ in range(6):
        costs.record(16, 30.0)
    assert costs.ratio(16) == 30
