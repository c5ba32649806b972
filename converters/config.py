"""A model's config.json, read through the defaults of its family; the rotary settings in one spelling.

transformers 5 writes `rope_parameters`, earlier versions `rope_theta` beside `rope_scaling`; both are understood.
Knows no family.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.errors import CorruptCheckpoint, UnsupportedModel


class Config(Mapping[str, Any]):
    """The fields of config.json; a field that is not there has the family's default, or raises `CorruptCheckpoint`."""

    def __init__(self, values: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> None:
        self._values = {**(defaults or {}), **values}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise CorruptCheckpoint(
                f"config.json has no {key!r}.", hint="Use the config.json the model was saved with."
            )
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or `default` when it is absent or null."""
        value = self._values.get(key)
        return default if value is None else value

    def natural(self, key: str) -> int:
        """The field as a positive integer; `CorruptCheckpoint` when it is none."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CorruptCheckpoint(f"config.json gives {key} as {value!r}, not a positive whole number.")
        return value

    def number(self, key: str) -> float:
        """The field as a number; `CorruptCheckpoint` when it is none."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CorruptCheckpoint(f"config.json gives {key} as {value!r}, not a number.")
        return float(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse the model by this field's name unless it has one of the `allowed` values."""
        value = self.get(key)
        if value not in allowed:
            wanted = " or ".join(repr(one) for one in allowed if one is not None)
            raise UnsupportedModel(
                f"config.json sets {key} to {value!r}; llama.cpp's graph for this model computes as with {wanted}.",
                hint="A file made from it would answer differently from the model, so none is made.",
            )


def read_config(model_dir: Path) -> dict[str, Any]:
    """The fields of `model_dir`'s config.json. Raises `CorruptCheckpoint` when it is missing or broken."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise CorruptCheckpoint(f"{model_dir} has no config.json.", hint="Point to a Hugging Face model directory.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path} does not hold a JSON object.", hint="Download it again.")
    return _with_start_token(values, model_dir / "generation_config.json")


def _with_start_token(values: dict[str, Any], generation_path: Path) -> dict[str, Any]:
    """Where a decoder starts; transformers 5 may write it to generation_config.json alone."""
    key = "decoder_start_token_id"
    if values.get(key) is not None or not values.get("is_encoder_decoder") or not generation_path.is_file():
        return values
    try:
        return {**values, key: json.loads(generation_path.read_text(encoding="utf-8")).get(key)}
    except (ValueError, AttributeError) as error:
        raise CorruptCheckpoint(f"{generation_path} is not valid JSON: {error}.", hint="Download it again.") from error


@dataclass(frozen=True)
class Rope:
    """Rotary position settings."""

    type: str
    """"default", "linear", "yarn", "llama3", "longrope", "dynamic", or what the config says."""
    theta: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the type takes besides: "factor", "original_max_position_embeddings", …"""

    def number(self, key: str, default: float | None = None) -> float:
        """A setting as a number; `CorruptCheckpoint` when it is missing without a default, or no number."""
        value = self.settings.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CorruptCheckpoint(
                f"config.json gives the {self.type} rotary setting {key} as {value!r}, not a number."
            )
        return float(value)


def read_rope(config: Config, *, layer_type: str = "full_attention", default_theta: float = 10000.0) -> Rope:
    """The rotary settings of `config`, for the layers of `layer_type` where it tells them apart."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if isinstance(settings.get(layer_type), Mapping):
        settings = dict(settings[layer_type])
    kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    theta = settings.pop("rope_theta", None) or config.get("rope_theta", default_theta)
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
    kind = {"su": "longrope", "mrope": "mrope"}.get(str(kind), str(kind))
    if not isinstance(theta, int | float) or theta <= 0:
        raise CorruptCheckpoint(f"config.json gives rope_theta as {theta!r}, not a positive number.")
    return Rope(kind, float(theta), settings)
