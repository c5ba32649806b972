"""Choosing tokens and turning them into text: sampling, stop strings, characters that span tokens, interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.grammar import grammar_from_json_schema
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampler import Seen
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from tests.ggufs import base_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine.open(base_gguf(), threads=1) as opened:
        yield opened


def run(engine: LlamaEngine, sampling: Sampling, count: int = 24, **options: Any) -> LlamaGeneration:
    generation = engine.generate(engine.tokenizer.encode("hello world"), sampling, max_tokens=count, **options)
    assert "".join(generation) == generation.text
    return generation


class Spoken(LlamaEngine):
    """An engine whose model says given tokens: the sampler's choice is replaced, everything else is real."""

    def __init__(self, engine: LlamaEngine, ids: list[int]) -> None:
        self.__dict__.update(engine.__dict__)
        self._said = iter(ids)

    def choose(self, sampler: Any, row: int, top: int) -> tuple[int | None, Seen | None]:
        return next(self._said, None), None


def speak(engine: LlamaEngine, text: str | bytes, **options: Any) -> LlamaGeneration:
    ids = [engine.tokenizer.encode("x", add_special=False)[0]]
    if isinstance(text, bytes):
        by_piece = {engine.tokenizer.piece(token): token for token in range(engine.tokenizer.n_vocab)}
        spoken = [by_piece[bytes([byte])] for byte in text]
    else:
        spoken = engine.tokenizer.encode(text, add_special=False)
    return Spoken(engine, spoken).generate(ids, GREEDY, **options)


def test_a_seed_reproduces_and_another_does_not(engine: LlamaEngine) -> None:
    first = run(engine, Sampling(seed=7, temp=1.5, ignore_eos=True))
    assert run(engine, Sampling(seed=7, temp=1.5, ignore_eos=True)).ids == first.ids
    assert run(engine, Sampling(seed=8, temp=1.5, ignore_eos=True)).ids != first.ids
    assert first.seed == 7
    free = run(engine, Sampling(temp=1.5, ignore_eos=True))
    assert run(engine, Sampling(seed=free.seed, temp=1.5, ignore_eos=True)).ids == free.ids


def test_temperature_zero_is_greedy_whatever_the_filters(engine: LlamaEngine) -> None:
    expected = run(engine, GREEDY).ids
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"top_nsigma": 1.0}, {"seed": 3}):
        assert run(engine, Sampling(temp=0, ignore_eos=True, **options)).ids == expected
    assert run(engine, Sampling(temp=1.0, top_k=1, ignore_eos=True)).ids == expected


def test_the_chain_samples_the_distribution(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("hello world")
    logits = engine.logits(ids)[-1].astype(np.float64)
    kept = np.argsort(-logits)[:3]
    chances = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    counts = np.zeros(3)
    for seed in range(400):
        sampling = Sampling(seed=seed, temp=1.0, top_k=3, top_p=1.0, min_p=0.0)
        generation = engine.generate(ids, sampling, max_tokens=1)
        list(generation)
        counts[list(kept).index(generation.ids[0])] += 1
    assert np.abs(counts / 400 - chances).max() < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"mirostat": 1},
        {"mirostat": 2},
        {"typical": 0.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.1},
        {"top_nsigma": 1.0},
        {"dynatemp_range": 0.5},
        {"dry_multiplier": 0.8, "dry_penalty_last_n": -1},
        {"repeat_penalty": 1.3, "repeat_last_n": -1},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temp": 0, "typical": 0.5},
    ],
)
def test_every_sampler_runs_and_reproduces(engine: LlamaEngine, options: dict[str, Any]) -> None:
    sampling = Sampling(**{"seed": 1, "ignore_eos": True, **options})
    assert run(engine, sampling).ids == run(engine, sampling).ids


def test_penalties_see_the_prompt_and_are_off_by_default(engine: LlamaEngine) -> None:
    word = engine.tokenizer.encode(" the", add_special=False)[0]
    ids = [word] * 20
    best = int(engine.logits(ids)[-1].argmax())
    history = [best, *ids[1:]]
    plain = engine.generate(history, GREEDY, max_tokens=1)
    list(plain)
    expected = int(engine.logits(history)[-1].argmax())
    assert plain.ids == [expected]
    penalised = engine.generate(
        [*history[:-1], expected, word], Sampling(temp=0, ignore_eos=True, presence_penalty=100), max_tokens=30
    )
    list(penalised)
    assert not {expected, word, best} & set(penalised.ids)
    assert len(set(penalised.ids)) == 30


def test_single_tokens_are_made_likelier_or_forbidden(engine: LlamaEngine) -> None:
    free = run(engine, GREEDY).ids
    forced = run(engine, Sampling(temp=0, ignore_eos=True, logit_bias="300+100")).ids
    assert set(forced) == {300} != set(free)
    without = run(engine, Sampling(temp=0, ignore_eos=True, logit_bias=f"{free[0]}-inf, 301+0.5")).ids
    assert free[0] not in without
    for text in ("x", "300", "300*2", "300+inf", "300+1+2", f"{engine.tokenizer.n_vocab}+1"):
        with pytest.raises(UsageError, match="logit_bias"):
            run(engine, Sampling(logit_bias=text))


def test_ignore_eos_gives_exactly_as_many_tokens_as_asked(engine: LlamaEngine) -> None:
    for count in (0, 1, 50):
        generation = run(engine, Sampling(seed=2, temp=2.0, top_k=0, min_p=0, ignore_eos=True), count)
        assert len(generation.ids) == count
        assert generation.finish_reason == "length"
        assert not set(generation.ids) & engine.tokenizer.eog_ids


def test_an_end_token_stops_and_is_not_part_of_the_text(engine: LlamaEngine) -> None:
    eos = engine.tokenizer.eos_id
    assert eos is not None
    ids = engine.tokenizer.encode("hello", add_special=False)
    generation = Spoken(engine, [*ids, eos, *ids]).generate([5], GREEDY)
    assert list(generation) == [engine.tokenizer.decode(ids).decode()] or "".join(generation) == ""
    assert generation.finish_reason == "stop"
    assert generation.ids == ids


def test_characters_that_span_tokens_come_whole(engine: LlamaEngine) -> None:
    text = "é東🙂e\u0301"
    parts = list(generation := speak(engine, text.encode()))
    assert "".join(parts) == generation.text == text
    assert all("�" not in part for part in parts)
    assert parts == list(text)


def test_a_character_cut_by_the_limit_is_marked(engine: LlamaEngine) -> None:
    generation = speak(engine, "a🙂".encode(), max_tokens=3)
    assert "".join(generation) == generation.text == "a�"


def test_bytes_that_are_no_text_do_not_stop_it(engine: LlamaEngine) -> None:
    generation = speak(engine, b"a\xff\xfeb")
    assert "".join(generation) == "a��b"


@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one ST two", ["STOP"], "one ST two"),
        ("one STSTOP", ["STOP"], "one ST"),
        ("a\n\nUser: b", ["User:", "\n\n"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("one ST", ["STOP"], "one ST"),
        ("🙂 end", ["end"], "🙂 "),
        ("x", ["x"], ""),
        ("one", [""], "one"),
    ],
)
def test_stop_strings_across_tokens(engine: LlamaEngine, text: str, stop: list[str], said: str) -> None:
    for spoken in (text, text.encode()):
        generation = speak(engine, spoken, stop=stop)
        parts = list(generation)
        assert "".join(parts) == generation.text == said
        assert generation.finish_reason == "stop"


def test_a_full_context_ends_it(engine: LlamaEngine) -> None:
    generation = engine.generate([5] * 500, GREEDY)
    list(generation)
    assert generation.finish_reason == "length"
    assert generation.context_full
    assert len(generation.ids) == 512 - 500 + 1


def test_closing_keeps_what_was_said(engine: LlamaEngine) -> None:
    generation = engine.generate([5, 6], GREEDY, max_tokens=50)
    said = next(generation) + next(generation)
    generation.close()
    assert generation.text == said
    assert generation.finish_reason == "interrupted"
    assert list(generation) == []
    after = run(engine, GREEDY)
    engine.forget()
    assert run(engine, GREEDY).ids == after.ids


def test_an_interrupt_inside_the_engine_leaves_it_usable(engine: LlamaEngine) -> None:
    class Interrupted(Spoken):
        def choose(self, sampler: Any, row: int, top: int) -> tuple[int | None, Seen | None]:
            token, seen = super().choose(sampler, row, top)
            if token is None:
                raise KeyboardInterrupt
            return token, seen

    expected = run(engine, GREEDY).ids
    spoken = engine.tokenizer.encode("hi STO", add_special=False)
    generation = Interrupted(engine, spoken).generate([5], GREEDY, stop=["STOP"])
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert generation.finish_reason == "interrupted"
    assert generation.text == "hi STO"
    assert run(engine, GREEDY).ids == expected


def test_timings_count(engine: LlamaEngine) -> None:
    engine.forget()
    generation = run(engine, GREEDY, 10)
    timings = generation.timings
    assert timings.prompt_tokens == len(engine.tokenizer.encode("hello world"))
    assert timings.reused_tokens == 0
    assert timings.generated_tokens == 10
    assert timings.tokens_per_second > 0
    assert timings.prompt_per_second > 0
    assert timings.first_token_seconds >= timings.prompt_seconds


def test_a_grammar_is_followed(engine: LlamaEngine) -> None:
    generation = run(engine, Sampling(seed=1, grammar='root ::= "yes" | "no" [0-9]+ "!"'), 40)
    assert generation.text == "yes" or generation.text.startswith("no")
    generation = run(engine, Sampling(temp=0, grammar='root ::= "yes" " 東京"'), 40)
    assert generation.text == "yes 東京"
    assert generation.finish_reason == "stop"


def test_a_json_schema_is_followed(engine: LlamaEngine) -> None:
    import json

    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    grammar = grammar_from_json_schema(json.dumps(schema))
    generation = run(engine, Sampling(temp=0, grammar=grammar), 200)
    assert isinstance(json.loads(generation.text)["ok"], bool)


@pytest.mark.parametrize("grammar", ["root ::= [", "start ::= [a-z]", 'root ::= root "a"', "root ::= nothing"])
def test_a_broken_grammar_is_refused(engine: LlamaEngine, grammar: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"grammar is not valid: .+"):
        run(engine, Sampling(grammar=grammar))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("schema", ["", "[]", "{", '{"type": "strange"}', '{"$ref": "#/nothing"}'])
def test_a_broken_schema_is_refused(schema: str) -> None:
    with pytest.raises(UsageError, match="JSON schema"):
        grammar_from_json_schema(schema)


def test_defaults_are_llamas() -> None:
    expected = {
        "temp": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical": 1.0, "top_nsigma": -1.0,
        "xtc_probability": 0.0, "xtc_threshold": 0.1, "dynatemp_range": 0.0, "dynatemp_exp": 1.0, "repeat_last_n": 64,
        "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0,
        "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64, "mirostat": 0, "mirostat_lr": 0.1,
        "mirostat_ent": 5.0, "ignore_eos": False, "grammar": "", "logit_bias": "", "seed": -1,
    }  # fmt: skip
    assert {field.name: field.default for field in fields(Sampling)} == expected


def test_settings_by_name() -> None:
    sampling = Sampling().with_setting("temperature", "0.5").with_setting("top-k", "3").with_setting("ignore_eos", "on")
    assert (sampling.temp, sampling.top_k, sampling.ignore_eos) == (0.5, 3, True)
    for name, value in (("temp", "warm"), ("warmth", "1"), ("top_k", "1.5"), ("top_p", "2"), ("ignore_eos", "maybe")):
        with pytest.raises(UsageError):
            sampling.with_setting(name, value)


@pytest.mark.parametrize(
    "options",
    [
        {"temp": float("nan")},
        {"repeat_penalty": 0.0},
        {"mirostat": 3},
        {"top_p": 1.5},
        {"repeat_last_n": -2},
        {"grammar": "root ::= [a]", "ignore_eos": True},
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
