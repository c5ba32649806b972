"""The proof for encoders and classifiers passes right files, and says what is wrong with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgetune.export import export_adapter, export_base
from edgetune.parity import verify
from tests.checkpoints import edit_json
from tests.encoders import LABELS, write_encoder
from tests.test_encoder_adapters import CASES, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity-encoders")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    return write_encoder(root / "roberta", "roberta", "ForSequenceClassification", overrides=LABELS)


@pytest.fixture(scope="module")
def gguf(root: Path, checkpoint: Path) -> Path:
    export_base(checkpoint, root / "roberta.gguf", outtype="f16")
    return root / "roberta.gguf"


def test_a_right_file_passes(checkpoint: Path, gguf: Path) -> None:
    report = verify(checkpoint, gguf)
    assert report.passed
    assert not report.not_checked
    assert report.logits is None
    assert report.vectors is not None
    assert report.vectors.min_cosine > 0.9999
    assert report.vectors.score_difference is not None
    assert report.vectors.score_difference < 2e-3


def test_a_quantized_file_has_a_bound_of_its_own(root: Path, checkpoint: Path) -> None:
    export_base(checkpoint, root / "q8.gguf", quant="Q8_0")
    report = verify(checkpoint, root / "q8.gguf")
    assert report.passed
    assert report.vectors is not None
    assert report.vectors.min_cosine >= 0.99
    assert report.vectors.bounded == "mean_distance"


def changed(source: Path, target: Path, *tensors: str, factor: float) -> Path:
    """A copy of a checkpoint with some tensors multiplied."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    values = load_file(target / "model.safetensors")
    for name in tensors:
        assert name in values
        values[name] = np.asarray(values[name] * factor, np.float32)
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name", ["classifier.dense.weight", "roberta.encoder.layer.1.attention.self.key.weight", "classifier.out_proj.bias"]
)
def test_another_weight_fails(root: Path, checkpoint: Path, name: str) -> None:
    other = changed(checkpoint, root / f"other-{name}", name, factor=0.5)
    export_base(other, root / f"{name}.gguf", outtype="f16")
    from edgetune.gguf_header import read_gguf_header
    from edgetune.parity import encoders

    header = read_gguf_header(root / f"{name}.gguf")
    # The fingerprint tells the two apart at once; without one, as in files from elsewhere, the numbers have to.
    bare = {key: value for key, value in header.metadata.items() if "sha256" not in key}
    report = encoders.verify(
        checkpoint,
        type(header)(header.path, header.version, bare, header.tensors, header.data_start, header.file_bytes),
        adapter_dir=None,
        lora=None,
        merged=False,
        data_path=None,
        sink=lambda event: None,
    )
    assert report.vectors is not None
    assert not report.vectors.passed
    assert not verify(checkpoint, root / f"{name}.gguf").passed


def test_other_labels_fail(root: Path, checkpoint: Path, gguf: Path) -> None:
    other = shutil.copytree(checkpoint, root / "labels")
    edit_json(other / "config.json", id2label={"0": "red", "1": "blue", "2": "green"})
    report = verify(other, gguf)
    assert not report.passed
    assert "labels" in next(check for check in report.checks if not check.passed).first_difference


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_an_adapter_with_a_head_passes_and_a_base_without_it_does_not(root: Path, name: str) -> None:
    one = train(root / f"trained-{name}", name, *CASES[name])
    base, lora = root / f"{name}-base.gguf", root / f"{name}-lora.gguf"
    export_base(one.base_dir, base, outtype="f16")
    export_adapter(one.adapter_dir, lora, base_dir=one.base_dir)
    report = verify(one.base_dir, base, adapter_dir=one.adapter_dir, lora_path=lora)
    assert report.passed
    assert report.vectors is not None
    assert report.vectors.score_difference is not None
    assert "adapter_effect" in [check.name for check in report.checks if not check.skipped]

    weak = root / f"weak-{name}"
    shutil.copytree(one.adapter_dir, weak)
    config = json.loads((weak / "adapter_config.json").read_text())
    edit_json(weak / "adapter_config.json", lora_alpha=config["lora_alpha"] * 3)
    assert not verify(one.base_dir, base, adapter_dir=weak, lora_path=lora).passed


def test_an_adapter_of_the_embedding_reaches_both_texts_of_a_pair(root: Path) -> None:
    one = train(root / "embedding", "bert", "Model", {"target_modules": ["query", "word_embeddings"]})
    base, lora = root / "embedding-base.gguf", root / "embedding-lora.gguf"
    export_base(one.base_dir, base, outtype="f16")
    export_adapter(one.adapter_dir, lora, base_dir=one.base_dir)
    report = verify(one.base_dir, base, adapter_dir=one.adapter_dir, lora_path=lora)
    assert report.passed
    assert report.vectors is not None
