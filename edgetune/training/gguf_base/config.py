"""The config.json of a model in a GGUF file: the one it was converted with, or what transformers makes of its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.export import CONFIG_KEY, gguf_decoders
from edgetune.gguf_header import GgufHeader, read_gguf_header

_HINT = "Train on the Hugging Face directory that it was made from."
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
"""Keys for which transformers would take a size of its own."""


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The fields of config.json of the model in `path`: as converted, or as transformers reads a file from elsewhere.

    Raises `UnsupportedError` for an architecture that is not trained from GGUF and for a part of a model,
    `CorruptFileError` for a file that does not say what model it is.
    """
    header = read_gguf_header(path)
    if isinstance(parts := header.metadata.get("split.count", 0), int) and parts > 1:
        raise UnsupportedError(
            f"{path} is one of {parts} files that are a model together; training reads one file.",
            hint="Put them together with llama.cpp: llama-gguf-split --merge FIRST.gguf MODEL.gguf",
        )
    if header.architecture not in gguf_decoders():
        raise UnsupportedError(
            f"{path} has the architecture {header.architecture!r}, which cannot be trained from a GGUF file.",
            hint=_HINT,
        )
    if recorded := header.metadata.get(CONFIG_KEY):
        return _recorded(path, str(recorded))
    if missing := [key for key in _NEEDED if header.number(key) is None]:
        raise CorruptFileError(
            f"{path} does not say its {header.architecture}.{missing[0]}.", hint="Convert or download it again."
        )
    return _from_keys(path, header)


def _recorded(path: Path, text: str) -> dict[str, Any]:
    """The config.json that the file was converted with."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CorruptFileError(
            f"{CONFIG_KEY} in {path} is not valid JSON: {error}.", hint="Convert it again."
        ) from error
    if not isinstance(values, dict) or not values.get("model_type"):
        raise CorruptFileError(f"{CONFIG_KEY} in {path} names no model_type.", hint="Convert it again.")
    return values


def _from_keys(path: Path, header: GgufHeader) -> dict[str, Any]:
    """What transformers makes of the file's keys."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if header.number("expert_count") and config.model_type == "llama":
            config = _as_mixtral(header, config)
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CorruptFileError(
            f"transformers cannot read what model is in {path}: {reason}.", hint="Convert or download it again."
        ) from error
    return {**config.to_dict(), **_left_out(header, config), "architectures": [model_class.__name__]}


def _as_mixtral(header: GgufHeader, config: Any) -> Any:
    """A "llama" with experts is a Mixtral, which transformers takes for a dense model."""
    import transformers

    same = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    used = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    return transformers.MixtralConfig(**same, **{name: header.number(key) for name, key in used.items()})


def _left_out(header: GgufHeader, config: Any) -> dict[str, Any]:
    """Fields that the file's keys decide, and that transformers leaves at their defaults."""
    found: dict[str, Any] = {}
    if head_size := header.number("attention.key_length"):
        # llama.cpp scales attention by the size of a head, also where a checkpoint may say another number.
        for name in ("head_dim", "query_pre_attn_scalar"):
            if hasattr(config, name):
                found[name] = head_size
    keys = {"moe_intermediate_size": "expert_feed_forward_length"}
    if config.model_type == "gpt2":
        keys = {"n_positions": "context_length", "n_inner": "feed_forward_length"}
    found |= {name: size for name, key in keys.items() if hasattr(config, name) and (size := header.number(key))}
    return found
