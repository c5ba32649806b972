"""Which directories torch runs for a name: a base, and the PEFT adapters on it that were trained on those weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune.chat.adapters import split_scale
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import MismatchError, UsageError
from edgetune.export import find_base_dir, load_run
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.library import classify, find_model


@dataclass(frozen=True)
class TorchFiles:
    """What torch opens."""

    base: Path
    adapters: tuple[LoraSpec, ...]


def find_torch_files(path: Path, lora: Sequence[str], *, force: bool) -> TorchFiles:
    """The base in or behind `path`, a checkpoint or a run, with the adapters `lora`, else the run's own.

    Raises `UsageError` for files that torch does not open, `MismatchError` for adapters of another base unless `force`.
    """
    adapters = [LoraSpec(find_model(name), scale) for name, scale in map(split_scale, lora)]
    base = path
    if classify(path) == "run":
        base = find_base_dir(path)
        adapters = adapters or [LoraSpec(path)]
    if base.is_file():
        raise UsageError(f"{base} is a GGUF file; torch runs Hugging Face directories.", hint="Leave out --engine.")
    for adapter in adapters:
        if classify(adapter.path) != "run":
            raise UsageError(
                f"{adapter.path} is no PEFT directory; a model in torch takes nothing else.",
                hint="Give the run it was made from.",
            )
        if not force:
            check_run_base(adapter.path, base)
    return TorchFiles(base, tuple(adapters))


def check_run_base(adapter_dir: Path, base: Path) -> None:
    """Refuse an adapter whose record says that it was trained on other weights."""
    run = load_run(adapter_dir)
    if run is None or not run.fingerprint.weights:
        return
    found = replace(fingerprint_checkpoint(base), template="")
    if differing := run.fingerprint.differences(found):
        raise MismatchError(
            f"{adapter_dir} was trained on {run.base_name}; {base} has other {' and '.join(differing)}.",
            hint=f"Use {run.base_path}, or --force.",
        )
