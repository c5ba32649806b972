"""What a model is, from its header or its config alone: shape, size, types, fingerprint, template. Loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.artifacts import RUN_RECORD, RUN_RECORD_KEY, Fingerprint, Run
from edgetune.errors import CorruptFileError, UsageError
from edgetune.fingerprint import (
    fingerprint_checkpoint,
    read_chat_template,
    read_safetensors_header,
    safetensors_files,
    transformer_dir,
)
from edgetune.gguf_header import GgufHeader, gguf_from_header, read_gguf_header
from edgetune.library.duty import Duty, duty_of_checkpoint, duty_of_gguf, duty_of_run
from edgetune.library.index import Kind, classify, entry_name
from edgetune.library.sizes import Sizes, sizes_from_config, sizes_from_gguf
from edgetune.parameters import checkpoint_parameters, gguf_parameters

_WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of architectures that write text, and keep keys and values of what is written."""

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Description:
    """What `edgetune models show` tells."""

    name: str
    path: Path
    kind: Kind
    architecture: str
    parameters: int
    """As transformers counts them, without buffers; of an adapter, in the adapter."""
    bytes: int
    """On disk, the weights alone for a directory."""
    types: Mapping[str, int]
    """Tensor type → parameters stored in it."""
    sizes: Sizes = field(default_factory=Sizes)
    duty: Duty = field(default_factory=Duty)
    file_type: str = ""
    has_template: bool = False
    licence: str = ""
    """As the model's card or the file's header names it."""
    memory: Mapping[int, int] = field(default_factory=dict)
    """Context in tokens → bytes that weights and cache take together."""
    base_name: str = ""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    rank: int | None = None
    """Of an adapter, its largest rank."""
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    """Names of the modules an adapter changes, each once."""
    trained: str = ""
    """When and on what an adapter was trained, where a record says so."""


def describe(path: Path) -> Description:
    """Describe the model, adapter or run at `path`.

    Raises `CorruptFileError` for a damaged file, `UsageError` for something that is none of them.
    """
    kind = classify(path)
    if path.is_file():
        return _describe_gguf(read_gguf_header(path))
    if kind == "checkpoint":
        return _describe_checkpoint(path)
    if kind == "run":
        return _describe_run(path)
    raise UsageError(f"{path} is not a model, an adapter or a run.", hint="List what there is: edgetune models list")


def disk_bytes(path: Path) -> int:
    """Bytes of the file `path`, or of the files directly in the directory `path`."""
    if path.is_dir():
        return sum(child.stat().st_size for child in path.iterdir() if child.is_file())
    return path.stat().st_size


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of `model_dir`; raises `CorruptFileError` when it is missing or not a JSON object."""
    path = transformer_dir(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFileError(
            f"{model_dir} has no config.json.", hint="Give a Hugging Face model directory."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path} holds a {type(config).__name__}, not an object.", hint="Download it again.")
    return config


def checkpoint_architecture(model_dir: Path) -> str:
    """`architectures[0]` of config.json; raises `CorruptFileError` when it is not there."""
    names = read_config(model_dir).get("architectures")
    if not isinstance(names, list) or not names:
        raise CorruptFileError(f"{model_dir / 'config.json'} names no architecture.", hint="Download it again.")
    return str(names[0])


def _describe_gguf(header: GgufHeader) -> Description:
    gguf = gguf_from_header(header)
    sizes = sizes_from_gguf(header)
    weights = sum(tensor.nbytes for tensor in header.tensors)
    has_template = "tokenizer.chat_template" in header.metadata
    has_duty = gguf.kind == "model" or "edgetune.task" in header.metadata
    types = gguf_parameters(header)
    return Description(
        name=entry_name(gguf.path, gguf.kind),
        path=gguf.path,
        kind=gguf.kind,
        architecture=gguf.architecture,
        parameters=sum(types.values()),
        bytes=header.file_bytes,
        types=dict(types.most_common()),
        sizes=sizes,
        file_type=gguf.file_type,
        duty=duty_of_gguf(header, writes=_writes(has_template)) if has_duty else Duty(),
        has_template=has_template,
        licence=str(header.metadata.get("general.license", "")),
        memory=sizes.memory(weights, keeps_cache=not gguf.architecture.endswith(("bert", "encoder")))
        if gguf.kind == "model"
        else {},
        base_name=gguf.base_name,
        fingerprint=gguf.fingerprint,
        **(_gguf_adapter(header) if gguf.kind == "adapter" else {}),
    )


def _writes(has_template: bool) -> str:
    return "chat" if has_template else "completion"


def _gguf_adapter(header: GgufHeader) -> dict[str, Any]:
    alpha = header.metadata.get("adapter.lora.alpha")
    halves = [tensor for tensor in header.tensors if tensor.name.endswith(".lora_a")]
    names = (tensor.name.removesuffix(".lora_a").removesuffix(".weight") for tensor in halves)
    try:
        record = json.loads(str(header.metadata.get(RUN_RECORD_KEY, "{}")))
    except ValueError:
        record = {}
    return {
        "rank": max((tensor.shape[-1] for tensor in halves), default=None),
        "alpha": float(alpha) if isinstance(alpha, int | float) else None,
        "targets": tuple(dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name) for name in names)),
        "trained": _trained(record),
    }


def _trained(record: object) -> str:
    if not isinstance(record, dict):
        return ""
    data = record.get("data")
    paths = data.get("paths") if isinstance(data, dict) else None
    names = [Path(str(path)).name for path in paths] if isinstance(paths, list) else []
    created = str(record.get("created") or "").partition("T")[0]
    return " on ".join(filter(None, [created, ", ".join(names)]))


def _describe_checkpoint(model_dir: Path) -> Description:
    config = read_config(model_dir)
    sizes, has_template = sizes_from_config(config), read_chat_template(model_dir) is not None
    architecture = checkpoint_architecture(model_dir)
    tensors, size = _safetensors(safetensors_files(model_dir))
    types = checkpoint_parameters(tensors, config)
    return Description(
        name=entry_name(model_dir.resolve(), "checkpoint"),
        path=model_dir,
        kind="checkpoint",
        architecture=architecture,
        parameters=sum(types.values()),
        bytes=size,
        types=dict(types.most_common()),
        sizes=sizes,
        duty=duty_of_checkpoint(model_dir, transformer_dir(model_dir), config, writes=_writes(has_template)),
        has_template=has_template,
        licence=_card_licence(model_dir),
        memory=sizes.memory(
            size, keeps_cache=architecture.endswith(_WRITING) or bool(config.get("is_encoder_decoder"))
        ),
        fingerprint=fingerprint_checkpoint(model_dir),
    )


def _describe_run(run_dir: Path) -> Description:
    run = Run.load(run_dir) if (run_dir / RUN_RECORD).is_file() else None
    files = [path for path in [run_dir / "adapter_model.safetensors"] if path.is_file()]
    tensors, size = _safetensors(files)
    types = checkpoint_parameters(tensors, {})
    return Description(
        name=entry_name(run_dir.resolve(), "run"),
        path=run_dir,
        kind="run",
        architecture=run.method if run else "",
        parameters=sum(types.values()),
        bytes=size,
        types=dict(types.most_common()),
        duty=duty_of_run(run) if run else Duty(),
        has_template=read_chat_template(run_dir) is not None,
        fingerprint=run.fingerprint if run else Fingerprint(),
        **{**_peft_adapter(run_dir), **({"base_name": run.base_name} if run else {})},
        trained=_trained(run.record()) if run else "",
    )


def _peft_adapter(run_dir: Path) -> dict[str, Any]:
    try:
        config = json.loads((run_dir / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, targets = (config.get(name) for name in ("r", "lora_alpha", "target_modules"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        "base_name": Path(str(config.get("base_model_name_or_path") or "")).name,
        "rank": rank if isinstance(rank, int) else None,
        "alpha": float(alpha) if isinstance(alpha, int | float) else None,
        "targets": tuple(sorted(map(str, targets))) if isinstance(targets, list) else (str(targets or ""),),
    }


def _card_licence(model_dir: Path) -> str:
    """What the front matter of the model's card says; empty when there is none."""
    import yaml  # type: ignore[import-untyped]

    try:
        found = _FRONT_MATTER.match((model_dir / "README.md").read_text(encoding="utf-8"))
        card = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ""
    value = (card.get("license_name") or card.get("license")) if isinstance(card, dict) else None
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _safetensors(files: list[Path]) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of all files by name, and how many bytes the files take."""
    tensors: dict[str, dict[str, Any]] = {}
    for path in files:
        tensors |= read_safetensors_header(path)[0]
    return tensors, sum(path.stat().st_size for path in files)
