"""Checkpoints: everything a run needs to go on as if it had never stopped. No pickle.

`checkpoint-N/` in the run directory holds the adapter (a PEFT directory of its own), the optimizer's moments, the
random states and the position. Data order and learning rate are functions of the step. A checkpoint appears whole or
not at all, and one that the disk has changed since is refused.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgetune.errors import CorruptFileError
from edgetune.fingerprint import file_sha256, text_sha256
from edgetune.paths import whole_dir
from edgetune.training.methods.base import Method
from edgetune.training.model import ADAPTER_WEIGHTS, write_tensors

_STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, padding left out."""
    learned_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps."""
    losses: dict[str, float] = field(default_factory=dict)
    """The newest "train" and "valid" loss, and "valid_before"."""
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the task measured at the newest "valid" and at "valid_before"."""
    best: dict[str, float] = field(default_factory=dict)
    """"step" and "value" of the best measurement by the metric; empty before there is one, or where none is chosen."""
    stale: int = 0
    """Measurements since the best one."""
    settled: dict[str, int] = field(default_factory=dict)
    """What the layout of batches came to in the memory there is: checkpointing, most in a pass."""


def save_checkpoint(
    run_dir: Path, position: Position, *, method: Method, adapted: Any, optimizer: Any, keep: int
) -> Path:
    """Write `checkpoint-N` and remove all but the newest `keep` (one or more)."""
    path = run_dir / f"checkpoint-{position.step}"
    with whole_dir(path) as partial:
        method.save(adapted, partial)
        write_tensors(_optimizer_tensors(adapted, optimizer), partial / _OPTIMIZER)
        tensors, values = _random_states()
        write_tensors(tensors, partial / _RANDOM)
        state: dict[str, Any] = {"position": asdict(position), "random": values, "files": _digests(partial)}
        state["sha256"] = _state_digest(state)
        (partial / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    # Only now: a run that was killed before goes on from a checkpoint whose best adapter is another.
    for old in run_dir.glob("best-*"):
        if old != best_dir(run_dir, position):
            shutil.rmtree(old, ignore_errors=True)
    return path


def best_dir(run_dir: Path, position: Position) -> Path:
    """Where the best adapter so far is."""
    return run_dir / f"best-{int(position.best.get('step', -1))}"


def save_best(run_dir: Path, position: Position, *, method: Method, adapted: Any) -> None:
    """Write the adapter as the best one so far."""
    with whole_dir(best_dir(run_dir, position)) as partial:
        method.save(adapted, partial)


def load_best(run_dir: Path, position: Position, *, method: Method, adapted: Any) -> None:
    """Put the best adapter so far in place of the newest. Raises `CorruptFileError`."""
    import safetensors

    path = best_dir(run_dir, position)
    try:
        method.load(adapted, path)
    except (ValueError, KeyError, OSError, safetensors.SafetensorError) as error:
        step = int(position.best["step"])
        hint = f"Remove it and the checkpoints of step {step} and later, to go on from one before, or from the start."
        raise CorruptFileError(f"The best adapter, {path}, cannot be read: {error}.", hint=hint) from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    complete = [path for path in found if (path / _STATE).is_file() and (path / ADAPTER_WEIGHTS).is_file()]
    return sorted(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def load_checkpoint(path: Path, *, method: Method, adapted: Any, optimizer: Any) -> Position:
    """Put adapter, optimizer and random states back as they were. Raises `CorruptFileError`."""
    import safetensors
    import safetensors.torch

    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        _check_digests(path, state)
        position = Position(**state["position"])
        method.load(adapted, path)
        _restore_optimizer(adapted, optimizer, safetensors.torch.load_file(path / _OPTIMIZER))
        _restore_random(safetensors.torch.load_file(path / _RANDOM), state["random"])
    except (ValueError, KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
        raise CorruptFileError(
            f"The checkpoint {path} cannot be read: {error}.", hint="Remove it to go on from the one before."
        ) from error
    return position


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in `directory`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in paths}


def _state_digest(state: Mapping[str, Any]) -> str:
    told = {name: value for name, value in state.items() if name != "sha256"}
    return text_sha256(json.dumps(told, sort_keys=True))


def _check_digests(path: Path, state: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a checkpoint is not what was written; one of an older version does not say."""
    if "files" not in state:
        return
    found = _digests(path)
    changed = [name for name, digest in state["files"].items() if found.get(name) != digest]
    if changed or state.get("sha256") != _state_digest(state):
        raise ValueError(f"{changed[0] if changed else _STATE} is not what was written")


def last_settled(run_dir: Path) -> dict[str, int]:
    """What the run's last checkpoint remembers of its layout; empty when there is none to be read."""
    position = _last_position(run_dir)
    return position.settled if position is not None else {}


def _last_position(run_dir: Path) -> Position | None:
    try:
        state = json.loads((list_checkpoints(run_dir)[-1] / _STATE).read_text(encoding="utf-8"))
        return Position(**state["position"])
    except (IndexError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-removed; only for who alone works on the run."""
    whole = list_checkpoints(run_dir)
    half = [path for path in run_dir.glob("checkpoint-*") if path not in whole]
    position = _last_position(run_dir) or (None if whole else Position())
    if position is not None:
        half += [path for path in run_dir.glob("best-*") if path != best_dir(run_dir, position)]
    for path in (*half, *run_dir.glob(".*.partial"), *run_dir.glob(".*.old"), run_dir / ".adapter"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _trainable(adapted: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(adapted: Any, optimizer: Any) -> dict[str, Any]:
    return {
        f"{name}:{key}": _as_tensor(key, value)
        for name, parameter in _trainable(adapted).items()
        for key, value in optimizer.state[parameter].items()
    }


def _as_tensor(key: str, value: Any) -> Any:
    """8-bit moments come with tables that all parameters share, and with the number of steps as an int."""
    import torch

    if not torch.is_tensor(value):
        return torch.tensor(value)
    return value.clone() if key.startswith("qmap") else value


def _restore_optimizer(adapted: Any, optimizer: Any, tensors: Mapping[str, Any]) -> None:
    import torch

    parameters = _trainable(adapted)
    for name, tensor in tensors.items():
        owner, key = name.rsplit(":", 1)
        parameter = parameters[owner]
        if tensor.dtype == torch.int64 and tensor.ndim == 0:
            optimizer.state[parameter][key] = int(tensor)
            continue
        # AdamW keeps its step count on the CPU, unless it is fused.
        stays = key == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = tensor if stays else tensor.to(parameter.device)


def _random_states() -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np
    import torch

    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, state, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    return tensors, {"python": [version, list(state), gauss], "numpy": numpy_state}


def _restore_random(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
        elif name == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state)
    version, state, gauss = values["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
