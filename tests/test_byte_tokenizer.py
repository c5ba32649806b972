"""ByT5, which has no tokenizer file: bytes are tokens in the engine and in training, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgetune
from edgetune.artifacts import Run
from edgetune.cli.main import run
from edgetune.data import load_tokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.errors import ExitCode
from tests.encoder_decoders import GATED, write_t5

TEXTS = ("Hello", "", "h\u00e9llo \u6771\u4eac\U0001f642", "  a  b ", "nul\x00\t\n", "\u00ff\u0080")


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = {"vocab_size": 384, "tokenizer_class": "ByT5Tokenizer", "decoder_start_token_id": 0, **GATED}
    directory = write_t5(tmp_path_factory.mktemp("byt5") / "model", overrides=own)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    return directory


def test_ids_are_those_of_transformers(byt5: Path) -> None:
    from transformers import AutoTokenizer

    theirs, training = AutoTokenizer.from_pretrained(byt5), load_tokenizer(byt5)
    engine = JsonTokenizer(training.backend.to_str())
    assert engine.n_vocab == len(theirs) == 384
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert engine.encode(text) == training.encode_whole(text, max_length=99).ids.tolist() == ids
        assert engine.encode(text, "more") == theirs(text, "more")["input_ids"]
        assert engine.decode(ids).decode() == text
    assert len(theirs("<extra_id_0>")["input_ids"]) == 2
    for text in ("</s>", "<extra_id_0>"):  # what is typed is text
        assert engine.encode(text, add_special=False) == training.encode(text, add_special=False)
        assert len(engine.encode(text, add_special=False)) == len(text)


def test_it_answers_as_in_transformers(byt5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(byt5).eval()
    with edgetune.load(byt5, dtype="f32") as engine:
        for text in ("Rain", "\u6771\u4eac", "x" * 30):
            source = torch.tensor([[*(byte + 3 for byte in text.encode()), 1]])
            for beams in (1, 3):
                wanted = model.generate(source, max_new_tokens=8, num_beams=beams, do_sample=False)[0].tolist()
                how = {"num_beams": beams} if beams > 1 else {"temp": 0}
                found = engine.generate(text, max_tokens=8, **how)
                assert list(found.ids) == [one for one in wanted[1:] if one != 1]
    assert run(["convert", str(byt5), "-o", str(byt5.parent / "byt5.gguf")]) == ExitCode.UNSUPPORTED
    assert "reads bytes" in capsys.readouterr().err


def test_it_is_trained(byt5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"source": f"say {word}", "target": word} for word in ("r\u00e9d", "blue", "\u6771", "x")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    heard: list[Any] = []
    done: Run = edgetune.train(
        model=str(byt5),
        data=tmp_path / "rows.jsonl",
        out=tmp_path / "run",
        task="seq2seq",
        steps=1,
        eval=False,
        sink=heard.append,
    )
    assert done.finished
    assert not any("targets have characters" in getattr(event, "text", "") for event in heard)
    assert run(["generate", str(done.path), "say red", "-n", "4", "--temp", "0"]) == ExitCode.OK
    assert "runs in torch" in capsys.readouterr().err
