"""What a model, an adapter or a run is for, from its header, its config or its record: which verb uses it.

Rough where a file says little: what cannot be read counts as a model to chat with, and opening it says what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import EdgetuneError
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.library.describe import checkpoint_architecture, read_config
from edgetune.library.index import Kind

Purpose = Literal["chat", "classify", "embed", "generate"]

_BY_TASK: dict[str, Purpose] = {
    **dict.fromkeys(("classification", "multilabel", "regression"), "classify"),
    "embedding": "embed",
    "seq2seq": "generate",
}


def purpose_of(path: Path, kind: Kind) -> Purpose:
    """The verb that what lies at `path` is made for."""
    try:
        if kind == "run":
            return _BY_TASK.get(Run.load(path).task, "chat") if (path / RUN_RECORD).is_file() else "chat"
        return _of_checkpoint(path) if kind == "checkpoint" else _of_header(read_gguf_header(path))
    except (EdgetuneError, OSError):
        return "chat"


def _of_header(header: GgufHeader) -> Purpose:
    if (task := header.metadata.get("edgetune.task")) is not None:
        return _BY_TASK.get(str(task), "chat")
    if header.metadata.get(f"{header.architecture}.attention.causal") is False or header.number("pooling_type"):
        return "embed"
    if "bert" in header.architecture or header.architecture == "t5encoder":  # Older files of them say nothing.
        return "embed"
    return "generate" if header.architecture == "t5" else "chat"


def _of_checkpoint(model_dir: Path) -> Purpose:
    architecture = checkpoint_architecture(model_dir)
    if (model_dir / "modules.json").is_file() or architecture.endswith("EncoderModel"):
        return "embed"
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    config = read_config(model_dir)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "chat"
    if config.get("is_encoder_decoder") or architecture.endswith("EncoderDecoderModel"):
        return "generate"
    # Models that write images' or several kinds' texts are named like encoder-decoders, and say that they are none.
    return "chat" if architecture.endswith("ForConditionalGeneration") else "embed"
