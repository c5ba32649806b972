"""`edgetune models show`: dimensions, memory and licence of checkpoints and GGUF files, without their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli.models import command
from edgetune.library.sizes import Sizes, sizes_from_config
from tests.ggufs import base_gguf, checkpoint

_BOTH = {"is_encoder_decoder": True, "d_model": 64}


def show(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["show", str(path), "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_a_checkpoint_and_its_gguf_have_the_same_dimensions(family: str) -> None:
    first, second = show(checkpoint(family)), show(base_gguf(family))
    for name in ("layers", "hidden_size", "heads", "kv_heads", "head_size", "context", "vocabulary"):
        assert first[name] == second[name], name
    assert first["feed_forward_size"] in (second["feed_forward_size"], None)


def test_memory_is_weights_and_cache(tmp_path: Path) -> None:
    shown = show(base_gguf("llama"))
    per_token = 2 * shown["layers"] * shown["kv_heads"] * shown["head_size"] * 2
    assert list(shown["memory"]) == ["512"]
    weights = shown["memory"]["512"] - 512 * per_token
    assert 0 < weights <= shown["bytes"]


def test_longer_contexts_up_to_the_models_own() -> None:
    sizes = Sizes(layers=2, hidden_size=8, heads=2, kv_heads=1, head_size=4, context=4096)
    assert list(sizes.memory(100, keeps_cache=True)) == [512, 2048, 4096]
    assert sizes.memory(100, keeps_cache=True)[4096] == 100 + 4096 * 2 * 2 * 4 * 2
    assert set(sizes.memory(100, keeps_cache=False).values()) == {100}
    assert Sizes(context=4096).memory(100, keeps_cache=True) == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {**_BOTH, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 32},
            Sizes(layers=2, decoder_layers=3, hidden_size=64, heads=4, kv_heads=4, head_size=32),
        ),
        (
            {**_BOTH, "encoder_layers": 6, "decoder_layers": 1, "encoder_attention_heads": 8},
            Sizes(layers=6, decoder_layers=1, hidden_size=64, heads=8, kv_heads=8, head_size=8),
        ),
        (
            {"n_layers": 6, "dim": 768, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30522},
            Sizes(6, hidden_size=768, feed_forward_size=3072, heads=12, kv_heads=12, head_size=64, vocabulary=30522),
        ),
        (
            {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}},
            Sizes(layers=2, hidden_size=64, heads=4, kv_heads=4, head_size=32),
        ),
        ({}, Sizes()),
    ],
)
def test_every_familys_own_names(config: dict[str, Any], expected: Sizes) -> None:
    assert sizes_from_config(config) == expected


def test_the_licence_of_the_models_card(tmp_path: Path) -> None:
    import shutil

    model_dir = tmp_path / "hf"
    shutil.copytree(checkpoint("llama"), model_dir)
    assert show(model_dir)["licence"] == ""
    (model_dir / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert show(model_dir)["licence"] == "apache-2.0"
    (model_dir / "README.md").write_text("---\nlicense: [mit, other\n---\n")
    assert show(model_dir)["licence"] == ""


def test_people_read_it_too() -> None:
    text = CliRunner().invoke(command, ["show", str(base_gguf("llama"))]).stdout
    assert "in memory" in text
    assert "with 512 tokens" in text
    assert "head size" in text
