"""What a damaged sentence-transformers directory is refused for, in a sentence and before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters import CorruptCheckpoint
from converters.sentence_transformers import read_sentence_model
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.sentence_modules import read_modules


def write_modules(directory: Path, *modules: tuple[str, str], listed: Any = None) -> Path:
    """A directory whose modules.json lists (kind, folder) as sentence-transformers does, or is `listed`."""
    values = [
        {"idx": number, "name": str(number), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, folder) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(values if listed is None else listed))
    return directory


@pytest.mark.parametrize("listed", [{}, [], "x", 5])
def test_a_list_without_modules_is_refused(tmp_path: Path, listed: Any) -> None:
    write_modules(tmp_path, listed=listed)
    with pytest.raises(CorruptFileError, match=r"modules\.json lists no modules"):
        read_modules(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"modules\.json (lists no|is not a valid list of) modules"):
        read_sentence_model(tmp_path)


def test_the_converter_names_a_transformer_without_its_directory(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"names '0_x', and there is no such directory"):
        read_sentence_model(write_modules(tmp_path, ("Transformer", "0_x")))


@pytest.mark.parametrize("kind", ["Transformer", "Pooling", "Dense", "LayerNorm"])
def test_a_module_without_its_directory_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CorruptFileError, match=rf"lacks the directory .*/0_x of its {kind}\."):
        read_modules(write_modules(tmp_path, (kind, "0_x")))


@pytest.mark.parametrize("kind", ["CNN", "WeightedLayerPooling", "Router", "StaticEmbedding"])
def test_an_unknown_module_is_refused_with_a_way_out(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"module {kind}, which is unknown") as caught:
        read_modules(write_modules(tmp_path, ("Transformer", ""), (kind, "1_x")))
    assert "sentence-transformers" in caught.value.hint


def test_prompts_that_are_no_object_are_none(tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": ["a"], "default_prompt_name": "a"}')
    write_modules(tmp_path, ("Transformer", ""), ("Pooling", "1_Pooling"))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for found in (read_modules(tmp_path), read_sentence_model(tmp_path)):
        assert found is not None
        assert (dict(found.prompts), found.default_prompt) == ({}, "")
