"""Encoders through torch: a Hugging Face directory, with a PEFT adapter or without, in padded batches.

For models that llama.cpp has no graph for, for speed where the CPU computes in bfloat16, and as the reference that
GGUF files are proved against. The head is transformers' own, or what the sentence-transformers files describe.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgetune.artifacts import RUN_RECORD, Run, trained_pooling
from edgetune.engine.encoder import Encoder, Profile, check_heads
from edgetune.engine.encoder_tokens import JsonEncoderTokenizer
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.torch.adapters import READERS, read_with_peft
from edgetune.engine.torch.encoder_backend import TorchBackend
from edgetune.engine.torch.loading import TOKENIZER_FILES
from edgetune.engine.torch.sentence_layers import load_layer
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.head import POOLINGS, Head, HeadLayer, Pooling
from edgetune.sentence_modules import SentenceModules, read_modules
from edgetune.text_limit import positions

Dtype = Literal["auto", "f32", "bf16"]

_LONGEST = 512
"""Tokens of a text for a model that sets no bound itself."""
_HEADS = ("classifier.out_proj", "classifier", "score", "classification_head.out_proj")
"""Modules that end in a classifier's outputs, the longer name first."""
_PEFT_CLASSIFIER = "SEQ_CLS"


def open_torch_encoder(
    model_dir: Path,
    *,
    adapter_dir: Path | None = None,
    adapter_scale: float = 1.0,
    dtype: Dtype = "auto",
    threads: int = 0,
) -> Encoder:
    """Open the Hugging Face or sentence-transformers directory `model_dir`, with PEFT's adapter in `adapter_dir`.

    `adapter_scale` multiplies what a LoRA without a head adds. `dtype` auto is bf16 where this machine computes in it,
    else f32; `threads` 0 leaves torch's own number. Raises `UnsupportedError` when transformers cannot load it or a
    head is to be scaled, `ImportError` without torch, transformers or PEFT.
    """
    if threads:
        import torch

        torch.set_num_threads(threads)
    if adapter_dir is not None:
        check_heads([LoraSpec(adapter_dir, adapter_scale)], _brings_head)
    backend, tokenizer = load_backend(model_dir, adapter_dir=adapter_dir, dtype=dtype)
    if adapter_dir is not None and adapter_scale != 1:
        _scale(backend.model, adapter_dir, adapter_scale)
    return Encoder(backend, tokenizer)


def read_task(model_dir: Path, adapter_dir: Path | None = None) -> tuple[list[str], str]:
    """The labels of `model_dir` with PEFT's adapter in `adapter_dir`, and what they are for; no weights are read."""
    return _task(_config((read_modules(model_dir) or SentenceModules(model_dir)).transformer_dir), adapter_dir)


def load_backend(
    model_dir: Path, *, adapter_dir: Path | None = None, dtype: Dtype = "auto", device: str = ""
) -> tuple[TorchBackend, JsonEncoderTokenizer]:
    """The parts of `open_torch_encoder`, for who looks into the model as well; raises as it does."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    modules = read_modules(model_dir) or SentenceModules(model_dir)
    config = _config(modules.transformer_dir)
    labels, task = _task(config, adapter_dir)
    trained = trained_pooling(adapter_dir) if adapter_dir else ""
    if trained:
        modules = replace(modules, modes=(trained,))
    says_pooling = bool(trained) or (model_dir / "modules.json").is_file()
    is_alone = any(name.endswith("EncoderModel") for name in getattr(config, "architectures", None) or [])
    is_half = (is_alone or bool(getattr(config, "is_encoder_decoder", False))) and not labels
    if is_half and not is_alone and not (model_dir / "modules.json").is_file():
        raise UnsupportedError(
            f"{model_dir} turns one text into another; it gives no vector or label of a text.",
            hint="Run it with: edgetune generate",
        )
    model = _load(modules.transformer_dir, adapter_dir, labels=labels, is_half=is_half, dtype=dtype, device=device)
    tokenizer = _tokenizer(modules)
    profile = _profile(model_dir, config, modules, tokenizer, labels=labels, task=task, says_pooling=says_pooling)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    modes = modules.modes if profile.is_encoder or says_pooling else ("last",)
    source = _tokenizer_json(tokenizer, lower_case=modules.lower_case)
    return TorchBackend(model, profile, modes=modes, pad_id=pad_id), JsonEncoderTokenizer(source)


def _config(model_dir: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unloadable(model_dir, None, error) from error


def _task(config: Any, adapter_dir: Path | None) -> tuple[list[str], str]:
    """Labels and what the outputs mean; the adapter's word counts before the base's."""
    named = [str(label) for _, label in sorted((getattr(config, "id2label", None) or {}).items())]
    kind = {"regression": "regression", "multi_label_classification": "multilabel"}.get(
        str(getattr(config, "problem_type", None)), "classification"
    )
    is_classifier = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])
    if adapter_dir is not None and _adapter_config(adapter_dir).get("task_type") == _PEFT_CLASSIFIER:
        outputs = _adapter_outputs(adapter_dir) or len(named)
        recorded, kind = _recorded_task(adapter_dir, kind)
        named = recorded or (named if len(named) == outputs else [f"LABEL_{number}" for number in range(outputs)])
        is_classifier = True
    if not is_classifier:
        return [], "embedding"
    if kind == "classification" and len(named) == 1:
        kind = "regression"
    return named, kind


def _recorded_task(adapter_dir: Path, kind: str) -> tuple[list[str], str]:
    """Labels and kind of task from the run's record, if there is one."""
    if not (adapter_dir / RUN_RECORD).is_file():
        return [], kind
    run = Run.load(adapter_dir)
    labels = [str(label) for label in run.data.get("labels") or []]
    if run.task == "regression":
        return labels, "regression"
    return labels, "multilabel" if run.data.get("multi_label") else "classification"


def _adapter_config(adapter_dir: Path) -> dict[str, Any]:
    path = adapter_dir / "adapter_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint="Train or download it again.") from error
    return values if isinstance(values, dict) else {}


def _brings_head(adapter_dir: Path) -> bool:
    return bool(_adapter_config(adapter_dir).get("modules_to_save")) or _adapter_outputs(adapter_dir) > 0


def _scale(model: Any, adapter_dir: Path, scale: float) -> None:
    """Let what the LoRA adds count `scale` times. Raises `UnsupportedError` for another kind of adapter."""
    if (kind := _adapter_config(adapter_dir).get("peft_type")) != "LORA":
        raise UnsupportedError(f"{adapter_dir} is of kind {kind}, which cannot be scaled by {scale:g}.", hint="Use 1.")
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            module.scaling = {name: value * scale for name, value in scaling.items()}


def _adapter_outputs(adapter_dir: Path) -> int:
    """Outputs of the head in the adapter; 0 when it brings none."""
    path = adapter_dir / "adapter_model.safetensors"
    tensors = read_safetensors_header(path)[0] if path.is_file() else {}
    for head in _HEADS:
        for name, entry in tensors.items():
            if f".{name}".endswith((f".{head}.weight", f".{head}.modules_to_save.weight")):
                return int(entry["shape"][0])
    return 0


def _load(
    model_dir: Path, adapter_dir: Path | None, *, labels: list[str], is_half: bool, dtype: Dtype, device: str
) -> Any:
    """The model; `is_half`: of an encoder-decoder, the encoder."""
    import transformers

    options: dict[str, Any] = {
        "dtype": _dtype(dtype, device),
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    headers = [read_safetensors_header(path)[0] for path in safetensors_files(model_dir)]
    if adapter_dir is None and labels:
        _check_head_size({name: entry["shape"] for header in headers for name, entry in header.items()}, len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if labels:
                options["id2label"] = dict(enumerate(labels))
                options["label2id"] = {label: number for number, label in enumerate(labels)}
                options["ignore_mismatched_sizes"] = adapter_dir is not None
                auto = transformers.AutoModelForSequenceClassification
            else:
                auto = transformers.AutoModelForTextEncoding if is_half else transformers.AutoModel
            model, info = auto.from_pretrained(model_dir, **options)
            _check_whole(model_dir, model, info["missing_keys"], has_head=bool(labels), is_adapted=bool(adapter_dir))
            if adapter_dir is not None:
                kind = str(_adapter_config(adapter_dir).get("peft_type"))
                model = READERS.get(kind, read_with_peft)(model, adapter_dir, "default")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise _unloadable(model_dir, adapter_dir, error) from error
    return model.eval().to(device)


def _check_whole(model_dir: Path, model: Any, missing: Iterable[str], *, has_head: bool, is_adapted: bool) -> None:
    """Refuse weights that would be made up, but for a pooler nothing reads and a head that an adapter brings."""
    body = f"{model.base_model_prefix}."

    def is_spare(name: str) -> bool:
        if has_head:
            return is_adapted and (not name.startswith(body) or ".pooler." in name)
        return name.startswith("pooler.")

    if lacking := sorted(name for name in missing if not is_spare(name)):
        raise CorruptFileError(
            f"{model_dir} lacks {len(lacking)} tensors of its model, {lacking[0]!r} first.", hint="Get it again."
        )


def _check_head_size(shapes: Mapping[str, Sequence[int]], count: int) -> None:
    for head in _HEADS:
        shape = shapes.get(f"{head}.weight")
        if shape and shape[0] != count:
            raise CorruptFileError(
                f"The tensor '{head}.weight' has {shape[0]} rows, and config.json {count} labels.",
                hint="Use the config.json that belongs to these weights.",
            )


def _dtype(asked: Dtype, device: str) -> Any:
    import torch

    if asked != "auto":
        return {"f32": torch.float32, "bf16": torch.bfloat16}[asked]
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_computes_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_computes_bf16() -> bool:
    import torch

    features = torch.backends.cpu.get_cpu_capability()
    has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return features.startswith("AVX512") and bool(has_it())


def _tokenizer(modules: SentenceModules) -> Any:
    import transformers

    # transformers makes an empty tokenizer where there is none.
    if not any((modules.transformer_dir / name).is_file() for name in TOKENIZER_FILES):
        raise CorruptFileError(
            f"{modules.transformer_dir} has no tokenizer files.",
            hint="Put the model's tokenizer.json beside its weights.",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            modules.transformer_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise _unloadable(modules.transformer_dir, None, error) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedError(f"{modules.transformer_dir} has a tokenizer without a fast form.")
    return tokenizer


def _tokenizer_json(tokenizer: Any, *, lower_case: bool) -> str:
    source = str(tokenizer.backend_tokenizer.to_str())
    if not lower_case:
        return source
    values = json.loads(source)
    first = [{"type": "Lowercase"}, *([values["normalizer"]] if values["normalizer"] else [])]
    values["normalizer"] = {"type": "Sequence", "normalizers": first}
    return json.dumps(values)


def _profile(
    model_dir: Path,
    config: Any,
    modules: SentenceModules,
    tokenizer: Any,
    *,
    labels: list[str],
    task: str,
    says_pooling: bool,
) -> Profile:
    text = config.get_text_config()
    bound = positions(text.to_dict()) or _LONGEST
    limits = [bound, modules.max_tokens or bound]
    if modules.max_tokens is None and 0 < tokenizer.model_max_length < 1 << 20:
        limits.append(tokenizer.model_max_length)
    is_decoder = not _sees_both_ways(text)
    pooling: Pooling = next((mode for mode in POOLINGS if mode == modules.modes[0]), "mean")
    layers: tuple[HeadLayer, ...]
    if labels:
        # The layers of a classifier are the model's own; the one that stands here says only that it has some.
        layers = (HeadLayer("dense", np.zeros((len(labels), text.hidden_size), np.float32)),)
    else:
        layers = tuple(map(load_layer, modules.layers))
    head = Head(task, tuple(labels), pooling, layers, modules.normalize) if labels or says_pooling else None
    return Profile(
        path=model_dir,
        hidden_size=text.hidden_size,
        max_tokens=min(limits),
        head=head,
        pooling="last" if is_decoder and not says_pooling else pooling,
        normalize=modules.normalize,
        is_encoder=not is_decoder,
        prompts=modules.prompts,
        default_prompt=modules.default_prompt,
    )


def _sees_both_ways(config: Any) -> bool:
    import transformers

    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    is_decoder = bool(getattr(config, "is_decoder", False))
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return masked or (type(config) not in causal and not is_decoder)


def _unloadable(model_dir: Path, adapter_dir: Path | None, error: Exception) -> UnsupportedError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    what = f"{model_dir} with {adapter_dir}" if adapter_dir else str(model_dir)
    return UnsupportedError(f"transformers cannot load {what}: {reason}.")
