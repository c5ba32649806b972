"""The bridge to `converters`: checkpoints and PEFT adapters become GGUF files that say where they came from.

Settles types, names and bases, gives every file its fingerprints and records, writes whole files on a disk with room,
and translates the converters' errors. Proves nothing (see `parity`) and loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import converters
from edgetune.artifacts import BASE_NAME_KEY, RUN_RECORD, RUN_RECORD_KEY, Fingerprint, Gguf, Run
from edgetune.errors import CorruptFileError, EdgetuneError, MismatchError, UnsupportedError, UsageError
from edgetune.events import Notice, Progress, Sink, ignore
from edgetune.fingerprint import (
    fingerprint_checkpoint,
    fingerprint_gguf,
    read_chat_template,
    read_safetensors_header,
    safetensors_files,
    text_sha256,
)
from edgetune.gguf_header import GgufHeader, gguf_from_header, read_gguf, read_gguf_header
from edgetune.library import classify, find_model, list_models, read_config
from edgetune.paths import check_disk_space, whole_file
from edgetune.quantize import find_quant_type, quantize

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""What is written without llama.cpp's quantizer; "auto" keeps the checkpoint's own 16-bit type, or takes f16."""

ADAPTER_OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""The same of adapters, where "auto" is f16."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TEMPLATE_KEY = "tokenizer.chat_template"

BASE_CONFIG = "base_config.json"
"""In a run that was trained on a GGUF file: config.json as it was read from that."""

CONFIG_KEY = "edgetune.config"
"""GGUF metadata key: config.json of the checkpoint, so that the file can be trained on."""
TOOL_TEMPLATE_KEY = "tokenizer.chat_template.tool_use"

_TYPE_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_QUANT_BYTES_SHARE = 0.6
"""A quantized file is at most about this share of the 16-bit one it is made from."""


def export_base(
    model_dir: Path,
    out_path: Path,
    *,
    outtype: str = "auto",
    quant: str | None = None,
    merge: Path | None = None,
    sink: Sink = ignore,
    threads: int = 0,
) -> Gguf:
    """Write the Hugging Face directory `model_dir` as a GGUF model, with the adapter in `merge` merged in if given.

    `outtype` is one of `OUTTYPES`; `quant` is a llama.cpp quant type instead, made through a temporary file beside the
    output. Raises `UnsupportedError` for what llama.cpp cannot run exactly, `CorruptFileError` for broken files,
    `ResourceError` when the disk does not hold the result.
    """
    kind = find_quant_type(quant) if quant else None
    if kind and kind.name in _TYPE_NAMES.values():
        outtype, kind = kind.name.lower(), None
    if kind and kind.only_copy:
        raise UsageError(
            "COPY copies a GGUF file; there is none to copy yet.", hint="Leave -q away, or name another type."
        )
    metadata = _base_metadata(model_dir, merge, sink)
    with whole_file(out_path) as partial:
        if kind is None:
            _convert_base(model_dir, partial, outtype, metadata, merge, sink, _space_checker(out_path))
        else:
            with _removed_afterwards(partial.with_name(f"{partial.name}.full")) as full:
                first = _intermediate_type(model_dir, merge)
                room = _space_checker(out_path, share=_QUANT_BYTES_SHARE)
                _convert_base(model_dir, full, first, metadata, merge, sink, room)
                quantize(full, partial, kind.name, sink=sink, threads=threads)
    return read_gguf(out_path)


def export_adapter(
    adapter_dir: Path,
    out_path: Path,
    *,
    base_dir: Path | None = None,
    outtype: str = "f16",
    sink: Sink = ignore,
) -> Gguf:
    """Write the PEFT adapter in `adapter_dir` as a GGUF adapter for the base at `base_dir` (see `find_base_dir`).

    Raises `UnsupportedError` for what an adapter file cannot hold, `MismatchError` for another base than it was trained
    on, `UsageError` when the base is not found, `CorruptFileError` for broken files.
    """
    run = load_run(adapter_dir)
    base_dir = base_dir or find_base_dir(adapter_dir)
    base: Path | converters.GgufModel = base_dir
    template = read_chat_template(adapter_dir)
    if base_dir.is_file():
        header = read_gguf_header(base_dir)
        fingerprint = fingerprint_gguf(base_dir)
        base_name = gguf_from_header(header).base_name or base_dir.stem
        with _translated_errors():
            base = converters.GgufModel(
                _recorded_config(header, adapter_dir), [tensor.name for tensor in header.tensors]
            )
    else:
        fingerprint = fingerprint_checkpoint(base_dir, sink=sink)
        base_name = model_name(base_dir)
        template = template or read_chat_template(base_dir)
    _check_trained_on(run, base_dir, fingerprint, sink)
    metadata: dict[str, str | int | float | bool] = {
        **fingerprint.to_metadata(),
        BASE_NAME_KEY: base_name,
        "general.base_model.count": 1,
        "general.base_model.0.name": base_name,
        **({TEMPLATE_KEY: template} if template else {}),
        **({RUN_RECORD_KEY: json.dumps(run.record(), ensure_ascii=False)} if run else {}),
    }
    with whole_file(out_path) as partial, _translated_errors():
        converters.convert_adapter(
            adapter_dir,
            base,
            partial,
            outtype=outtype,
            metadata=metadata,
            on_tensor=_reporter(sink),
            check_space=_space_checker(out_path),
            trained=_trained_head(run),
        )
    return read_gguf(out_path)


def resolve_outtype(model_dir: Path, outtype: str = "auto") -> str:
    """The name of the file type ("F16") that `outtype` comes to for `model_dir`."""
    if outtype == "auto":
        outtype = "bf16" if _stored_types(model_dir) == {"BF16"} else "f16"
    return _TYPE_NAMES[outtype]


def _recorded_config(header: GgufHeader, adapter_dir: Path) -> Mapping[str, Any]:
    """config.json of the model in a GGUF file: as the file has it, or as it was read for training."""
    recorded = header.metadata.get(CONFIG_KEY)
    try:
        text = str(recorded) if recorded else (adapter_dir / BASE_CONFIG).read_text(encoding="utf-8")
        values: Mapping[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"What model {header.path} is cannot be read: {error}.",
            hint="Train the adapter again, or convert it again.",
        ) from error
    return values


def find_base_dir(adapter_dir: Path) -> Path:
    """The model that `adapter_dir` was trained on, by its run record or its adapter_config.json.

    A Hugging Face directory; of a run that was trained on a GGUF file, that file while it is there.

    Raises `UsageError` when it is not on this machine.
    """
    run = load_run(adapter_dir)
    named = str(run.base_path) if run else _named_base(adapter_dir)
    for candidate in (Path(named).expanduser(), adapter_dir / named, *_hub_snapshots(named)) if named else ():
        if classify(candidate) == "checkpoint" or (run and classify(candidate) == "model"):
            return candidate
    if run and (found := _checkpoint_with(run.fingerprint)):
        return found
    for name in (run.base_name if run else "", named):
        try:
            if name and classify(path := find_model(name)) == "checkpoint":
                return path
        except UsageError:
            continue
    raise UsageError(
        f"The base model {named!r} of {adapter_dir} is not on this machine."
        if named
        else f"{adapter_dir} does not say which base model it was trained on.",
        hint="Name its directory with --base.",
    )


def model_name(model_dir: Path) -> str:
    """What to call a checkpoint: its directory's name; of a snapshot in the Hugging Face cache, the repository's."""
    path = model_dir.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.name


def locate_gguf_weights(
    header: GgufHeader, config: Mapping[str, Any], names: Sequence[str]
) -> Mapping[str, tuple[converters.Piece, ...]]:
    """Where the weights `names` of the model that `config` (config.json) describes lie in the file of `header`.

    Name → pieces whose rows, one after the other, are that weight; a tied head is left out. Raises `UnsupportedError`
    for a family whose weights cannot be used from a file as they are, `CorruptFileError` for a file that lacks some.
    """
    try:
        with _translated_errors():
            return converters.locate_weights(config, [tensor.name for tensor in header.tensors], names)
    except CorruptFileError as error:
        raise CorruptFileError(f"{header.path}: {error.message}", hint=error.hint) from error


def gguf_decoders() -> frozenset[str]:
    """What `general.architecture` is in GGUF files of the decoders whose weights can be located."""
    return converters.decoders()


def check_convertible(model_dir: Path) -> None:
    """Raise `UnsupportedError` when llama.cpp cannot run the model in `model_dir`, as far as its config.json tells."""
    with _translated_errors():
        converters.find_family(read_config(model_dir))


def load_run(adapter_dir: Path) -> Run | None:
    """The run record of `adapter_dir`; None when it is a PEFT directory from elsewhere."""
    return Run.load(adapter_dir) if (adapter_dir / RUN_RECORD).is_file() else None


def _base_metadata(model_dir: Path, merge: Path | None, sink: Sink) -> dict[str, str | int | float | bool]:
    fingerprint = fingerprint_checkpoint(model_dir, sink=sink)
    name = model_name(model_dir)
    if merge is None:
        return {**fingerprint.to_metadata(), BASE_NAME_KEY: name, CONFIG_KEY: _config_text(model_dir)}
    run = load_run(merge)
    _check_trained_on(run, model_dir, fingerprint, sink)
    template = read_chat_template(merge)
    merged = Fingerprint(
        # Neither the base nor the adapter: no adapter for the base may be taken to fit the merged weights.
        weights=text_sha256(f"{fingerprint.weights} + {_file_sha256(merge / ADAPTER_WEIGHTS)}") or "",
        tokenizer=fingerprint.tokenizer if not _has_own_tokenizer(merge, model_dir) else "",
        template=text_sha256(template) or fingerprint.template,
    )
    return {
        **merged.to_metadata(),
        BASE_NAME_KEY: f"{name}+{merge.resolve().name}",
        **({TEMPLATE_KEY: template} if template else {}),
        # A template given in training took the place of all of the model's.
        **({TOOL_TEMPLATE_KEY: ""} if template and template != read_chat_template(model_dir) else {}),
        **({RUN_RECORD_KEY: json.dumps(run.record(), ensure_ascii=False)} if run else {}),
    }


def require_trained_on(run: Run, base_dir: Path, *, sink: Sink = ignore) -> None:
    """Raise `MismatchError` unless `base_dir` is what `run` was trained on."""
    _check_trained_on(run, base_dir, fingerprint_checkpoint(base_dir, sink=sink), sink)


def _trained_head(run: Run | None) -> converters.TrainedHead | None:
    """What the run's record says of the head that was trained; None where there is no record."""
    if run is None or run.task not in ("classification", "regression", "embedding"):
        return None
    task = "multilabel" if run.data.get("multi_label") else run.task
    labels = [str(label) for label in run.data.get("labels") or ()]
    return converters.TrainedHead(task, labels, str(run.data.get("pooling") or ""))


def _config_text(model_dir: Path) -> str:
    """config.json in one line, without what names a place on this machine."""
    values = {key: value for key, value in read_config(model_dir).items() if not key.startswith("_")}
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


def _has_own_tokenizer(adapter_dir: Path, base_dir: Path) -> bool:
    own, base = adapter_dir / "tokenizer.json", base_dir / "tokenizer.json"
    return own.is_file() and (not base.is_file() or own.read_bytes() != base.read_bytes())


def _check_trained_on(run: Run | None, base_dir: Path, fingerprint: Fingerprint, sink: Sink) -> None:
    if run is None:
        return
    differences = run.fingerprint.differences(fingerprint)
    if "weights" in differences or "tokenizer" in differences:
        raise MismatchError(
            f"{run.path} was trained on {run.base_name!r}, whose {' and '.join(differences)} differ from {base_dir}'s.",
            hint="Name the directory of the base it was trained on with --base.",
        )
    if differences:
        sink(Notice(f"The chat template of {base_dir} changed since {run.path} was trained.", "warning"))


def _named_base(adapter_dir: Path) -> str:
    path = adapter_dir / "adapter_config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint="Save the adapter again.") from error


def _hub_snapshots(name: str) -> Iterator[Path]:
    """Where Hugging Face's own cache has the repository `name` ("owner/model"), if it does."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{name.replace('/', '--')}"
    if (folder / "refs" / "main").is_file():
        yield folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()


def _checkpoint_with(fingerprint: Fingerprint) -> Path | None:
    for entry in list_models():
        if entry.kind != "checkpoint" or not fingerprint.weights:
            continue
        try:
            if fingerprint_checkpoint(entry.path).weights == fingerprint.weights:
                return entry.path
        except EdgetuneError:
            continue
    return None


def _convert_base(
    model_dir: Path,
    out_path: Path,
    outtype: str,
    metadata: dict[str, str | int | float | bool],
    merge: Path | None,
    sink: Sink,
    check_space: Callable[[int], None],
) -> None:
    with _translated_errors():
        converters.convert_base(
            model_dir,
            out_path,
            outtype=outtype,
            metadata=metadata,
            merge=merge,
            trained=_trained_head(load_run(merge) if merge else None),
            on_tensor=_reporter(sink),
            check_space=check_space,
            on_notice=lambda text: sink(Notice(text)),
        )


def _intermediate_type(model_dir: Path, merge: Path | None) -> str:
    """What to write before quantizing: the checkpoint's own type, so that only the quantizer rounds."""
    stored = _stored_types(model_dir)
    if stored in ({"BF16"}, {"F16"}):
        # A merged weight has more digits than bfloat16 keeps.
        return "f16" if merge else stored.pop().lower()
    return "f32"


def _stored_types(model_dir: Path) -> set[str]:
    return {
        str(entry["dtype"])
        for path in safetensors_files(model_dir)
        for entry in read_safetensors_header(path)[0].values()
        if len(entry["shape"]) >= 2 and str(entry["dtype"])[0] in "FB" and entry["dtype"] != "BOOL"
    }


def _reporter(sink: Sink) -> Callable[[str, tuple[int, ...], int, int], None]:
    def report(name: str, shape: tuple[int, ...], done: int, total: int) -> None:
        sink(Progress("write", done, total, "bytes", f"{name} [{' × '.join(map(str, shape[::-1]))}]"))

    return report


def _space_checker(out_path: Path, *, share: float = 0.0) -> Callable[[int], None]:
    def check(needed: int) -> None:
        check_disk_space(out_path.parent, int(needed * (1 + share)))

    return check


@contextmanager
def _removed_afterwards(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except converters.CorruptCheckpoint as error:
        raise CorruptFileError(error.message, hint=error.hint) from error
    except (converters.UnsupportedModel, converters.UnsupportedAdapter) as error:
        raise UnsupportedError(error.message, hint=error.hint) from error
    except converters.ConverterError as error:
        raise UsageError(error.message, hint=error.hint) from error


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
