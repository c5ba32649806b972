"""What a person calls an adapter → its file and scale."""

from __future__ import annotations

from pathlib import Path

from edgetune.engine.protocol import LoraSpec
from edgetune.errors import UsageError
from edgetune.library import classify, find_model

_MOST_SCALE = 1000.0


def find_adapter(value: str) -> LoraSpec:
    """The adapter that `FILE[:SCALE]` means: a GGUF file, a run or a name. Raises `UsageError` when there is none."""
    name, scale = split_scale(value)
    path = find_model(name)
    kind = classify(path)
    if kind in ("checkpoint", "model"):
        raise UsageError(f"{name} is a model, not an adapter.", hint="Give it as MODEL, without --lora.")
    if kind != "run":
        return LoraSpec(path, scale)
    files = [file for file in sorted(path.glob("*.gguf")) if classify(file) == "adapter"]
    if not files:
        raise UsageError(f"The run {path} has no GGUF adapter yet.", hint=f"Make it: edgetune convert {path}")
    return LoraSpec(max(files, key=lambda file: file.stat().st_mtime), scale)


def split_scale(value: str) -> tuple[str, float]:
    """Split `FILE[:SCALE]`; colons in a file's own name, and a drive letter's, stay in it."""
    name, colon, scale = value.rpartition(":")
    if not colon or not name or Path(value).exists():
        return value, 1.0
    try:
        return name, check_scale(float(scale))
    except ValueError:
        return value, 1.0


def check_scale(scale: float) -> float:
    """`scale`, unless it can only make garbage (then `UsageError`)."""
    if not abs(scale) <= _MOST_SCALE:
        raise UsageError(f"An adapter's scale of {scale:g} makes garbage.", hint="1 is as it was trained, 0 is off.")
    return scale
