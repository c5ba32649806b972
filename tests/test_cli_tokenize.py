"""`edgetune tokenize`: the tokens of the engine that runs the model, whichever that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import run
from edgetune.errors import ExitCode
from edgetune.export import export_base
from tests.encoders import write_encoder
from tests.seq2seq_checkpoints import write_seq2seq

TEXT = "the quick 한국어 Café [SEP] fox"


def tokenized(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["tokenize", *arguments, "--json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(found["ids"]) == len(found["pieces"])
    return found


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_an_encoder_has_hugging_faces_tokens(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    checkpoint = write_encoder(tmp_path / name, name)
    export_base(checkpoint, tmp_path / "model.gguf", outtype="f16")
    own = transformers.AutoTokenizer.from_pretrained(checkpoint)
    plain = TEXT.replace("[SEP]", "sep")
    assert tokenized(capsys, str(tmp_path / "model.gguf"), plain)["ids"] == own(plain)["input_ids"]
    spelled = tokenized(capsys, str(tmp_path / "model.gguf"), f"{own.sep_token} fox")["ids"]
    assert spelled.count(own.sep_token_id) == own("fox")["input_ids"].count(own.sep_token_id)


def test_what_runs_in_torch_alone_is_tokenized_without_converting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    checkpoint = write_seq2seq(tmp_path / "bart", "bart")
    own = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenized(capsys, str(checkpoint), "the quick fox")["ids"] == own("the quick fox")["input_ids"]
    assert run(["tokenize", str(checkpoint), "hello", "--chat"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert "has no chat template" in captured.err
    assert "Converting" not in captured.err


def test_a_vocabulary_of_characters_shows_those_it_reads(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tokenized(capsys, str(shared_data / "models" / "g2p-bart-us"), "hello")
    assert found["pieces"][1:-1] == list("hello")
