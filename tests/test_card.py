"""What a model card says of licence, languages and origin is in the GGUF file; a card that says nothing is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters import convert_base
from converters.card import card_metadata
from edgetune.gguf_header import read_gguf_header
from tests.checkpoints import write_checkpoint

CARD = """---
license: other
license_name: qwen-research
license_link: https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE
language:
- en
- no
pipeline_tag: text-generation
base_model: Qwen/qwen2.5-3B-v2
datasets:
- https://huggingface.co/datasets/someone/rows
- local rows
tags:
- chat
---
# A model
---
license: mit
"""


def card(tmp_path: Path, text: str) -> Path:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_front_matter_becomes_general_keys(tmp_path: Path) -> None:
    assert card_metadata(card(tmp_path, CARD)) == {
        "general.license": "other",
        "general.license.name": "qwen-research",
        "general.license.link": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
        "general.tags": ["chat", "text-generation"],
        "general.languages": ["en", "no"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Qwen2.5 3B v2",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/qwen2.5-3B-v2",
        "general.dataset.count": 2,
        "general.dataset.0.name": "Rows",
        "general.dataset.0.organization": "Someone",
        "general.dataset.0.repo_url": "https://huggingface.co/datasets/someone/rows",
        "general.dataset.1.name": "Local Rows",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A model\nlicense: mit\n",
        "---\nlicense: mit\n",
        "---\nlicense: [mit\n---\n",
        "---\n- mit\n---\n",
        "---\nlicense: {a: 1}\ntags: null\nlanguage: [[en]]\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
    ],
)
def test_a_card_that_says_nothing_is_passed_over(text: str, tmp_path: Path) -> None:
    assert card_metadata(card(tmp_path, text)) == {}


def test_a_card_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    assert card_metadata(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_metadata(tmp_path) == {}


def test_the_keys_are_in_the_file(tmp_path: Path) -> None:
    model_dir = card(write_checkpoint(tmp_path / "tiny", "llama"), CARD)
    convert_base(model_dir, tmp_path / "tiny.gguf")
    metadata = read_gguf_header(tmp_path / "tiny.gguf", arrays=True).metadata
    assert (metadata["general.license"], metadata["general.languages"]) == ("other", ["en", "no"])
