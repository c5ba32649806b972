"""Where a base comes from: a Hugging Face directory, or a GGUF file whose blocks are trained against as they are.

One function for each thing that training asks of a base before it is loaded; everything else is the same for both.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, cast

from edgetune.artifacts import RUN_RECORD, Fingerprint
from edgetune.data import TextTokenizer, load_tokenizer
from edgetune.data.sided_text import load_sided
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError
from edgetune.events import Sink
from edgetune.export import BASE_CONFIG
from edgetune.fingerprint import (
    fingerprint_checkpoint,
    fingerprint_gguf,
    read_chat_template,
    read_safetensors_header,
    safetensors_files,
    transformer_dir,
)
from edgetune.gguf_header import read_gguf, read_gguf_header
from edgetune.library import find_model
from edgetune.paths import write_json
from edgetune.training.model import check_base, copy_tokenizer
from edgetune.training.tasks import Task


def find_base(name_or_path: str) -> Path:
    """The Hugging Face directory or GGUF model called `name_or_path`. Raises `UsageError` when it is something else."""
    if not name_or_path:
        raise UsageError(
            "No base model.", hint="Give a Hugging Face directory or a library name with -m, e.g. -m pocket."
        )
    path = find_model(name_or_path)
    if (path / RUN_RECORD).is_file() and not (path / "config.json").is_file():
        raise UsageError(f"{path} is a run, not a base model.", hint="To go on with it: edgetune train --resume RUN.")
    if path.is_dir() and (inside := transformer_dir(path)) != path:
        raise UnsupportedError(
            f"{path} keeps its model in {inside.name}, and is trained on only with that at its top.",
            hint=f'Move the files in {inside.name} up, and make its "path" in modules.json empty.',
        )
    read_raw_config(path)
    return path


def is_gguf(path: Path) -> bool:
    """Whether the base at `path` is a GGUF file."""
    return path.is_file()


def read_raw_config(path: Path) -> dict[str, Any]:
    """The fields of config.json, after everything that can be said of the base without loading torch."""
    if not is_gguf(path):
        return check_base(path)
    if read_gguf(path).kind != "model":
        raise UsageError(f"{path} is an adapter, not a base model.", hint="Name the model it was made for with -m.")
    from edgetune.training.gguf_base.config import read_gguf_config

    return read_gguf_config(path)


def read_config(path: Path, task: Task) -> Any:
    """The base's transformers config. Raises `UnsupportedError` unless transformers knows it and it fits `task`."""
    import transformers

    raw = read_raw_config(path)
    architecture = str((raw.get("architectures") or [""])[0])
    if is_gguf(path) and task.auto_class != "AutoModelForCausalLM":
        raise UnsupportedError(
            f"{path} is a GGUF file; {task.name} is trained on Hugging Face directories.",
            hint="Give the directory that the file was made from with -m.",
        )
    try:
        if is_gguf(path):
            config = transformers.AutoConfig.for_model(**raw)
        else:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        known = raw["model_type"] in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        reason = " ".join(str(error).split())[:200].rstrip(".")
        if known:
            raise CorruptFileError(f"The config of {path} cannot be read: {reason}.") from error
        raise UnsupportedError(
            f"{path} is a {architecture or raw['model_type']}, which transformers does not know by itself.",
            hint="edgetune runs no code that comes with a model; use a model of a known architecture.",
        ) from error
    task.check_config(config, architecture, path)
    return config


def weight_names(path: Path) -> list[str]:
    """The names of the base's tensors."""
    if is_gguf(path):
        return [tensor.name for tensor in read_gguf_header(path).tensors]
    return [name for weights_path in safetensors_files(path) for name in read_safetensors_header(weights_path)[0]]


def read_template(path: Path) -> str | None:
    """The base's own chat template as Jinja source; None when it has none."""
    if not is_gguf(path):
        return read_chat_template(path)
    return str(read_gguf_header(path).metadata.get("tokenizer.chat_template", "")) or None


def load_base_tokenizer(path: Path, *, chat_template: str | None, now: datetime | None) -> TextTokenizer:
    """The base's tokenizer; `chat_template` (Jinja source) replaces its own, `now` is the date it may write."""
    if is_gguf(path):
        from edgetune.training.gguf_base.tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path, chat_template=chat_template, now=now)
    # One that is no file of the `tokenizers` library has what tasks ask of a tokenizer.
    sided = cast(TextTokenizer | None, load_sided(path))
    return sided or load_tokenizer(path, chat_template=chat_template, now=now)


def fingerprint_base(path: Path, *, sink: Sink) -> Fingerprint:
    """What identifies the base: of a GGUF, the checkpoint it was made from, or the file itself where it names none."""
    return fingerprint_gguf(path) if is_gguf(path) else fingerprint_checkpoint(path, sink=sink)


def copy_base_tokenizer(path: Path, run_dir: Path, *, chat_template: str | None) -> None:
    """Leave in `run_dir` what other tools need to find with an adapter; of a GGUF, its config and template."""
    if not is_gguf(path):
        copy_tokenizer(path, run_dir, chat_template=chat_template)
        return
    write_json(run_dir / BASE_CONFIG, read_raw_config(path))
    if template := chat_template if chat_template is not None else read_template(path):
        (run_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def base_name(path: Path) -> str:
    """What to call the base."""
    return path.stem if is_gguf(path) else path.resolve().name
