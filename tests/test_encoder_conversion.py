"""Encoders, and decoders with a classifier, as GGUF files: hidden states and heads answer as in torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import CorruptCheckpoint, UnsupportedModel, convert_base
from edgetune.head import read_head
from tests.checkpoints import DECODERS, build_bpe_tokenizer, edit_json, randomize
from tests.encoders import ENCODERS, LABELS, furthest, head_output, llama_states, softmax, write_encoder

FURTHEST = 1e-5
"""Largest 1 − cosine of a hidden state in float16."""
NEAREST = 2e-3
"""Largest difference of a probability in float16."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an encoder once."""
    root = tmp_path_factory.mktemp("encoders")

    def write(name: str, kind: str = "Model", **overrides: Any) -> Path:
        directory = root / f"{name}-{kind}-{len(overrides)}"
        return directory if directory.is_dir() else write_encoder(directory, name, kind, overrides=overrides)

    return write


def random_ids(model_dir: Path, count: int) -> list[int]:
    size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    return [int(one) for one in np.random.default_rng(count).integers(5, size, count)]


def torch_answers(model_dir: Path, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The last hidden states, and what the classifier says if the model is one."""
    import torch
    import transformers

    name = json.loads((model_dir / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        states = getattr(model, model.base_model_prefix, model)(torch.tensor([ids])).last_hidden_state[0]
        scores = model(torch.tensor([ids])).logits[0] if name.endswith("SequenceClassification") else None
    return np.asarray(states.numpy()), None if scores is None else np.asarray(scores.numpy())


def check_answers(model_dir: Path, out_path: Path) -> None:
    for count in (3, 120):
        ids = random_ids(model_dir, count)
        states, scores = torch_answers(model_dir, ids)
        found = llama_states(out_path, ids)
        assert furthest(states, found) < FURTHEST
        if scores is not None:
            assert np.abs(softmax(scores) - softmax(head_output(out_path, found))).max() < NEAREST


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_answers_as_in_torch(name: str, kind: str, encoder: Callable[..., Path], tmp_path: Path) -> None:
    model_dir = encoder(name, kind, **LABELS)
    notices: list[str] = []
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16", on_notice=notices.append)
    check_answers(model_dir, tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    if kind == "ForSequenceClassification":
        assert (head.task, head.labels, notices) == ("classification", ("red", "green", "blue"), [])
    else:
        assert (head.task, head.pooling) == ("embedding", None)
        assert bool(notices) == (kind == "ForMaskedLM" or name.startswith(("bert", "roberta", "xlm", "camem")))


def test_a_mean_pooled_classifier(encoder: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"}
    model_dir = encoder("modernbert", "ForSequenceClassification", **LABELS, **settings)
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16")
    check_answers(model_dir, tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", ["SequenceClassification", ""])
def test_a_decoder_with_a_classifier_or_without_a_head(family: str, kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config_class, settings = DECODERS[family]
    tokenizer = build_bpe_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **{**settings, **ids, **LABELS})
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification if kind else transformers.AutoModel
    model = auto.from_config(config)
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    convert_base(tmp_path / "model", tmp_path / "model.gguf", outtype="f16")
    check_answers(tmp_path / "model", tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    assert (head.task, head.pooling) == (("classification", "last") if kind else ("embedding", None))


@pytest.mark.parametrize(
    ("changes", "task", "labels"),
    [
        ({"id2label": None}, "classification", ("LABEL_0", "LABEL_1")),
        ({"problem_type": "multi_label_classification"}, "multilabel", ("red", "green", "blue")),
        ({"problem_type": "single_label_classification"}, "classification", ("red", "green", "blue")),
        ({"id2label": {"0": "LABEL_0"}}, "regression", ()),
        ({"problem_type": "regression"}, "regression", ()),
    ],
)
def test_what_a_classifier_says(
    changes: dict[str, Any], task: str, labels: tuple[str, ...], encoder: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = shutil.copytree(encoder("bert", "ForSequenceClassification", **LABELS), tmp_path / "model")
    edit_json(model_dir / "config.json", **changes, label2id=None)
    rows = 3 if "id2label" not in changes else 1 if changes["id2label"] else 2
    tensors = load_file(model_dir / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, model_dir / "model.safetensors")
    convert_base(model_dir, tmp_path / "model.gguf")
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    assert (head.task, head.labels) == (task, labels)
    assert head.layers[-1].outputs == rows


def edited(source: Path, directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def tensors_of(path: Path) -> dict[str, NDArray[Any]]:
    from gguf import GGUFReader

    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def test_names_of_the_first_checkpoints(encoder: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(160)[None]

    source = encoder("bert")
    convert_base(source, tmp_path / "new.gguf")
    convert_base(edited(source, tmp_path / "old", rename), tmp_path / "old.gguf")
    new, old = tensors_of(tmp_path / "new.gguf"), tensors_of(tmp_path / "old.gguf")
    assert new.keys() == old.keys()
    assert all(np.array_equal(new[name], old[name]) for name in new)


def test_a_weight_of_whole_numbers_is_refused(encoder: Callable[..., Path], tmp_path: Path) -> None:
    def round_off(tensors: dict[str, Any]) -> None:
        tensors["embeddings.LayerNorm.weight"] = tensors["embeddings.LayerNorm.weight"].long()

    with pytest.raises(UnsupportedModel, match="I64"):
        convert_base(edited(encoder("bert"), tmp_path / "model", round_off), tmp_path / "model.gguf")


def test_a_lost_layer_of_the_head_is_missed(encoder: Callable[..., Path], tmp_path: Path) -> None:
    def lose(tensors: dict[str, Any]) -> None:
        del tensors["bert.pooler.dense.weight"]

    source = encoder("bert", "ForSequenceClassification", **LABELS)
    with pytest.raises(CorruptCheckpoint, match=r"pooler\.dense\.weight"):
        convert_base(edited(source, tmp_path / "model", lose), tmp_path / "model.gguf")


def test_a_head_of_another_size_is_refused(encoder: Callable[..., Path], tmp_path: Path) -> None:
    model_dir = shutil.copytree(encoder("bert", "ForSequenceClassification", **LABELS), tmp_path / "model")
    edit_json(model_dir / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(CorruptCheckpoint, match=r"classifier\.(weight|bias)"):
        convert_base(model_dir, tmp_path / "model.gguf")


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act": ("bert", {"hidden_act": "relu"}),
    "is_decoder": ("bert", {"is_decoder": True}),
    "pruned_heads": ("bert", {"pruned_heads": {"0": [1]}}),
    "position_embedding_type": ("bert", {"position_embedding_type": "relative_key"}),
    "activation": ("distilbert", {"activation": "relu"}),
    "embedding_size": ("electra", {"embedding_size": 48}),
    "norm_bias": ("modernbert", {"norm_bias": True}),
    "rope_type": ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}),
    "every token": ("bert", {"architectures": ["BertForTokenClassification"]}),
    "an answer begins": ("roberta", {"architectures": ["RobertaForQuestionAnswering"]}),
    "several texts": ("bert", {"architectures": ["BertForMultipleChoice"]}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_graph_or_a_head_cannot_say_is_refused(words: str, encoder: Callable[..., Path], tmp_path: Path) -> None:
    name, changes = REFUSED[words]
    model_dir = shutil.copytree(encoder(name), tmp_path / "model")
    edit_json(model_dir / "config.json", **changes)
    with pytest.raises(UnsupportedModel, match=words):
        convert_base(model_dir, tmp_path / "model.gguf")


@pytest.mark.parametrize(("quant", "bound"), [("Q8_0", 0.01), ("Q4_K_M", 0.2)])
@pytest.mark.parametrize("name", ["bert", "bert-odd", "modernbert"])
def test_the_quantizer_takes_the_files(
    name: str, quant: str, bound: float, encoder: Callable[..., Path], tmp_path: Path
) -> None:
    from edgetune.export import export_base

    model_dir = encoder(name, "ForSequenceClassification", **LABELS)
    export_base(model_dir, tmp_path / "model.gguf", quant=quant)
    ids = random_ids(model_dir, 40)
    states, _ = torch_answers(model_dir, ids)
    assert furthest(states, llama_states(tmp_path / "model.gguf", ids)) < bound
    head = read_head(tmp_path / "model.gguf")
    assert head is not None
    assert head.labels == ("red", "green", "blue")


def test_positions_begin_after_the_padding_token(encoder: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    convert_base(encoder("roberta"), tmp_path / "model.gguf")
    keys = {key: field.contents() for key, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert keys["bert.context_length"] == 158
    assert tensors_of(tmp_path / "model.gguf")["position_embd.weight"].shape[0] == 158


def test_a_model_without_a_vocabulary_at_its_end_writes_no_text(encoder: Callable[..., Path], tmp_path: Path) -> None:
    from edgetune.engine.llama import LlamaEngine
    from edgetune.errors import UnsupportedError

    for kind, verb in (("Model", "embed"), ("ForSequenceClassification", "classify")):
        convert_base(encoder("bert", kind, **LABELS), tmp_path / "model.gguf")
        with pytest.raises(UnsupportedError, match="writes no text") as caught:
            LlamaEngine.open(tmp_path / "model.gguf", gpu_layers=0, threads=1)
        assert verb in caught.value.hint
