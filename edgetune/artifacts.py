"""The values that stages hand each other, and how each is recorded beside the thing it describes.

Plain frozen dataclasses: paths, fingerprints, settings, measured numbers. No parsed arguments, open files or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetune.errors import CorruptFileError

RUN_RECORD = "edgetune.json"
"""The record's file name in a run directory (which is a PEFT adapter directory as well)."""

SWEEP_RECORD = "sweep.json"
"""The record's file name in a directory of runs that were tried against each other."""

FINGERPRINT_KEYS = {
    "weights": "edgetune.base.weights_sha256",
    "tokenizer": "edgetune.base.tokenizer_sha256",
    "template": "edgetune.base.template_sha256",
}
"""GGUF metadata keys of a base's fingerprint, in base files and in adapter files alike."""

BASE_NAME_KEY = "edgetune.base.name"
"""GGUF metadata key: the base model's name, for people."""

RUN_RECORD_KEY = "edgetune.run"
"""GGUF metadata key of an adapter file: its run record as JSON."""


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a base model; each part is a SHA-256 in hex, empty when unknown."""

    weights: str = ""
    """Over every tensor's name, dtype, shape and data; independent of sharding."""
    tokenizer: str = ""
    """Over the bytes of the tokenizer file."""
    template: str = ""
    """Over the chat template's text."""

    def differences(self, other: Fingerprint) -> list[str]:
        """The parts ("weights", "tokenizer", "template") known on both sides and not equal."""
        mine, theirs = asdict(self), asdict(other)
        return [part for part in mine if mine[part] and theirs[part] and mine[part] != theirs[part]]

    def to_metadata(self) -> dict[str, str]:
        """As GGUF key/value pairs; unknown parts are left out."""
        return {FINGERPRINT_KEYS[part]: value for part, value in asdict(self).items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Fingerprint:
        """From GGUF key/value pairs; parts that are not there stay unknown."""
        return cls(**{part: str(metadata.get(key, "")) for part, key in FINGERPRINT_KEYS.items()})


@dataclass(frozen=True)
class BaseModel:
    """A Hugging Face model directory."""

    path: Path
    architecture: str
    """`architectures[0]` of config.json, e.g. "Qwen2ForCausalLM"."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    @property
    def name(self) -> str:
        """The directory's name, for people and file names."""
        return self.path.resolve().name


@dataclass(frozen=True)
class Gguf:
    """A GGUF file and what its header says."""

    path: Path
    kind: Literal["model", "adapter"]
    """`general.type` of the file."""
    architecture: str
    """`general.architecture`, e.g. "llama"."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    """Of the base it was made from (model) or made for (adapter)."""
    base_name: str = ""
    file_type: str = ""
    """Quant type as llama.cpp names it, e.g. "F16", "Q4_K_M"; empty when unknown."""


@dataclass(frozen=True)
class Run:
    """What `train` leaves: a PEFT adapter directory with a record of where it came from."""

    path: Path
    base_path: Path
    base_name: str
    fingerprint: Fingerprint
    """Of the base it was trained on."""
    task: str = "chat"
    method: str = "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    """"paths", "format", "sha256", rows and tokens per split."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    finished: bool = False
    created: str = ""
    """ISO 8601, UTC."""

    def record(self) -> dict[str, Any]:
        """As JSON-ready values, as written to `RUN_RECORD` and into the adapter GGUF."""
        values = asdict(self)
        values["path"], values["base_path"] = str(self.path), str(self.base_path)
        return values

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read the record in run directory `path`. Raises `CorruptFileError` when it cannot be read."""
        record_path = path / RUN_RECORD
        try:
            values = json.loads(record_path.read_text(encoding="utf-8"))
            values["path"], values["base_path"] = path, Path(values["base_path"])
            values["fingerprint"] = Fingerprint(**values["fingerprint"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{record_path} is not a run record: {error}.") from error


def trained_pooling(run_dir: Path) -> str:
    """How the run in `run_dir` makes one vector of a text's states; empty where it makes none, or is no run.

    Raises `CorruptFileError` for a record that cannot be read.
    """
    if not (run_dir / RUN_RECORD).is_file():
        return ""
    run = Run.load(run_dir)
    return str(run.data.get("pooling") or "") if run.task == "embedding" else ""


@dataclass(frozen=True)
class LogitsParity:
    """How next-token distributions compare, torch as the reference."""

    positions: int
    mean_kl: float
    """Mean KL(torch ‖ llama.cpp) over positions, nats."""
    max_kl: float
    top1: float
    """Share of positions with the same most likely token, 0 to 1."""
    bound: float
    """What `bounded` may at most be for this file type."""
    bounded: Literal["mean_kl", "max_kl"] = "max_kl"

    @property
    def passed(self) -> bool:
        """Whether the bounded value is within its bound; NaN is not."""
        return bool(getattr(self, self.bounded) <= self.bound)


@dataclass(frozen=True)
class VectorParity:
    """How texts' vectors and a head's outputs compare, torch as the reference."""

    texts: int
    min_cosine: float
    """The least cosine between a text's two vectors."""
    mean_distance: float
    """Mean of 1 - cosine."""
    max_difference: float
    """The largest difference of two numbers in vectors of length 1."""
    bound: float
    """What `bounded` has to keep to: at least, for "min_cosine"; at most, for "mean_distance"."""
    bounded: Literal["min_cosine", "mean_distance"] = "min_cosine"
    score_difference: float | None = None
    """The largest difference of a probability (regression: of a value, relative to the largest one); None: no head."""
    score_bound: float = 0.0
    """What `score_difference` may at most be."""

    @property
    def passed(self) -> bool:
        """Whether vectors and scores are within their bounds; NaN is not."""
        near = self.min_cosine >= self.bound if self.bounded == "min_cosine" else self.mean_distance <= self.bound
        return bool(near and (self.score_difference is None or self.score_difference <= self.score_bound))


@dataclass(frozen=True)
class ParityCheck:
    """One compared thing: the tokenizer, the template, the stop set."""

    name: str
    checked: int
    equal: int
    first_difference: str = ""
    """What differs first, with both values; empty when nothing does."""
    skipped: str = ""
    """Why nothing was compared; empty when it was."""

    @property
    def passed(self) -> bool:
        """Whether everything compared was equal; a skipped check neither passes nor fails and counts as passed."""
        return self.checked == self.equal


@dataclass(frozen=True)
class ParityReport:
    """What `verify` found."""

    gguf_path: Path
    lora_path: Path | None
    checks: tuple[ParityCheck, ...]
    logits: LogitsParity | None
    """None when torch is not installed; `not_checked` says so."""
    not_checked: tuple[str, ...] = ()
    vectors: VectorParity | None = None
    """In place of `logits` where a model does not write text."""

    @property
    def passed(self) -> bool:
        """Whether every check made was passed."""
        measured = (self.logits, self.vectors)
        return all(check.passed for check in self.checks) and all(one is None or one.passed for one in measured)
