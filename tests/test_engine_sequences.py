"""Several replies on one context, and entries that come back: whatever was switched in between, the numbers stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.engine import cache as cache_module
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError, UsageError
from tests.ggufs import base_gguf, lora_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)
WARM = Sampling(seed=3, temp=0.9, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def cold() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), threads=1) as opened:
        yield opened


def text_ids(engine: LlamaEngine, count: int, *, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(260, engine.tokenizer.n_vocab, count)]


def reply(engine: LlamaEngine, ids: Sequence[int], sampling: Sampling = GREEDY, count: int = 8, **options: Any) -> Any:
    generation = engine.generate(ids, sampling, max_tokens=count, **options)
    list(generation)
    return generation


def next_logits(engine: LlamaEngine, ids: Sequence[int], **options: Any) -> Any:
    """The distribution after `ids`, from whatever the cache holds, as an array over the vocabulary."""
    generation = reply(engine, ids, count=1, top=engine.tokenizer.n_vocab, **options)
    found = np.zeros(engine.tokenizer.n_vocab)
    for candidate in generation.choices[0].alternatives:
        found[candidate.id] = candidate.probability
    return found


def softmax(logits: Any) -> Any:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_a_switch_there_and_back_finds_the_old_entries(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 80)
    plain = reply(engine, ids)
    engine.set_adapters([LoraSpec(lora_gguf())])
    adapted = reply(engine, ids)
    assert adapted.reused_tokens == 0
    engine.set_adapters([])
    again = reply(engine, ids)
    assert again.reused_tokens == len(ids) - 1
    assert again.ids == plain.ids
    engine.set_adapters([LoraSpec(lora_gguf())])
    back = reply(engine, ids)
    assert back.reused_tokens == len(ids) - 1
    assert back.ids == adapted.ids != plain.ids


def test_another_scale_is_another_set(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 60)
    for scale in (1.0, 0.5, -1.0):
        engine.set_adapters([LoraSpec(lora_gguf(), scale)])
        assert reply(engine, ids).reused_tokens == 0
    engine.set_adapters([LoraSpec(lora_gguf(), 0.5)])
    assert reply(engine, ids).reused_tokens == len(ids) - 1


def test_after_every_kind_of_switch_the_numbers_are_those_of_a_cold_context(
    engine: LlamaEngine, cold: LlamaEngine
) -> None:
    long, other = text_ids(engine, 120), text_ids(engine, 90, seed=1)
    adapter, half = (LoraSpec(lora_gguf()),), (LoraSpec(lora_gguf(), 0.5), LoraSpec(lora_gguf(seed=1), -1.0))
    steps: list[tuple[tuple[LoraSpec, ...], list[int]]] = [
        ((), long), (adapter, long), ((), [*long, 300]), (adapter, long[:70]), (half, long), ((), other),
        ((), long[:50] + other), (half, long[:100]), (adapter, [*long, 5, 6]), ((), long), ((), long[:40]),
    ]  # fmt: skip
    for adapters, ids in steps:
        cold.set_adapters(adapters)
        expected = softmax(cold.logits(ids)[-1])
        assert np.abs(next_logits(engine, ids, adapters=adapters) - expected).max() < 1e-3


def test_an_adapter_of_a_single_reply_leaves_the_engines_own(engine: LlamaEngine, cold: LlamaEngine) -> None:
    ids = text_ids(engine, 20)
    plain = reply(engine, ids).ids
    once = reply(engine, ids, adapters=[LoraSpec(lora_gguf())]).ids
    assert engine.adapters == ()
    assert reply(engine, ids).ids == plain != once


@pytest.mark.parametrize("batched", [False, True])
def test_replies_side_by_side_are_what_they_are_alone(engine: LlamaEngine, batched: bool) -> None:
    ids, other = text_ids(engine, 40), text_ids(engine, 50, seed=1)
    adapter = [LoraSpec(lora_gguf())]
    settings: list[tuple[list[int], Sampling, dict[str, Any]]] = [
        (ids, GREEDY, {}), (ids, GREEDY, {"adapters": adapter}), (other, WARM, {}), (ids, WARM, {"top": 5}),
    ]  # fmt: skip
    alone = []
    for prompt, sampling, options in settings:
        engine.forget()
        alone.append(reply(engine, prompt, sampling, 20, **options))
    engine.forget()
    engine._opened.is_on_gpu = batched  # there a batch is tried first
    engine.costs.record(1, 1.0)
    engine.costs.record(2, 0.5 if batched else 9.0)
    together = [engine.generate(prompt, sampling, max_tokens=20, **options) for prompt, sampling, options in settings]
    said = ["", "", "", ""]
    order = []
    for number, text in engine.run_together(together):
        said[number] += text
        order.append(number)
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert said == [one.text for one in alone]
    # All of them speak before any has ended.
    assert {0, 1, 2, 3} <= set(order[:60])
    assert all(one.finish_reason == "length" for one in together)


def test_a_beginning_that_another_reply_holds_is_shared(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 60)
    first = engine.generate([*ids, 300], GREEDY, max_tokens=4)
    second = engine.generate([*ids, 301, 302], GREEDY, max_tokens=4)
    list(engine.run_together([first, second]))
    assert second.reused_tokens == len(ids)
    expected = reply(engine, [*ids, 301, 302], count=4)
    engine.forget()
    assert reply(engine, [*ids, 301, 302], count=4).ids == second.ids == expected.ids


def test_more_replies_than_sequences_are_refused(engine: LlamaEngine) -> None:
    running = [engine.generate([300 + number], GREEDY) for number in range(cache_module.SEQUENCES + 1)]
    for one in running[:-1]:
        next(one)
    with pytest.raises(EdgetuneError, match="running already"):
        next(running[-1])
    running[0].close()
    assert reply(engine, [300, 301]).ids


def test_replies_side_by_side_share_the_room_and_say_when_it_ends(engine: LlamaEngine) -> None:
    generations = [engine.generate(text_ids(engine, 200, seed=seed), GREEDY) for seed in range(2)]
    list(engine.run_together(generations))
    assert all(one.context_full and one.finish_reason == "length" for one in generations)
    assert reply(engine, text_ids(engine, 400)).ids


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_branch_goes_on_from_the_tokens_it_keeps(family: str) -> None:
    with LlamaEngine.open(base_gguf(family), threads=1) as engine:
        ids = text_ids(engine, 30)
        whole = reply(engine, ids, count=12, top=4)
        other = next(one for one in whole.choices[5].alternatives if one.id != whole.ids[5])
        branch = reply(engine, ids, count=6, prefix=[*whole.ids[:5], other.id], top=4)
        assert branch.ids[:6] == [*whole.ids[:5], other.id]
        assert len(branch.ids) == len(branch.choices) == 12
        assert branch.timings.generated_tokens == 6
        engine.forget()
        assert reply(engine, [*ids, *branch.ids[:6]], count=6).ids == branch.ids[6:]


def test_a_prefix_counts_as_prompt_and_one_that_ends_the_reply_ends_it(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 20, seed=7)
    whole = reply(engine, ids, count=6)
    branch = reply(engine, ids, count=4, prefix=whole.ids[:2])
    assert branch.timings.prompt_tokens == 22
    assert 0 <= branch.timings.reused_tokens < 22
    assert branch.timings.generated_tokens == 4
    end = min(engine.tokenizer.eog_ids)
    ended = reply(engine, ids, count=6, prefix=[*whole.ids[:2], end], top=2)
    assert (ended.ids, ended.finish_reason) == (whole.ids[:2], "stop")
    assert len(ended.choices) == 2


def test_a_prefix_that_ends_inside_a_character_is_completed(engine: LlamaEngine) -> None:
    pieces = {engine.tokenizer.piece(token): token for token in range(engine.tokenizer.n_vocab)}
    half = [pieces[bytes([byte])] for byte in "é".encode()]
    generation = engine.generate([300], GREEDY, max_tokens=1, prefix=half, top=1)
    assert "".join(generation) == generation.text
    assert generation.text.startswith("é")
    assert [(one.start, one.end) for one in generation.choices[:2]] == [(0, 0), (0, 1)]


def test_choices_say_what_was_kept_and_cover_the_text(engine: LlamaEngine) -> None:
    sampling = Sampling(seed=1, temp=0.7, top_k=5, top_p=1.0, min_p=0.0, ignore_eos=True)
    generation = reply(engine, text_ids(engine, 10), sampling, 16, top=8)
    assert [choice.id for choice in generation.choices] == generation.ids
    assert "".join(generation.text[one.start : one.end] for one in generation.choices) == generation.text
    logits = engine.logits([*text_ids(engine, 10), *generation.ids])[9:-1]
    for row, choice in zip(logits, generation.choices, strict=True):
        chances = softmax(row)
        best = choice.alternatives
        assert len(best) == 8
        assert [one.id for one in best[:5]] == [int(token) for token in np.argsort(-chances, kind="stable")[:5]]
        assert best[0].probability == pytest.approx(chances.max(), abs=1e-4)
        kept = softmax(row[[one.id for one in best[:5]]] / 0.7)
        assert [one.sampled for one in best[:5]] == pytest.approx(kept.tolist(), abs=1e-3)
        assert [one.sampled for one in best[5:]] == [0.0] * 3
        assert choice.sampled > 0
        assert choice.probability == pytest.approx(chances[choice.id], abs=1e-4)


def test_looking_does_not_change_what_is_said(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 10)
    for sampling in (
        GREEDY,
        WARM,
        Sampling(seed=1, mirostat=2, ignore_eos=True),
        Sampling(seed=1, temp=0, typical=0.5),
    ):
        assert reply(engine, ids, sampling, 20, top=7).ids == reply(engine, ids, sampling, 20).ids


def test_other_parameters_apply_to_the_next_token(engine: LlamaEngine) -> None:
    ids = text_ids(engine, 10)
    generation = engine.generate(ids, Sampling(seed=1, temp=2.0, ignore_eos=True), max_tokens=30)
    for _ in generation:
        if len(generation.ids) == 10:
            generation.change_sampling(GREEDY)
    changed = generation.ids[10:]
    engine.forget()
    assert reply(engine, [*ids, *generation.ids[:10]], count=20).ids == changed


def test_the_distribution_can_be_seen_under_any_parameters(engine: LlamaEngine) -> None:
    assert engine.distribution(GREEDY) == ()
    ids = text_ids(engine, 10)
    reply(engine, ids, count=1)
    chances = softmax(engine.logits(ids)[-1])
    reply(engine, ids, count=1)
    seen = engine.distribution(Sampling(temp=1.0, top_k=3, top_p=1.0, min_p=0.0), top=6)
    assert [one.probability for one in seen] == pytest.approx(sorted(chances, reverse=True)[:6], abs=1e-4)
    assert sum(one.sampled for one in seen) == pytest.approx(1.0)
    assert [one.sampled > 0 for one in seen] == [True] * 3 + [False] * 3
    assert [one.sampled for one in engine.distribution(GREEDY, top=3)] == [1.0, 0.0, 0.0]


def test_a_reply_is_cancelled_from_another_thread(engine: LlamaEngine) -> None:
    generation = engine.generate(text_ids(engine, 10), GREEDY)
    for _ in generation:
        if len(generation.ids) == 5:
            thread = threading.Thread(target=generation.cancel)
            thread.start()
            thread.join()
    assert generation.finish_reason == "interrupted"
    assert 5 <= len(generation.ids) <= 7
    ids = text_ids(engine, 20, seed=2)
    expected = reply(engine, ids).ids
    engine.forget()
    assert reply(engine, ids).ids == expected


def test_a_prompt_is_cancelled_in_the_middle(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text_ids(engine, 300)
    generation = engine.generate(ids, GREEDY)
    generation.cancel()
    assert list(generation) == []
    assert generation.finish_reason == "interrupted"
    assert engine.cached_tokens < len(ids)
    expected = reply(engine, ids).ids
    engine.forget()
    assert reply(engine, ids).ids == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_kept_state_goes_on_as_if_nothing_had_been(family: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.kv"
    with LlamaEngine.open(base_gguf(family), threads=1) as engine:
        ids = text_ids(engine, 150)
        with pytest.raises(UsageError, match="Nothing was evaluated"):
            engine.save_state(path)
        first = reply(engine, ids)
        engine.save_state(path)
        more = [*ids, *first.ids, 300, 301]
        expected = reply(engine, more).ids
    with LlamaEngine.open(base_gguf(family), threads=1) as engine:
        # The last token sampled was never evaluated.
        assert engine.load_state(path, more) == len(ids) + len(first.ids) - 1
        again = reply(engine, more)
        assert again.reused_tokens == len(ids) + len(first.ids) - 1
        assert again.ids == expected


def test_a_state_of_something_else_is_not_taken_up(engine: LlamaEngine, tmp_path: Path) -> None:
    path, ids = tmp_path / "chat.kv", text_ids(engine, 60)
    reply(engine, ids)
    engine.save_state(path)
    assert engine.load_state(path, ids) == len(ids)
    assert engine.load_state(path, text_ids(engine, 60, seed=1)) == 0
    assert engine.load_state(tmp_path / "none.kv", ids) == 0
    engine.set_adapters([LoraSpec(lora_gguf())])
    assert engine.load_state(path, ids) == 0
    engine.set_adapters([])
    strangers: list[tuple[Path, dict[str, Any]]] = [(base_gguf(), {"cache_type_k": "q8_0"}), (base_gguf(seed=1), {})]
    for base, options in strangers:
        with LlamaEngine.open(base, threads=1, **options) as other:
            assert other.load_state(path, ids) == 0
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole + b"x", whole[:300], b"x" * 100, whole[:-500] + b"y" + whole[-499:]):
        path.write_bytes(content)
        assert engine.load_state(path, ids) == 0
    assert reply(engine, ids).ids == reply(engine, ids).ids


def test_what_left_the_middle_of_a_text_is_not_evaluated_again(engine: LlamaEngine) -> None:
    system, old, kept = text_ids(engine, 20), text_ids(engine, 60, seed=1), text_ids(engine, 80, seed=2)
    reply(engine, [*system, *old, *kept], count=1)
    shifted = reply(engine, [*system, *kept, 300], shift=True)
    assert shifted.reused_tokens == len(system) + len(kept)
    # What was moved was computed in the presence of what is gone: no exact reply may take it up.
    exact = reply(engine, [*system, *kept, 300])
    assert exact.reused_tokens < len(system) + len(kept)
    engine.forget()
    assert reply(engine, [*system, *kept, 300]).ids == exact.ids


def test_states_make_room_when_memory_is_short(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: 0)
    ids, other = text_ids(engine, 80), text_ids(engine, 80, seed=1)
    expected = reply(engine, ids).ids
    reply(engine, other, adapters=[LoraSpec(lora_gguf())])
    again = reply(engine, ids)
    assert again.reused_tokens == 0
    assert again.ids == expected


@pytest.mark.parametrize("draft", ["", "ngram"])
def test_a_reply_goes_on_under_other_adapters_as_from_a_cold_context(cold: LlamaEngine, draft: str) -> None:
    wanted, scales = [(4, 1.0), (9, -1.0), (13, 0.0), (17, 1.0)], list[float]()
    with LlamaEngine.open(base_gguf(), threads=1, draft=draft) as engine:
        ids = text_ids(engine, 40)
        generation = engine.generate(ids, GREEDY, max_tokens=24, top=4)
        scale = 0.0
        for _ in generation:
            scales += [scale] * (len(generation.ids) - len(scales))
            if wanted and len(scales) >= wanted[0][0]:
                scale = wanted.pop(0)[1]
                engine.set_adapters([LoraSpec(lora_gguf(), scale)])
                generation.change_adapters()
    assert [*dict.fromkeys(scales)] == [0.0, 1.0, -1.0]
    assert len(generation.ids) == 24
    for at, (token, scale) in enumerate(zip(generation.ids, scales, strict=True)):
        cold.set_adapters([LoraSpec(lora_gguf(), scale)])
        expected = softmax(cold.logits([*ids, *generation.ids[:at]])[-1])
        assert token == expected.argmax()
        assert abs(generation.choices[at].probability - expected[token]) < 1e-3
    cold.set_adapters([])
    assert generation.timings.reused_tokens == 0
    assert generation.slot is None
