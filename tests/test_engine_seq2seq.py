"""T5 through llama.cpp: the texts of transformers' generate, greedily, sampled and in beams, with and without LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.engine.beam import BeamSettings
from edgetune.engine.beam_generation import BeamGeneration
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.seq2seq import Seq2SeqEngine
from edgetune.engine.torch.engine import TorchEngine
from edgetune.errors import UnsupportedError, UsageError
from edgetune.export import export_adapter, export_base
from tests.seq2seq_checkpoints import TEXTS, write_seq2seq
from tests.test_engine_torch_seq2seq import UNEVEN, assert_same_together, reference, write_lora

_GREEDY = Sampling(temp=0)


@pytest.fixture(scope="module", params=("t5", "flan-t5"))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_seq2seq(tmp_path_factory.mktemp(request.param) / request.param, request.param)
    export_base(directory, directory / "model.gguf", outtype="f32")
    return directory


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_seq2seq(tmp_path_factory.mktemp("flan") / "flan", "flan-t5")
    export_base(directory, directory / "model.gguf", outtype="f32")
    return directory


def open_engine(checkpoint: Path, **options: Any) -> Seq2SeqEngine:
    return Seq2SeqEngine.open(checkpoint / "model.gguf", gpu_layers=0, threads=1, **options)


def said(
    engine: Seq2SeqEngine, texts: list[str], max_tokens: int, beams: BeamSettings | None = None
) -> list[list[int]]:
    found = []
    for text in texts:
        generation = engine.generate(engine.tokenizer.encode(text), _GREEDY, max_tokens=max_tokens, beams=beams)
        assert "".join(generation) == generation.text
        found.append(generation.ids)
    return found


def assert_same(
    checkpoint: Path, adapter: Path | None, texts: list[str], found: list[list[int]], expected: list[list[int]]
) -> None:
    """The same ids; where a gated model's two best tokens are as good as tied, llama.cpp's 16-bit GELU may decide."""
    differing = [number for number, ids in enumerate(found) if ids != expected[number]]
    assert len(differing) <= (1 if "flan" in checkpoint.name else 0)
    for number in differing:
        place = next(
            at for at, pair in enumerate(zip(found[number], expected[number], strict=False)) if len({*pair}) > 1
        )
        mine, theirs = found[number][place], expected[number][place]
        with TorchEngine.open(checkpoint, lora=[LoraSpec(adapter)] if adapter else []) as engine:
            start = [0, *expected[number][:place]]
            logits = engine.logits(engine.tokenizer.encode(texts[number]), start)[-1]
        assert abs(logits[mine] - logits[theirs]) < 0.01 * logits.std()


def test_greedy_texts_are_those_of_transformers(checkpoint: Path) -> None:
    with open_engine(checkpoint) as engine:
        found = said(engine, TEXTS, 12)
    assert_same(checkpoint, None, TEXTS, found, reference(checkpoint, None, TEXTS, max_new_tokens=12, num_beams=1))
    assert len({tuple(ids) for ids in found}) > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"},
    ],
)
def test_beam_search_finds_what_transformers_finds(checkpoint: Path, settings: dict[str, Any]) -> None:
    texts = TEXTS[:20]
    with open_engine(checkpoint) as engine:
        found = said(engine, texts, 10, BeamSettings(**settings))
    assert found == reference(checkpoint, None, texts, max_new_tokens=10, **settings)


def test_more_beams_than_a_small_batch_has_tokens(flan: Path) -> None:
    with open_engine(flan) as engine:
        found = said(engine, ["rain"], 3, BeamSettings(64))
    assert found == reference(flan, None, ["rain"], max_new_tokens=3, num_beams=64)


def test_with_an_adapter_as_with_peft(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", checkpoint)
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=checkpoint, outtype="f32")
    texts = TEXTS[:20]
    with open_engine(checkpoint, lora=[LoraSpec(tmp_path / "lora.gguf")]) as engine:
        found = said(engine, texts, 10)
        beams = said(engine, texts[:8], 10, BeamSettings(4))
        engine.set_adapters([LoraSpec(tmp_path / "lora.gguf", 0.0)])
        off = said(engine, texts, 10)
    expected = reference(checkpoint, adapter, texts, max_new_tokens=10, num_beams=1)
    assert_same(checkpoint, adapter, texts, found, expected)
    assert beams == reference(checkpoint, adapter, texts[:8], max_new_tokens=10, num_beams=4)
    assert_same(checkpoint, None, texts, off, reference(checkpoint, None, texts, max_new_tokens=10, num_beams=1))
    assert off != found


def test_an_adapter_in_part_is_the_same_in_torch(flan: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", flan)
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=flan, outtype="f32")
    target = [0, 5, 17, 40]
    with open_engine(flan) as engine, TorchEngine.open(flan) as other:
        ids = engine.tokenizer.encode(TEXTS[0])
        plain = engine.logits(ids, target)
        for scale in (0.0, 0.5, 1.0, -1.0):
            engine.set_adapters([LoraSpec(tmp_path / "lora.gguf", scale)])
            other.set_adapters([LoraSpec(adapter, scale)])
            found = engine.logits(ids, target)
            assert np.abs(found - other.logits(ids, target)).max() < 0.01 * plain.std()
            assert scale == 0 or np.abs(found - plain).max() > 0.05 * plain.std()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3),
        Sampling(seed=4, temp=1.5, top_k=0, top_p=0.9, min_p=0.0),
        Sampling(seed=5, temp=1.2, typical=0.7, repeat_penalty=1.3, presence_penalty=0.5),
        Sampling(seed=6, mirostat=2),
    ],
)
def test_a_seed_says_the_same_through_llama_and_torch(flan: Path, sampling: Sampling) -> None:
    texts = TEXTS[:8]
    with open_engine(flan) as engine, TorchEngine.open(flan) as other:
        for text in texts:
            ids = engine.tokenizer.encode(text)
            mine = engine.generate(ids, sampling, max_tokens=8, top=3)
            theirs = other.generate(ids, sampling, max_tokens=8, top=3)
            assert "".join(mine) == "".join(theirs)
            assert mine.ids == theirs.ids
            for one, two in zip(mine.choices, theirs.choices, strict=True):
                assert abs(one.probability - two.probability) < 0.02
                assert abs(one.sampled - two.sampled) < 0.02


def test_replies_that_take_turns_are_what_they_are_alone(flan: Path) -> None:
    with open_engine(flan) as engine:
        ids = [engine.tokenizer.encode(text) for text in TEXTS[:2]]
        alone = ["".join(engine.generate(one, _GREEDY, max_tokens=10)) for one in ids]
        running = [engine.generate(one, _GREEDY, max_tokens=10) for one in ids]
        texts = ["", ""]
        for _ in range(30):
            for number, generation in enumerate(running):
                texts[number] += next(generation, "")
    assert texts == alone


@pytest.mark.parametrize(
    ("sampling", "beams"), [(_GREEDY, None), (_GREEDY, BeamSettings(3)), (Sampling(temp=1.2, seed=7), None)]
)
def test_replies_in_one_batch_are_what_they_are_alone(
    flan: Path, sampling: Sampling, beams: BeamSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(flan) as engine:
        encoded: list[int] = []
        encode = engine._context.encode

        def counting(targets: Sequence[Any], **options: Any) -> None:
            encoded.append(len(targets))
            encode(targets, **options)

        monkeypatch.setattr(engine._context, "encode", counting)
        assert_same_together(engine, sampling, beams, begin=encoded.clear)
        assert (len(encoded), sum(encoded)) == (3 if beams else 1, len(UNEVEN))


def test_a_reply_goes_on_by_itself_after_a_batch(flan: Path) -> None:
    with open_engine(flan) as engine:
        sources = [engine.tokenizer.encode(text) for text in UNEVEN[:3]]
        alone = ["".join(engine.generate(ids, _GREEDY, max_tokens=8)) for ids in sources]
        replies = [engine.generate(ids, _GREEDY, max_tokens=8) for ids in sources]
        next(iter(engine.run_together(replies)))
        for one in reversed(replies):
            list(one)
        assert [one.text for one in replies] == alone
        search, other = (engine.generate(ids, _GREEDY, max_tokens=8, beams=BeamSettings(2)) for ids in sources[:2])
        assert isinstance(search, BeamGeneration)
        assert search.step() is None
        engine.evaluate_beams([search])
        list(other)
        assert search.step() is None
        with pytest.raises(UsageError, match="beam search cannot go on"):
            engine.evaluate_beams([search])


def test_a_text_ends_at_a_stop_string_and_when_it_is_cancelled(flan: Path) -> None:
    with open_engine(flan) as engine:
        ids = engine.tokenizer.encode(TEXTS[0])
        endless = Sampling(temp=0, ignore_eos=True)
        text = "".join(engine.generate(ids, endless, max_tokens=10))
        cut = engine.generate(ids, endless, max_tokens=10, stop=[text[-2:]])
        assert "".join(cut) == text[: text.find(text[-2:])] != text
        assert (cut.finish_reason, cut.is_whole) == ("stop", False)
        beams = engine.generate(ids, _GREEDY, max_tokens=10, beams=BeamSettings(3))
        best = "".join(beams)
        cut = engine.generate(ids, _GREEDY, max_tokens=10, beams=BeamSettings(3), stop=[best[-1]])
        assert best
        assert "".join(cut) == best[: best.find(best[-1])]
        for settings in (None, BeamSettings(3)):
            cancelled = engine.generate(ids, _GREEDY, beams=settings)
            cancelled.cancel()
            assert "".join(cancelled) == ""
            assert cancelled.finish_reason == "interrupted"
        assert engine.distribution(Sampling(), top=3) == ()


def test_what_does_not_fit_is_refused(flan: Path) -> None:
    with open_engine(flan, ctx_size=16) as engine:
        with pytest.raises(UsageError, match="17 tokens, the context 16"):
            engine.generate([5] * 17, _GREEDY)
        with pytest.raises(UsageError, match="no tokens"):
            engine.generate([], _GREEDY)
        with pytest.raises(UsageError, match="outside the vocabulary"):
            engine.generate([engine.n_vocab], _GREEDY)
        endless = engine.generate([5, 6, 1], Sampling(temp=0, ignore_eos=True))
        "".join(endless)
        assert (len(endless.ids), endless.finish_reason, endless.context_full) == (15, "length", True)
    with pytest.raises(UsageError, match="was closed"):
        engine.generate([5], _GREEDY)


def test_chat_names_the_way_out(flan: Path) -> None:
    with pytest.raises(UnsupportedError) as refused:
        LlamaEngine.open(flan / "model.gguf")
    assert "edgetune generate" in refused.value.hint
