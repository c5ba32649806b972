"""edgetune from Python: the same models, numbers and refusals as on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgetune
from edgetune.cli.main import run
from edgetune.events import Event, Metrics, Notice
from edgetune.export import export_base
from edgetune.gguf_header import read_gguf
from edgetune.library import embedded_model_dir
from tests.encoders import LABELS, write_encoder
from tests.seq2seq_checkpoints import TEXTS, write_seq2seq


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    """What a command prints with --json, an object a line."""
    capsys.readouterr()
    assert run(list(arguments)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_public_name_is_there_and_none_else() -> None:
    assert {getattr(edgetune, name) is not None for name in edgetune.__all__} == {True}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgetune.nothing  # noqa: B018


def test_a_decoder_answers_prompts_and_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    (printed,) = said(capsys, "generate", "pocket", "What is 2 + 3?", "--temp", "0", "-n", "12", "--json", "-t", "1")
    with edgetune.load("pocket", threads=1) as model:
        found = model.generate("What is 2 + 3?", temp=0, max_tokens=12)
        turns = [{"role": "user", "content": "What is 2 + 3?"}]
        told, other = model.generate_all([turns, "Hello!"], temp=0, max_tokens=12)
        stream = model.stream("What is 2 + 3?", temp=0, max_tokens=12)
        pieces = list(stream)
        turns += [{"role": "assistant", "content": found.text}, {"role": "user", "content": "And 4 + 4?"}]
        later = model.generate(turns, temp=0, max_tokens=12)
        with pytest.raises(edgetune.EdgetuneError, match="for encoder-decoders"):
            model.generate("hello", task="translate")
        with pytest.raises(TypeError, match="temperature"):
            model.generate("hello", temperature=1)
    assert other.text not in ("", told.text)
    assert found.text == told.text == "".join(pieces) == stream.text == printed["text"]
    assert list(found.ids) == printed["tokens"]
    assert found.finish_reason == printed["finish_reason"]
    assert later.timings.reused_tokens > found.timings.prompt_tokens  # the turns before are not evaluated again


def test_an_encoder_decoder_answers_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_seq2seq(tmp_path / "flan", "flan-t5")
    export_base(directory, tmp_path / "flan.gguf", outtype="f32")
    arguments = ("generate", str(tmp_path / "flan.gguf"), TEXTS[0], "--json", "-n", "6", "--task", "summarize")
    (greedy,) = said(capsys, *arguments)
    (beams,) = said(capsys, *arguments, "--num-beams", "3")
    with edgetune.load(tmp_path / "flan.gguf") as model:
        assert model.is_encoder_decoder
        assert list(model.generate(TEXTS[0], max_tokens=6, task="summarize").ids) == greedy["tokens"]
        found = model.generate(TEXTS[0], max_tokens=6, task="summarize", num_beams=3)
        many = [one.ids for one in model.generate_all(TEXTS[:3], max_tokens=6)]
        assert many == [model.generate(text, max_tokens=6).ids for text in TEXTS[:3]]
        with pytest.raises(edgetune.EdgetuneError, match="not a conversation"):
            model.generate([{"role": "user", "content": "hello"}])
    assert list(found.ids) == beams["tokens"]
    assert found.score == pytest.approx(beams["score"])


def test_an_encoder_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_encoder(tmp_path / "bert", "bert", "ForSequenceClassification", overrides=LABELS)
    made = edgetune.convert(directory, str(tmp_path / "bert.gguf"), outtype="f16", verify=False)
    assert made.report is None
    assert edgetune.verify(str(directory), str(made.gguf.path)).passed
    assert made.gguf.path == tmp_path / "bert.gguf"
    vectors = said(capsys, "embed", str(made.gguf.path), "the fox", "hello", "-t", "1")
    labels = said(capsys, "classify", str(made.gguf.path), "the fox", "hello", "-t", "1", "--json")
    with edgetune.load_encoder(made.gguf.path, threads=1) as encoder:
        printed = np.array([one["embedding"] for one in vectors], np.float32)
        np.testing.assert_array_equal(encoder.embed(["the fox", "hello"]), printed)
        assert [dict(one.scores) for one in encoder.classify(["the fox", "hello"])] == [one["scores"] for one in labels]


@pytest.mark.slow
def test_what_is_trained_is_converted_proved_and_loaded(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("red", "green", "blue", "grey") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    heard: list[Event] = []
    run_ = edgetune.train(
        model="pocket", data=tmp_path / "rows.jsonl", out=tmp_path / "run", steps=2, eval=False, sink=heard.append
    )
    assert run_.finished
    assert any(isinstance(event, Metrics) for event in heard)
    base = edgetune.convert(str(embedded_model_dir()), tmp_path / "pocket.gguf", verify=False).gguf
    made = edgetune.convert(str(run_.path), base=str(embedded_model_dir()), sink=heard.append)
    assert made.report is not None
    assert made.report.passed
    assert read_gguf(made.gguf.path).kind == "adapter"
    again = edgetune.verify(embedded_model_dir(), base.path, adapter_dir=run_.path, lora_path=made.gguf.path)
    assert again.passed
    with edgetune.load(base.path, lora=[f"{made.gguf.path}:0.5"]) as model:
        assert [one.scale for one in model.engine.adapters] == [0.5]
    with edgetune.load(lora=[made.gguf.path], sink=heard.append) as model:  # the base is found by the fingerprint
        assert model.generate("Say red.", temp=0, max_tokens=3).ids
    assert any(isinstance(event, Notice) and "Base found" in event.text for event in heard)


def test_settings_or_values_not_both() -> None:
    with pytest.raises(TypeError, match="not both"):
        edgetune.train(edgetune.TrainSettings(model="pocket"), lr=1e-4)
    with pytest.raises(edgetune.EdgetuneError, match="nowhere"):
        edgetune.train(model="pocket", data="nowhere.jsonl")
