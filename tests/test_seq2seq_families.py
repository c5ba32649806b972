"""Encoder-decoders beyond T5 and BART, in torch: transformers' texts, alone and in batches; what explain refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.cli.main import run
from edgetune.engine.beam import BeamSettings
from edgetune.engine.sampling import Sampling
from edgetune.engine.torch.engine import TorchEngine
from edgetune.errors import ExitCode
from edgetune.library import describe
from tests.seq2seq_checkpoints import OTHERS, TEXTS, write_seq2seq
from tests.test_engine_torch_seq2seq import reference, said

_TEXTS = [" ".join([text] * (1 + number % 2)) for number, text in enumerate(TEXTS[:5])]


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_says_what_it_says_in_transformers(family: str, tmp_path: Path) -> None:
    base = write_seq2seq(tmp_path / family, family)
    described = describe(base)
    assert described.duty.task == "seq2seq"
    assert (described.sizes.layers, described.sizes.decoder_layers, described.sizes.heads) == (2, 2, 4)
    with TorchEngine.open(base, dtype="f32") as engine:
        assert said(engine, _TEXTS, 8) == reference(base, None, _TEXTS, max_new_tokens=8, num_beams=1)
        beams = BeamSettings(3)
        found = said(engine, _TEXTS[:3], 6, beams)
        sources = [engine.tokenizer.encode(text) for text in _TEXTS[:3]]
        together = [engine.generate(ids, Sampling(temp=0), max_tokens=6, beams=beams) for ids in sources]
        list(engine.run_together(together))
    assert found == reference(base, None, _TEXTS[:3], max_new_tokens=6, num_beams=3)
    assert [one.ids for one in together] == found


def test_what_explain_cannot_follow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family in ("led", "prophetnet", "pegasus-x"):
        base = write_seq2seq(tmp_path / family, family)
        assert run(["explain", str(base), "rain", "--json"]) == ExitCode.UNSUPPORTED
        assert "explain does not follow this model" in capsys.readouterr().err
    assert run(["explain", str(write_seq2seq(tmp_path / "switch", "switch")), "rain", "--json"]) == ExitCode.OK


def test_an_encoder_alone_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    whole = write_seq2seq(tmp_path / "t5", "t5")
    transformers.T5EncoderModel.from_pretrained(whole).save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path / "half")
    assert run(["generate", str(tmp_path / "half"), "rain", "--engine", "torch"]) == ExitCode.UNSUPPORTED
    told = capsys.readouterr().err
    assert "T5EncoderModel, which writes no text" in told
    assert "edgetune embed" in told


def test_a_family_without_a_tokenizer_json_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_seq2seq(tmp_path / "t5", "t5")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n')
    for command in (["generate", str(base), "rain", "--engine", "torch"], ["train", "-m", str(base), "-d", str(rows)]):
        assert run(command) == ExitCode.UNSUPPORTED
        assert "Marian" in capsys.readouterr().err
