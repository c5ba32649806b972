"""sentence-transformers directories: pooling, layers, prompts and limits in the GGUF file, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import ConverterError, CorruptCheckpoint, UnsupportedModel, convert_base
from edgetune.cli.main import run
from edgetune.head import pool, read_head
from tests.encoders import write_encoder

WIDTH = 96
GENERATOR = np.random.default_rng(0)
DENSE = {
    "linear.weight": GENERATOR.normal(size=(24, WIDTH)).astype(np.float32) / 10,
    "linear.bias": GENERATOR.normal(size=24).astype(np.float32),
}
TANH = {
    "in_features": WIDTH,
    "out_features": 24,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
Module = tuple[str, str, Mapping[str, Any], Mapping[str, Any]]


def pooling(**modes: Any) -> Module:
    return "Pooling", "1_Pooling", {"word_embedding_dimension": WIDTH, **modes}, {}


def write_modules(directory: Path, modules: Sequence[Module], *, inside: str = "") -> Path:
    from safetensors.numpy import save_file

    listed: list[Module] = [("Transformer", inside, {}, {}), *modules]
    values = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path, _, _) in enumerate(listed)
    ]
    (directory / "modules.json").write_text(json.dumps(values))
    for _, path, config, tensors in modules:
        (directory / path).mkdir(exist_ok=True)
        (directory / path / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(dict(tensors), directory / path / "model.safetensors")
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "model", "bert")


def keys_of(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("modes", "expected", "number"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean", 1),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls", 2),
        ({"pooling_mode_lasttoken": True}, "last", 3),
        ({"pooling_mode_max_tokens": True}, "max", None),
        ({"pooling_mode": "lasttoken"}, "last", 3),
        ({}, "mean", 1),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean", 1),
    ],
)
def test_poolings(modes: dict[str, Any], expected: str, number: int | None, model_dir: Path, tmp_path: Path) -> None:
    write_modules(model_dir, [pooling(**modes), ("Normalize", "2_Normalize", {}, {})])
    convert_base(model_dir, tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    assert (head.task, head.pooling, head.normalize) == ("embedding", expected, True)
    assert keys_of(tmp_path / "model.gguf").get("bert.pooling_type") == number


def test_a_dense_layer_computes_as_in_torch(model_dir: Path, tmp_path: Path) -> None:
    write_modules(model_dir, [pooling(), ("Dense", "2_Dense", TANH, DENSE)])
    convert_base(model_dir, tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    states: NDArray[np.float32] = GENERATOR.normal(size=(5, WIDTH)).astype(np.float32)
    found = head.apply(pool(states, [5], "mean"))[0]
    expected = np.tanh(DENSE["linear.weight"] @ states.mean(axis=0) + DENSE["linear.bias"])
    assert np.allclose(found, expected, atol=1e-5)
    assert not head.normalize


def test_prompts_and_the_length_limit(model_dir: Path, tmp_path: Path) -> None:
    write_modules(model_dir, [pooling()])
    (model_dir / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    prompts = {"prompts": {"query": "query: ", "passage": ""}, "default_prompt_name": "query"}
    (model_dir / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    convert_base(model_dir, tmp_path / "model.gguf")
    keys = keys_of(tmp_path / "model.gguf")
    assert keys["edgetune.tokenizer.max_length"] == 64
    assert {key: value for key, value in keys.items() if "prompt" in key} == {
        "edgetune.prompts.query": "query: ",
        "edgetune.default_prompt": "query",
    }


def test_texts_are_lower_cased_where_the_files_say_so(model_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_modules(model_dir, [pooling()])
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    ids = {}
    for lower in (False, True):
        (model_dir / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lower}))
        convert_base(model_dir, tmp_path / "model.gguf")
        tokenizer = Tokenizer.from_str(keys_of(tmp_path / "model.gguf")["tokenizer.huggingface.json"])
        ids[lower] = tokenizer.encode("The FOX").tokens
    assert ids[True] == ["[CLS]", "the", "fox", "[SEP]"]
    assert ids[False] == ["[CLS]", "The", "F", "##O", "##X", "[SEP]"]


def test_a_model_in_a_directory_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoder(tmp_path / "model" / "0_Transformer", "bert")
    write_modules(tmp_path / "model", [pooling(pooling_mode_cls_token=True)], inside="0_Transformer")
    convert_base(tmp_path / "model", tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    assert head.pooling == "cls"
    vectors = []
    for source in (tmp_path / "model", tmp_path / "model.gguf"):
        out = tmp_path / f"{source.name}.npy"
        assert run(["embed", str(source), "the quick fox", "-o", str(out)]) == 0
        vectors.append(np.load(out)[0])
    assert vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]) > 0.9999
    assert run(["train", "-m", str(tmp_path / "model"), "-d", str(tmp_path), "--task", "embedding"]) == 3
    assert "keeps its model in 0_Transformer" in capsys.readouterr().err


REFUSED: dict[str, tuple[type[ConverterError], list[Module]]] = {
    "end to end": (UnsupportedModel, [pooling(pooling_mode_cls_token=True, pooling_mode_max_tokens=True)]),
    "weightedmean": (UnsupportedModel, [pooling(pooling_mode_weightedmean_tokens=True)]),
    "mean_sqrt_len": (UnsupportedModel, [pooling(pooling_mode_mean_sqrt_len_tokens=True)]),
    "CNN": (UnsupportedModel, [("CNN", "1_CNN", {}, {})]),
    "Dense": (UnsupportedModel, [pooling(), ("Normalize", "2_N", {}, {}), ("Dense", "3_D", TANH, DENSE)]),
    "Softsign": (UnsupportedModel, [pooling(), ("Dense", "2_D", {**TANH, "activation_function": "x.Softsign"}, DENSE)]),
    "95 wide": (CorruptCheckpoint, [pooling(word_embedding_dimension=95)]),
    "after one of 96": (CorruptCheckpoint, [pooling(), ("Dense", "2_D", {**TANH, "in_features": 7}, DENSE)]),
    "inside": (CorruptCheckpoint, [("Pooling", "../elsewhere", {}, {})]),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_place_is_refused_by_name(words: str, model_dir: Path, tmp_path: Path) -> None:
    error, modules = REFUSED[words]
    write_modules(model_dir, modules)
    with pytest.raises(error, match=words):
        convert_base(model_dir, tmp_path / "model.gguf")
