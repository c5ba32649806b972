"""The gate for encoder-decoders: right files pass, each wrong one fails at the check that should see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from edgetune.artifacts import ParityReport
from edgetune.export import export_adapter, export_base
from edgetune.gguf_header import read_gguf_header
from edgetune.parity import verify
from edgetune.parity.seq2seq import choose_pairs
from tests.adapters import write_adapter
from tests.checkpoints import edit_json
from tests.encoder_decoders import write_t5


def failed(report: ParityReport) -> list[str]:
    names = [check.name for check in report.checks if not check.passed]
    return names + ([] if report.logits is None or report.logits.passed else ["logits"])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "model", "flan-t5")


@pytest.fixture(scope="module")
def gguf(model_dir: Path) -> Path:
    path = model_dir.parent / "model.gguf"
    export_base(model_dir, path, outtype="f16")
    return path


def test_a_right_file_passes(model_dir: Path, gguf: Path) -> None:
    report = verify(model_dir, gguf)
    assert report.passed
    assert not report.not_checked
    assert report.logits is not None
    assert report.logits.max_kl < 1e-3
    assert {check.name: bool(check.checked) for check in report.checks} == {
        "tokenizer": True,
        "template": False,
        "stop": True,
        "structure": True,
    }


def test_a_quantized_file_is_measured_by_its_noise(model_dir: Path, tmp_path: Path) -> None:
    export_base(model_dir, tmp_path / "q.gguf", outtype="q8_0")
    report = verify(model_dir, tmp_path / "q.gguf")
    assert report.passed
    assert report.logits is not None
    assert report.logits.bounded == "mean_kl"


def test_adapters_are_proved(model_dir: Path, gguf: Path, tmp_path: Path) -> None:
    settings = {"task_type": "SEQ_2_SEQ_LM", "strength": 0.1, "target_modules": ["q", "v", "wi_0", "wo"]}
    right = write_adapter(tmp_path / "right", model_dir, **settings)  # type: ignore[arg-type]
    other = write_adapter(tmp_path / "other", model_dir, seed=5, **settings)  # type: ignore[arg-type]
    lora = tmp_path / "lora.gguf"
    export_adapter(right, lora, base_dir=model_dir)
    assert verify(model_dir, gguf, adapter_dir=right, lora_path=lora).passed
    assert failed(verify(model_dir, gguf, adapter_dir=other, lora_path=lora)) == ["logits"]
    export_base(model_dir, tmp_path / "merged.gguf", outtype="f16", merge=right)
    assert verify(model_dir, tmp_path / "merged.gguf", adapter_dir=right, merged=True).passed
    assert failed(verify(model_dir, tmp_path / "merged.gguf", adapter_dir=other, merged=True)) == ["logits"]


def test_another_factor_before_the_head_is_seen(model_dir: Path, tmp_path: Path) -> None:
    copy = write_t5(tmp_path / "copy", "flan-t5")
    edit_json(copy / "config.json", scale_decoder_outputs=True)
    export_base(copy, tmp_path / "scaled.gguf", outtype="f16")
    edit_json(copy / "config.json", scale_decoder_outputs=False)
    assert failed(verify(copy, tmp_path / "scaled.gguf")) == ["logits"]


def test_another_base_start_token_and_vocabulary_are_seen(model_dir: Path, gguf: Path, tmp_path: Path) -> None:
    copy = write_t5(tmp_path / "copy", "flan-t5")
    edit_json(copy / "config.json", decoder_start_token_id=7)
    assert "stop" in failed(verify(copy, gguf))
    edit_json(copy / "config.json", decoder_start_token_id=None)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces[20], pieces[21] = pieces[21], pieces[20]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in failed(verify(copy, gguf))
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] = tensors["encoder.final_layer_norm.weight"] * 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "structure" in failed(verify(copy, gguf))


def test_where_the_start_token_is_written(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "t5")
    edit_json(model_dir / "generation_config.json", decoder_start_token_id=5)
    export_base(model_dir, tmp_path / "model.gguf", outtype="f32")
    assert read_gguf_header(tmp_path / "model.gguf").metadata["t5.decoder_start_token_id"] == 5
    assert verify(model_dir, tmp_path / "model.gguf").passed


def test_held_out_rows_are_predicted(model_dir: Path, gguf: Path, tmp_path: Path) -> None:
    from edgetune.parity.reference import load_reference

    rows = [{"source": f"the dog number {number}", "target": f"der Hund {number}"} for number in range(3)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = load_reference(model_dir, template=None)
    config = json.loads((model_dir / "config.json").read_text())
    pairs = choose_pairs(reference, config, start=0, parameters=10_000, data_path=data)
    assert pairs[1] == (reference.encode("the dog number 0"), [0, *reference.encode("der Hund 0")])
    assert len(pairs) == 5
    assert verify(model_dir, gguf, data_path=data).passed
