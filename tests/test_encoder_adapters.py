"""Adapters of classifiers and sentence models: one GGUF file with LoRA pairs and a head, or merged into the base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import CorruptCheckpoint, TrainedHead, UnsupportedAdapter, convert_adapter, convert_base
from edgetune.artifacts import RUN_RECORD, Fingerprint, Run
from edgetune.export import export_adapter, export_base
from edgetune.head import read_head
from tests.adapters import _fill
from tests.checkpoints import edit_json, write_checkpoint
from tests.encoders import ENCODERS, LABELS, furthest, head_output, llama_states, softmax, write_encoder

NAMES = ("low", "middle", "high", "top")
TRAINED = TrainedHead("classification", NAMES)
NEAREST = 2e-3
IDS = [7, 30, 12, 35, 21, 9, 22, 18, 33, 6, 5, 27, 28, 13]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Model", {"target_modules": ["query", "value"]}),
    "bert+pooler": ("Model", {"target_modules": ["query", "dense"], "exclude_modules": ["bert.pooler.dense"]}),
    "bert-odd": ("Model", {"target_modules": ["query", "key", "value", "dense"], "use_rslora": True}),
    "distilbert": (
        "ForMaskedLM",
        {"target_modules": ["q_lin", "lin1", "lin2"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "electra": ("ForPreTraining", {"target_modules": ["query", "value"]}),
    "roberta": ("ForMaskedLM", {"target_modules": ["query", "dense"]}),
    "xlm-roberta": ("ForSequenceClassification", {"target_modules": "all-linear"}),
    "modernbert": ("ForMaskedLM", {"target_modules": ["Wqkv", "Wi"], "modules_to_save": ["classifier"]}),
    "qwen2": ("", {"target_modules": ["q_proj", "down_proj"]}),
    "llama-tied": ("", {"target_modules": ["v_proj", "up_proj"]}),
    "gpt2": ("", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
"""Base → (its head, LoRA settings)."""


@dataclass(frozen=True)
class Trained:
    base_dir: Path
    adapter_dir: Path
    scores: NDArray[np.float32]
    """What PEFT says of IDS."""


def write_base(directory: Path, name: str, kind: str) -> Path:
    if name in ENCODERS:
        return write_encoder(directory, name, kind)
    return write_checkpoint(directory, name, overrides={"pad_token_id": 0})


def train(directory: Path, name: str, kind: str, settings: dict[str, Any], *, task: str = "SEQ_CLS") -> Trained:
    """Save a base and an adapter of it in which everything that is trained is random."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base_dir = write_base(directory / "base", name.partition("+")[0], kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = transformers.AutoModelForSequenceClassification if task == "SEQ_CLS" else transformers.AutoModel
        labels = {"num_labels": len(NAMES)} if task == "SEQ_CLS" else {}
        torch.manual_seed(2)
        model = auto.from_pretrained(base_dir, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
        peft_model = get_peft_model(model, LoraConfig(task_type=task, r=4, lora_alpha=8, **settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter_name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    _fill(parameter_name, parameter, 0.3, generator)
                if "modules_to_save" in parameter_name and parameter.ndim == 2:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            peft_model.save_pretrained(directory / "adapter")
            out = peft_model.eval()(torch.tensor([IDS]))
    scores = out.logits[0] if task == "SEQ_CLS" else out.last_hidden_state[0]
    return Trained(base_dir, directory / "adapter", np.asarray(scores.numpy()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Trains a case once."""
    done: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in done:
            done[name] = train(tmp_path_factory.mktemp(name), name, *CASES[name])
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_classifier_trained_on_any_base(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained(name)
    convert_base(one.base_dir, tmp_path / "base.gguf", outtype="f16")
    convert_adapter(one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TRAINED)
    expected = softmax(one.scores)
    states = llama_states(tmp_path / "base.gguf", IDS, lora=tmp_path / "adapter.gguf")
    assert np.abs(expected - softmax(head_output(tmp_path / "adapter.gguf", states))).max() < NEAREST
    without = llama_states(tmp_path / "base.gguf", IDS)
    assert np.abs(expected - softmax(head_output(tmp_path / "adapter.gguf", without))).max() > 5 * NEAREST
    head = read_head(tmp_path / "adapter.gguf")
    assert head is not None
    assert (head.task, head.labels) == ("classification", NAMES)


@pytest.mark.parametrize("name", CASES)
def test_merged_into_its_base(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained(name)
    convert_base(one.base_dir, tmp_path / "merged.gguf", merge=one.adapter_dir, trained=TRAINED, outtype="f16")
    found = head_output(tmp_path / "merged.gguf", llama_states(tmp_path / "merged.gguf", IDS))
    assert np.abs(softmax(one.scores) - softmax(found)).max() < NEAREST
    head = read_head(tmp_path / "merged.gguf")
    assert head is not None
    assert head.labels == NAMES


def test_labels_without_a_record(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained("bert")
    convert_adapter(one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf")
    head = read_head(tmp_path / "adapter.gguf")
    assert head is not None
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_labels_that_do_not_fit_the_head_are_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    one = trained("bert")
    with pytest.raises(UnsupportedAdapter, match="3 labels"):
        convert_adapter(
            one.adapter_dir, one.base_dir, tmp_path / "a.gguf", trained=TrainedHead("classification", NAMES[:3])
        )


def test_a_pooler_that_nobody_saved_is_missed(tmp_path: Path) -> None:
    one = train(tmp_path, "bert", "ForMaskedLM", {"target_modules": ["query"]})
    with pytest.raises(UnsupportedAdapter, match=r"pooler\.dense"):
        convert_adapter(one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TRAINED)
    with pytest.raises(CorruptCheckpoint, match=r"pooler\.dense"):
        convert_base(one.base_dir, tmp_path / "merged.gguf", merge=one.adapter_dir, trained=TRAINED)


def test_trained_biases_are_merged_but_fit_no_adapter_file(tmp_path: Path) -> None:
    one = train(tmp_path, "bert", "Model", {"target_modules": ["query", "value"], "bias": "lora_only"})
    with pytest.raises(UnsupportedAdapter, match="bias"):
        convert_adapter(one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TRAINED)
    convert_base(one.base_dir, tmp_path / "merged.gguf", merge=one.adapter_dir, trained=TRAINED, outtype="f16")
    found = head_output(tmp_path / "merged.gguf", llama_states(tmp_path / "merged.gguf", IDS))
    assert np.abs(softmax(one.scores) - softmax(found)).max() < NEAREST


def test_a_classifier_without_its_last_layer_is_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    one = trained("bert")
    adapter_dir = shutil.copytree(one.adapter_dir, tmp_path / "adapter")
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "classifier" not in name},
        adapter_dir / "adapter_model.safetensors",
    )
    with pytest.raises(UnsupportedAdapter, match=r"classifier\.weight"):
        convert_adapter(adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TRAINED)


def test_another_task_is_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    import shutil

    adapter_dir = shutil.copytree(trained("bert").adapter_dir, tmp_path / "adapter")
    edit_json(adapter_dir / "adapter_config.json", task_type="TOKEN_CLS")
    with pytest.raises(UnsupportedAdapter, match="TOKEN_CLS"):
        convert_adapter(adapter_dir, trained("bert").base_dir, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2"])
def test_an_adapter_of_a_sentence_model(name: str, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    settings = {key: value for key, value in settings.items() if key != "modules_to_save"}
    one = train(tmp_path, name, kind, settings, task="FEATURE_EXTRACTION")
    convert_base(one.base_dir, tmp_path / "base.gguf", outtype="f16")
    convert_adapter(
        one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TrainedHead("embedding", pooling="mean")
    )
    states = llama_states(tmp_path / "base.gguf", IDS, lora=tmp_path / "adapter.gguf")
    assert furthest(one.scores, states) < 1e-5
    assert furthest(one.scores, llama_states(tmp_path / "base.gguf", IDS)) > 1e-3
    head = read_head(tmp_path / "adapter.gguf")
    assert head is not None
    assert (head.task, head.pooling, head.layers) == ("embedding", "mean", ())


def test_a_run_record_names_the_labels(tmp_path: Path) -> None:
    from edgetune.fingerprint import fingerprint_checkpoint

    one = train(tmp_path, "bert", "Model", {"target_modules": ["query"]})
    fingerprint: Fingerprint = fingerprint_checkpoint(one.base_dir)
    data = {"labels": list(NAMES), "multi_label": True}
    run = Run(one.adapter_dir, one.base_dir, "base", fingerprint, task="classification", data=data)
    (one.adapter_dir / RUN_RECORD).write_text(json.dumps(run.record()), encoding="utf-8")
    export_adapter(one.adapter_dir, tmp_path / "adapter.gguf")
    export_base(one.base_dir, tmp_path / "merged.gguf", merge=one.adapter_dir)
    for name in ("adapter", "merged"):
        head = read_head(tmp_path / f"{name}.gguf")
        assert head is not None
        assert (head.task, head.labels) == ("multilabel", NAMES)


def test_a_retrained_head_takes_the_place_of_a_classifiers_own(tmp_path: Path) -> None:
    base_dir = write_encoder(tmp_path / "own", "bert", "ForSequenceClassification", overrides=LABELS)
    one = train(tmp_path, "bert", "ForSequenceClassification", {"target_modules": ["query"]})
    assert base_dir.is_dir()
    convert_adapter(one.adapter_dir, one.base_dir, tmp_path / "adapter.gguf", trained=TRAINED)
    head = read_head(tmp_path / "adapter.gguf")
    assert head is not None
    assert head.layers[-1].outputs == 4
