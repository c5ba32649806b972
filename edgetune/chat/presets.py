"""Named sets of sampling parameters: those that everybody has, and those that were saved for a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from edgetune.engine.sampling import Sampling
from edgetune.errors import CorruptFileError, UsageError
from edgetune.paths import home_dir, write_json

PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"temp": 0.2, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    "balanced": {},
    "creative": {"temp": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.05, "dry_multiplier": 0.8},
    "greedy": {"temp": 0.0},
}
"""Name → what differs from llama.cpp's defaults."""

_KEPT = ("seed", "grammar", "ignore_eos")
"""What a preset leaves as it is: it belongs to a task, not to a taste."""


def changes(sampling: Sampling) -> dict[str, Any]:
    """What of `sampling` differs from llama.cpp's defaults, by name."""
    default = Sampling()
    values = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def with_changes(values: Mapping[str, Any], *, kept: Sampling | None = None) -> Sampling:
    """llama.cpp's defaults with `values` in them; unknown names are left out. `kept` gives what presets leave alone.

    Raises `CorruptFileError` for values that no parameter takes.
    """
    base = replace(Sampling(), **{name: getattr(kept, name) for name in _KEPT}) if kept else Sampling()
    return with_values(base, values)


def with_values(sampling: Sampling, values: Mapping[str, Any]) -> Sampling:
    """`sampling` with `values` in it; unknown names are left out. Raises `CorruptFileError` as `with_changes` does."""
    known = {field.name: values[field.name] for field in fields(Sampling) if field.name in values}
    for name, value in known.items():
        wanted = type(getattr(sampling, name))
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise CorruptFileError(f"The saved sampling parameters are not valid: {name} is {value!r}.")
    return replace(sampling, **known)


def load_presets(model: str) -> dict[str, dict[str, Any]]:
    """Every preset there is for the model called `model`, by name."""
    return {**PRESETS, **_read().get(model, {})}


def apply_preset(name: str, sampling: Sampling, *, model: str) -> Sampling:
    """`sampling` by the preset `name`. Raises `UsageError` when there is none."""
    known = load_presets(model)
    if name not in known:
        raise UsageError(
            f"There is no preset {name!r}.", hint=f"Known: {', '.join(known)}. /preset save {name} makes it."
        )
    return with_changes(known[name], kept=sampling)


def save_preset(name: str, sampling: Sampling, *, model: str) -> None:
    """Keep `sampling` as the preset `name` of the model called `model`. Raises `UsageError` for a taken name."""
    if name in PRESETS:
        raise UsageError(f"The preset {name!r} comes with edgetune.", hint="Take another name.")
    values = {key: value for key, value in changes(sampling).items() if key not in _KEPT}
    kept = _read()
    write_json(_path(), {**kept, model: {**kept.get(model, {}), name: values}})


def delete_preset(name: str, *, model: str) -> None:
    """Forget a preset of one's own. Raises `UsageError` when there is none."""
    kept = _read()
    if name not in kept.get(model, {}):
        raise UsageError(f"There is no preset {name!r} of your own for {model}.")
    del kept[model][name]
    write_json(_path(), kept)


def _path() -> Path:
    return home_dir() / "presets.json"


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    try:
        values = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CorruptFileError(f"{_path()} is not valid JSON: {error}.", hint="Mend it, or delete it.") from error
    if not isinstance(values, dict) or not all(isinstance(presets, dict) for presets in values.values()):
        raise CorruptFileError(f"{_path()} holds no presets.", hint="Mend it, or delete it.")
    return values
