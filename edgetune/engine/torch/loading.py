"""A Hugging Face directory → a model in torch: weights from safetensors alone, never code that comes with them.

What does not fit into memory, lacks tensors or needs remote code is refused by name. Adapters are `adapters`'.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

from edgetune.byte_tokenizer import reads_bytes, with_fast_form
from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.errors import CorruptFileError, ResourceError, UnsupportedError, UsageError
from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.hardware import available_memory
from edgetune.piece_tokenizer import PieceTokenizer, load_pieces

Dtype = Literal["auto", "f32", "bf16", "int8"]
"""What a model is computed in; "auto" is bf16 for weights stored so, else f32. int8 is for CPUs."""
_HEADROOM = 1.2
"""Memory a model needs, as a multiple of its weights."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip


def require_torch() -> None:
    """Raise `UnsupportedError` unless torch and transformers can be imported."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"This model runs in torch, and {error.name} is not installed.",
            hint='pip install "edgetune[train]"',
        ) from error
    del torch
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def choose_device(name: str = "auto") -> str:
    """The device to run on: a GPU where there is one."""
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_checkpoint(model_dir: Path, *, dtype: Dtype, device: str) -> Any:
    """The language model in `model_dir`, in evaluation, in full precision where `dtype` is int8 (see `quantize_int8`).

    Raises `UnsupportedError`, `CorruptFileError`, `ResourceError`.
    """
    import torch
    import transformers

    stored, numbers = _stored(model_dir)
    wanted = _torch_dtype(dtype, stored)
    if dtype == "int8" and device != "cpu":
        raise UsageError("int8 runs on the CPU only.", hint="Use --dtype bf16 on a GPU.")
    needed = numbers * torch.empty((), dtype=wanted).element_size() * _HEADROOM
    if device == "cpu" and needed > available_memory():
        raise ResourceError(
            f"{model_dir} takes {needed / 1e9:.1f} GB as {dtype}; {available_memory() / 1e9:.1f} GB are free.",
            hint="Close other programs, or take --dtype bf16.",
        )
    with translated(f"transformers cannot load {model_dir}"):
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    _check_writes(model_dir, config)
    with translated(f"transformers cannot load {model_dir}"):
        kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        model, info = getattr(transformers, kind).from_pretrained(
            model_dir,
            dtype=wanted,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise CorruptFileError(
            f"{model_dir} lacks {len(missing)} tensors of its model, {missing[0]!r} first.", hint="Get it again."
        )
    return model.eval().to(device)


def _check_writes(model_dir: Path, config: Any) -> None:
    name = next(iter(getattr(config, "architectures", None) or []), "")
    if name.endswith(("EncoderModel", "ForSequenceClassification")):
        raise UnsupportedError(
            f"{model_dir} holds a {name}, which writes no text.",
            hint="Its vectors and labels: edgetune embed, edgetune classify",
        )


def quantize_int8(model: Any) -> Any:
    """`model` with the weights of its linear layers in int8, but for adapters and the head."""
    import torch

    if any(hasattr(module, "bottleneck") for module in model.modules()):
        raise UnsupportedError("Bottleneck adapters do not run in int8.", hint="Use --dtype bf16 or f32.")
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head and ".lora_" not in name
    ]
    settings = dict.fromkeys(names, torch.ao.quantization.default_dynamic_qconfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize: Any = torch.ao.quantization.quantize_dynamic
        return quantize(model, settings, dtype=torch.qint8)


def load_vocabulary(
    model_dir: Path, config: dict[str, Any], *, eog_ids: frozenset[int]
) -> JsonTokenizer | CharTokenizer | PieceTokenizer:
    """The tokenizer of `model_dir`; a model without one may have its characters in config.json.

    Raises `UnsupportedError` when there is none, `CorruptFileError` when it cannot be read.
    """
    import transformers

    if pieces := load_pieces(model_dir):
        return pieces
    hint = (
        "Copy the model's tokenizer.json into the directory; Marian needs source.spm, target.spm and vocab.json. "
        "Families without them (ProphetNet) run in transformers itself."
    )
    if not (reads_bytes(model_dir) or any((model_dir / name).is_file() for name in TOKENIZER_FILES)):
        characters = CharTokenizer.from_config(config)
        if characters is None:
            raise UnsupportedError(f"{model_dir} has no tokenizer.", hint=hint)
        return characters
    with translated(f"The tokenizer in {model_dir} cannot be loaded"):
        slow_or_fast = transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        tokenizer = with_fast_form(slow_or_fast)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"{model_dir} has a tokenizer of type {type(tokenizer).__name__}, which has no fast form.", hint=hint
        )
    names = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return JsonTokenizer(backend.to_str(), eog_ids=eog_ids, special_texts=names)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Let what transformers and PEFT raise become an `UnsupportedError` that says `what` failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UnsupportedError(f"{what}: {reason}.") from error


def _stored(model_dir: Path) -> tuple[set[str], int]:
    """The types of the tensors in `model_dir`, and how many numbers they hold."""
    files = safetensors_files(model_dir)
    entries = [entry for path in files for entry in read_safetensors_header(path)[0].values()]
    return {str(entry["dtype"]) for entry in entries}, sum(prod(entry["shape"]) for entry in entries)


def _torch_dtype(dtype: Dtype, stored: set[str]) -> Any:
    import torch

    if dtype == "auto":
        return torch.bfloat16 if stored == {"BF16"} else torch.float32
    return torch.bfloat16 if dtype == "bf16" else torch.float32
