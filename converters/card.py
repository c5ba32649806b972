"""A model card's front matter (the YAML on top of README.md) → GGUF's `general.*` keys: licence, tags, origin.

The fields and their spelling are those of Hugging Face's model cards; what they become is as llama.cpp's converter has
it, but for what that one guesses from names. A card says nothing of how a model computes: one that cannot be read is
passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.writer import Value

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_HUB = "https://huggingface.co/"
_REPOSITORY = re.compile(rf"(?:{re.escape(_HUB)}(?:datasets/)?)?([\w.-]+)/([\w.-]+)")
_VERSION = re.compile(r"v?\d.*")


def card_metadata(model_dir: Path) -> dict[str, Value]:
    """The `general.*` keys that README.md in `model_dir` gives; none when it has no front matter."""
    card = read_card(model_dir)
    keys: dict[str, Value] = {}
    for field, key in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if texts := list(_texts(card.get(field))):
            keys[f"general.{key}"] = ",".join(texts)
    for key, fields in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        if listed := [text for field in fields for text in _texts(card.get(field))]:
            keys[f"general.{key}"] = listed
    keys |= _repositories("base_model", list(_texts(card.get("base_model"))))
    return keys | _repositories("dataset", list(_texts(card.get("datasets"))))


def read_card(model_dir: Path) -> Mapping[str, Any]:
    """The front matter of README.md; empty when there is none, or none that can be read."""
    import yaml  # type: ignore[import-untyped]

    try:
        found = _FRONT_MATTER.match((model_dir / "README.md").read_text(encoding="utf-8"))
        card = yaml.safe_load(found[1].replace("\t", "  ")) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return card if isinstance(card, dict) else {}


def _texts(value: object) -> Iterator[str]:
    for entry in value if isinstance(value, list) else [value]:
        if entry is False:
            yield "no"  # Norwegian: YAML reads the bare word as a truth value.
        elif isinstance(entry, str | int | float) and not isinstance(entry, bool) and str(entry).strip():
            yield str(entry).strip()


def _repositories(kind: str, names: list[str]) -> dict[str, Value]:
    """The keys of the base models or datasets called `names`: hub names, URLs, or plain names."""
    keys: dict[str, Value] = {}
    for number, name in enumerate(names):
        here = f"general.{kind}.{number}"
        if match := _REPOSITORY.fullmatch(name):
            keys[f"{here}.name"], keys[f"{here}.organization"] = _title(match[2]), _title(match[1])
            folder = "datasets/" if kind == "dataset" else ""
            keys[f"{here}.repo_url"] = f"{_HUB}{folder}{match[1]}/{match[2]}"
        elif name.startswith(("http://", "https://", "ssh://")):
            keys[f"{here}.repo_url"] = name
        else:
            keys[f"{here}.name"] = _title(name)
    return {f"general.{kind}.count": len(names), **keys} if names else {}


def _title(name: str) -> str:
    """ "tiny-llama-v1" → "Tiny Llama v1"."""
    words = name.replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not _VERSION.fullmatch(word) else word for word in words)
