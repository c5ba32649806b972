"""The base model in torch and the adapter on it: loading, attaching, and the PEFT directory that results.

The base is frozen, in bf16 or f32; the adapter is f32. Reads safetensors only and runs no code from a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import CorruptFileError, UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.text_limit import positions
from edgetune.training.settings import TrainSettings, flag_name
from edgetune.training.tasks import Task

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
"""In place of target modules: every linear layer but the head."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
"""What a run copies from its base, so that other tools find tokenizer and template with the adapter."""


def check_base(model_dir: Path) -> dict[str, Any]:
    """The base's config.json, after everything that can be said of a base without loading torch.

    Raises `UsageError` where there is no model, `CorruptFileError` for a broken one, `UnsupportedError` for weights
    that are not safetensors.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{model_dir} has no config.json, so it is no Hugging Face model.", hint="Give a model directory with -m."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint="Download the model again.") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise CorruptFileError(f"{path} names no model_type.", hint="Download the model again.")
    for weights_path in safetensors_files(model_dir):
        read_safetensors_header(weights_path)
    return config


def context_length(config: Any) -> int:
    """How many tokens the model, and both where two are put together, was made for; 0 when its config does not say."""
    parts: list[Any] = [getattr(config, "encoder", None), text_config(config)]
    known = (positions(part.to_dict()) for part in parts if hasattr(part, "to_dict"))
    return min(filter(None, known), default=0)


def text_config(config: Any) -> Any:
    """The part of `config` that sizes of text are in: the decoder's where two models are put together."""
    return config.decoder if config.model_type == "encoder-decoder" else config.get_text_config()


def load_base(
    model_dir: Path, config: Any, *, task: Task, dtype: torch.dtype, device: torch.device, quantization: Any = None
) -> Any:
    """The base model, frozen; `quantization` is transformers' config of it.

    Raises `CorruptFileError` when weights are missing or do not fit the config.
    """
    import transformers

    if model_dir.is_file():
        from edgetune.training.gguf_base.load import load_gguf_base

        return load_gguf_base(model_dir, config, dtype=dtype, device=device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, found = getattr(transformers, task.auto_class).from_pretrained(
                model_dir,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({"quantization_config": quantization} if quantization else {}),
            )
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        if "out of memory" in str(error) or "allocate" in str(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CorruptFileError(f"{model_dir} cannot be loaded: {reason}.", hint="Download the model again.") from error
    heads = tuple(f"{name}." for name in (*task.head_modules(model), *task.frozen_modules(model)))
    odd = sorted(str(entry[0]) for entry in found["mismatched_keys"] if not str(entry[0]).startswith(heads))
    if odd:
        raise CorruptFileError(
            f"{model_dir} has weights of another size than its config says, e.g. {odd[0]}.",
            hint="Download the model again.",
        )
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(heads)):
        raise CorruptFileError(
            f"{model_dir} lacks {len(missing)} of the weights its config asks for, e.g. {missing[0]}.",
            hint="Download the model again.",
        )
    task.start(model)
    model.requires_grad_(False)
    return model.to(device)


def add_adapter(
    model: Any,
    settings: TrainSettings,
    model_dir: Path,
    *,
    task: Task,
    sink: Sink = ignore,
    fields: Mapping[str, Any] | None = None,
) -> Any:
    """`model` with a fresh LoRA adapter in f32; `fields` are more of PEFT's LoraConfig.

    Raises `UsageError` when the target modules are not in the model.
    """
    import peft
    import torch

    _check_names(model, settings)
    _check_rank(model, settings)
    if settings.modules_to_save and model_dir.is_file():
        raise UsageError(
            f"--modules-to-save trains weights themselves; those in {model_dir} stay in their blocks.",
            hint="Leave it out, or give the Hugging Face directory that the file was made from with -m.",
        )
    torch.manual_seed(settings.seed)
    values: dict[str, Any] = {
        "task_type": task.peft_type,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _targets(model, settings.target_modules),
        "use_rslora": settings.rslora,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "exclude_modules": _excluded(model, settings, task) or None,
        "modules_to_save": [*task.head_modules(model), *settings.modules_to_save] or None,
    }
    config = peft.LoraConfig(**{**values, **(fields or {})})
    try:
        with warnings.catch_warnings():
            # PEFT's warnings on tied heads and transposed layers; `_tell` says what matters of them.
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UsageError(f"The adapter does not fit the model: {reason}.", hint=_adaptable(model)) from error
    if model_dir.is_file():
        from edgetune.training.gguf_base.experts import adapt_experts

        adapt_experts(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir.resolve())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _tell(adapted, settings, sink)
    return adapted


def _excluded(model: Any, settings: TrainSettings, task: Task) -> list[str]:
    """Linear layers that "all-linear" does not mean for this task."""
    if ALL_LINEAR not in settings.target_modules:
        return []
    frozen = tuple(f"{name}." for name in task.frozen_modules(model))
    return [name for name, module in model.named_modules() if name.startswith(frozen) and _is_target(module)]


def _targets(model: Any, names: tuple[str, ...]) -> str | list[str]:
    """As PEFT takes them: "all-linear", a regular expression, or a list of names."""
    if len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
        return names[0]
    if ALL_LINEAR not in names:
        return list(names)
    # PEFT knows the word only when it stands alone; beside other names it would be one that no module has.
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if _is_target(module) and not type(module).__name__.endswith("Embedding") and module is not head
    }
    return sorted({*names, *linear} - {ALL_LINEAR})


def _check_names(model: Any, settings: TrainSettings) -> None:
    """Raise `UsageError` for a name or pattern that no module has: PEFT passes over it as long as others fit."""
    modules = [name for name, _ in model.named_modules()]
    targets = _targets(model, settings.target_modules)
    if isinstance(targets, list):
        for name in targets:
            _demand_match("target_modules", name, rf"(.*\.)?{re.escape(name)}", modules, model)
    elif targets != ALL_LINEAR:
        _demand_match("target_modules", targets, targets, modules, model)
    for name in settings.modules_to_save:
        _demand_match("modules_to_save", name, rf".*{re.escape(name)}", modules, model)
    for setting in ("rank_pattern", "alpha_pattern"):
        for name in getattr(settings, setting):
            _demand_match(setting, name, rf"(.*\.)?({name})", modules, model)


def _check_rank(model: Any, settings: TrainSettings) -> None:
    """Raise `UsageError` for a rank above that of every weight: such an adapter can say no more, and may be huge."""
    highest = max((min(_sizes(module)) for module in model.modules() if _is_target(module)), default=0)
    wanted = {"--rank": settings.rank, **{f"--rank-pattern {p}": rank for p, rank in settings.rank_pattern.items()}}
    for name, rank in wanted.items():
        if highest and rank > highest:
            raise UsageError(
                f"{name} is {rank}, but no weight of the model has a rank above {highest}.",
                hint="Ranks of 8 to 64 are usual.",
            )


def _demand_match(setting: str, name: str, pattern: str, modules: list[str], model: Any) -> None:
    try:
        found = any(re.fullmatch(pattern, module) for module in modules)
    except re.error as error:
        raise UsageError(f"{flag_name(setting)} {name!r} is no regular expression: {error}.") from error
    if not found:
        raise UsageError(f"{flag_name(setting)} {name!r} fits no module of the model.", hint=_adaptable(model))


def _adaptable(model: Any) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_target(module)})
    return f"Modules that can be adapted: {', '.join(names)}."


def _is_target(module: Any) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D", "Embedding", "BlockLinear", "BlockEmbedding")


def _sizes(module: Any) -> tuple[int, ...]:
    """Rows and columns of a target's weight, which is not made for that where it lies in blocks."""
    return tuple(module.blocks.shape if hasattr(module, "blocks") else module.weight.shape)


def _tell(adapted: Any, settings: TrainSettings, sink: Sink) -> None:
    touched = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    base = adapted.get_base_model()
    embedded = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    on_embeddings = any(parameter.requires_grad for module in embedded for parameter in module.parameters())
    tied = bool(getattr(text_config(base.config), "tie_word_embeddings", False))
    if settings.modules_to_save:
        sink(Notice("modules_to_save are trained in full: convert this run with --merge.", "warning"))
    elif on_embeddings and tied:
        sink(Notice("The adapter touches a head tied to the embeddings: convert this run with --merge.", "warning"))
    if not touched:
        raise UsageError("The adapter has nothing to train.", hint="Choose other --target-modules.")


def save_adapter(adapted: Any, directory: Path) -> None:
    """Write the adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    write_tensors(adapter_state(adapted), directory / ADAPTER_WEIGHTS)
    config = adapted.peft_config["default"].to_dict()
    config["inference_mode"] = True
    if config.get("modules_to_save"):
        # PEFT adds the usual names of heads to those it is given.
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    # Sets come in an order that changes from process to process.
    ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    text = json.dumps(ordered, indent=2, sort_keys=True, default=str)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError`, e.g. when the disk is full."""
    import safetensors.torch

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(ready, path, metadata={"format": "pt"})  # copies nothing, as `save` does
    except safetensors.SafetensorError as error:
        # It hides the system's errors in one of its own.
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)  # it would let nobody but the owner read the file


def adapter_state(adapted: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names PEFT saves them under; the base's own embeddings are left out."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))


def load_adapter(adapted: Any, directory: Path) -> None:
    """Put the adapter saved in `directory` into `adapted`. Raises `CorruptFileError` when it is another adapter's."""
    import peft
    import safetensors.torch

    state = safetensors.torch.load_file(directory / ADAPTER_WEIGHTS)
    if set(state) != set(adapter_state(adapted)):
        raise CorruptFileError(f"{directory / ADAPTER_WEIGHTS} does not hold this adapter's tensors.")
    peft.set_peft_model_state_dict(adapted, state)


def copy_tokenizer(model_dir: Path, run_dir: Path, *, chat_template: str | None = None) -> None:
    """Copy the base's tokenizer files into `run_dir`; `chat_template` takes the place of its template."""
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, run_dir / name)
    named = model_dir / "additional_chat_templates"
    if named.is_dir() and chat_template is None:
        shutil.copytree(named, run_dir / named.name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    if chat_template is not None:
        (run_dir / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
