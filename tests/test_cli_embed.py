"""`edgetune embed` and `edgetune classify`: the shapes scripts rely on, files in order, bad rows by their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from converters import convert_base
from edgetune.artifacts import RUN_RECORD, Run
from edgetune.cli.main import run
from edgetune.errors import ExitCode
from edgetune.export import export_base
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.library import purpose_of
from tests.checkpoints import write_checkpoint
from tests.encoders import LABELS, write_encoder
from tests.ggufs import base_gguf


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("cli-embed")
    checkpoint = write_encoder(root / "bert", "bert", "ForSequenceClassification", overrides=LABELS)
    export_base(checkpoint, root / "bert.gguf", outtype="f16")
    return str(root / "bert.gguf")


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_embed_prints_an_object_a_text(gguf: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["embed", gguf, "the fox", "hello", "-t", "1"]) == ExitCode.OK
    found = lines(capsys.readouterr().out)
    assert [one["text"] for one in found] == ["the fox", "hello"]
    assert set(found[0]) == {"text", "embedding"}
    assert len(found[0]["embedding"]) == 96  # type: ignore[arg-type]


def test_classify_prints_an_object_a_text_or_pair(gguf: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["classify", gguf, "the fox", "--json", "-t", "1"]) == ExitCode.OK
    (found,) = lines(capsys.readouterr().out)
    scores = found["scores"]
    assert isinstance(scores, dict)
    assert list(scores) == ["red", "green", "blue"]
    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
    assert found["label"] == max(scores, key=lambda label: scores[label])
    assert run(["classify", gguf, "the fox", "hello", "--pair", "--json", "-t", "1"]) == ExitCode.OK
    (found,) = lines(capsys.readouterr().out)
    assert (found["text_a"], found["text_b"]) == ("the fox", "hello")


def test_files_keep_their_order_in_every_format(gguf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.cli.embed.CHUNK", 3)
    texts = ["the fox " * 9, "hello", "a cafe played", "brown"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "in.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)))
    for source, target in (("in.txt", "a.jsonl"), ("in.csv", "b.npy"), ("in.txt", "c.parquet")):
        assert run(["embed", gguf, str(tmp_path / source), "-o", str(tmp_path / target), "-t", "1"]) == ExitCode.OK
    written = lines((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    vectors = np.array([one["embedding"] for one in written])
    assert [one["text"] for one in written] == texts
    assert (np.load(tmp_path / "b.npy") == vectors.astype(np.float32)).all()
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "c.parquet")
    assert table["text"].to_pylist() == texts
    assert (np.array(table["embedding"].to_pylist(), np.float32) == vectors.astype(np.float32)).all()


def test_a_bad_row_is_named_and_skipped_on_request(
    gguf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the fox"}\n{"text": \n{"text": " "}\n{"sentence": "hello"}\n{"id": 1}\n')
    assert run(["embed", gguf, str(path)]) == ExitCode.USAGE
    assert f"{path}, line 2" in capsys.readouterr().err
    assert run(["embed", gguf, str(path), "--skip-bad", "-t", "1"]) == ExitCode.OK
    out = capsys.readouterr()
    assert [one["text"] for one in lines(out.out)] == ["the fox", "hello"]
    assert "line 3: the text is empty" in out.err
    assert "line 5: expected the columns text, found id" in out.err


def test_a_broken_csv_row_is_named_and_skipped_on_request(
    gguf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('id,text\n1,the fox\n2,"hello\n3,a cafe\n4\n')
    assert run(["classify", gguf, str(path)]) == ExitCode.USAGE
    assert f"{path}, line 3: a quote is opened and not closed" in capsys.readouterr().err
    assert run(["classify", gguf, str(path), "--json", "--skip-bad", "-t", "1"]) == ExitCode.OK
    out = capsys.readouterr()
    assert [one["text"] for one in lines(out.out)] == ["the fox", "a cafe"]
    assert "line 5: expected 2 columns (id, text), found 1" in out.err


def test_a_text_that_is_cut_is_counted(gguf: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["classify", gguf, "the fox " * 300, "--json", "-t", "1"]) == ExitCode.OK
    assert "1 text was longer than the 160 tokens" in capsys.readouterr().err
    assert run(["classify", gguf, "the fox " * 300, "--long", "error"]) == ExitCode.USAGE
    assert run(["classify", gguf, "the fox " * 300, "--long", "window"]) == ExitCode.USAGE


def test_what_cannot_be_done_is_refused(gguf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = str(base_gguf("llama"))
    assert run(["classify", decoder, "a", "-t", "1"]) == ExitCode.UNSUPPORTED
    assert "edgetune train" in capsys.readouterr().err
    assert run(["embed", gguf, str(tmp_path / "none.jsonl")]) == ExitCode.USAGE
    assert run(["embed", gguf, "a", "--format", "parquet"]) == ExitCode.USAGE
    assert run(["embed", gguf, "a", "--engine", "torch"]) == ExitCode.USAGE
    assert run(["embed", gguf, "a", "--prompt-name", "query", "-t", "1"]) == ExitCode.USAGE
    assert run(["embed", decoder, "a", "-t", "1"]) == ExitCode.OK
    assert "warning" in capsys.readouterr().err


def test_torch_refuses_what_llama_cpp_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_encoder(tmp_path / "whole", "bert", "ForSequenceClassification")
    refused: dict[str, str] = {}
    for name in ("no tokenizer files", "truncated", "4 labels"):
        damaged = shutil.copytree(whole, tmp_path / name)
        weights, config = damaged / "model.safetensors", damaged / "config.json"
        if name == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif name == "4 labels":
            labels = {str(number): f"L{number}" for number in range(4)}
            config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": labels}))
        else:
            (damaged / "vocab.txt").unlink()
        assert run(["classify", str(damaged), "a fox", "--engine", "torch"]) == ExitCode.FAILED
        refused[name] = capsys.readouterr().err
    assert all(name in told for name, told in refused.items()), refused
    assert run(["classify", str(whole), "a fox", "--engine", "torch"]) == 0


def test_torch_refuses_a_run_of_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = (
        write_encoder(tmp_path / name, "bert", "ForSequenceClassification", seed=seed)
        for seed, name in enumerate(("base", "other"))
    )
    fingerprint = fingerprint_checkpoint(base)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    record = Run(path=run_dir, base_path=base, base_name="base", fingerprint=fingerprint).record()
    (run_dir / RUN_RECORD).write_text(json.dumps(record))
    asked = ["classify", str(other), "a fox", "--engine", "torch", "--lora", str(run_dir)]
    assert run(asked) == ExitCode.UNSUPPORTED
    assert "was trained on base" in capsys.readouterr().err
    run([*asked, "--force"])
    assert "was trained on base" not in capsys.readouterr().err


def test_a_run_on_a_base_that_llama_lacks_runs_in_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    base = write_encoder(tmp_path / "bert", "bert")
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    config = transformers.AlbertConfig(
        vocab_size=size, hidden_size=32, embedding_size=16, num_attention_heads=4, intermediate_size=32, num_labels=2
    )
    model = transformers.AlbertForSequenceClassification(config)
    model.save_pretrained(base)
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(tmp_path / "run")
    fingerprint = fingerprint_checkpoint(base)
    record = Run(path=tmp_path / "run", base_path=base, base_name="bert", fingerprint=fingerprint).record()
    (tmp_path / "run" / RUN_RECORD).write_text(json.dumps(record))
    assert run(["classify", str(tmp_path / "run"), "the fox", "--json"]) == ExitCode.OK
    out = capsys.readouterr()
    assert "It runs in torch instead" in out.err
    assert set(lines(out.out)[0]) == {"text", "label", "scores"}


def test_a_decoder_made_for_vectors_by_others_is_known_by_its_pooling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama")
    for name, metadata in (("plain", {}), ("vectors", {"llama.pooling_type": 3})):
        convert_base(checkpoint, tmp_path / f"{name}.gguf", outtype="f16", metadata=metadata)
        assert run(["embed", str(tmp_path / f"{name}.gguf"), "hello", "-t", "1"]) == ExitCode.OK
        captured = capsys.readouterr()
        assert ("writes text" in captured.err) is (name == "plain")
        length = np.linalg.norm(np.asarray(lines(captured.out)[0]["embedding"], np.float64))
        assert length == pytest.approx(1, abs=1e-5)
        assert purpose_of(tmp_path / f"{name}.gguf", "model") == ("chat" if name == "plain" else "embed")


def test_an_empty_file_has_no_text(gguf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.txt").touch()
    assert run(["embed", gguf, str(tmp_path / "none.txt")]) == ExitCode.USAGE
    assert "There is no text to read." in capsys.readouterr().err


def test_a_name_that_promises_another_format_is_refused(gguf: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.csv"
    assert run(["embed", gguf, "hello", "-o", str(path)]) == ExitCode.USAGE
    assert not path.exists()
    assert run(["embed", gguf, "hello", "-o", str(path), "--format", "json", "-t", "1"]) == ExitCode.OK
