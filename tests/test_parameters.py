"""Parameters as `models show` and explain count them are those of transformers' `num_parameters`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.explain.anatomy import read_anatomy
from edgetune.export import export_base
from edgetune.library.describe import describe
from tests.checkpoints import DECODERS
from tests.encoders import ENCODERS, LABELS, write_encoder
from tests.ggufs import base_gguf, checkpoint
from tests.seq2seq_checkpoints import write_seq2seq


def transformers_count(model_dir: Path) -> int:
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, config.architectures[0]).from_pretrained(model_dir)
    return int(model.num_parameters())


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_of_a_decoder_and_its_gguf(family: str) -> None:
    expected = transformers_count(checkpoint(family))
    assert describe(checkpoint(family)).parameters == expected
    assert describe(base_gguf(family)).parameters == expected
    assert read_anatomy(base_gguf(family)).parameters == expected


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_of_a_classifier_whose_head_travels_as_metadata(name: str, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / name, name, "ForSequenceClassification", overrides=LABELS)
    export_base(source, tmp_path / "model.gguf", outtype="f16")
    expected = transformers_count(source)
    assert describe(source).parameters == expected
    assert describe(tmp_path / "model.gguf").parameters == expected


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_of_an_encoder(name: str, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / name, name)
    assert describe(source).parameters == transformers_count(source)


@pytest.mark.parametrize("family", ["t5", "flan-t5", "bart", "mbart", "bert2bert", "pegasus", "led"])
def test_of_an_encoder_decoder(family: str, tmp_path: Path) -> None:
    source = write_seq2seq(tmp_path / family, family)
    assert describe(source).parameters == transformers_count(source)


Tensors = dict[str, Any]


def _masks(tensors: Tensors) -> None:
    import torch

    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]


def _speeds(tensors: Tensors) -> None:
    import torch

    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)


def _tied(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def _places(tensors: Tensors) -> None:
    import torch

    tensors["bert.embeddings.position_ids"] = torch.arange(160)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]


def _both_sides(tensors: Tensors) -> None:
    tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"]


@pytest.mark.parametrize(
    ("family", "add"),
    [
        ("gpt2", _masks),
        ("llama", _speeds),
        ("llama-tied", _tied),
        ("gemma3", _tied),
        ("bert", _places),
        ("t5", _both_sides),
        ("flan-t5", _both_sides),
    ],
)
def test_what_old_files_hold_twice_or_as_buffers_does_not_count(
    family: str, add: Callable[[Tensors], None], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    target = tmp_path / "model"
    if family in DECODERS:
        shutil.copytree(checkpoint(family), target)
    elif family == "bert":
        write_encoder(target, family, "ForMaskedLM")
    else:
        write_seq2seq(target, family)
    tensors = load_file(target / "model.safetensors")
    before = describe(target)
    add(tensors)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    shown = describe(target)
    assert shown.bytes > before.bytes
    assert shown.parameters == before.parameters == transformers_count(target)
    assert set(shown.types) == {"F32"}


def test_a_head_that_is_not_tied_counts() -> None:
    tied, apart = describe(checkpoint("llama-tied")), describe(checkpoint("llama"))
    assert apart.parameters - tied.parameters == (apart.sizes.vocabulary or 0) * (apart.sizes.hidden_size or 0)
