"""Models that write: a name → an open engine that continues prompts, or answers sources; llama.cpp's, else torch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.chat import Session
from edgetune.chat import open_session as open_session_of
from edgetune.chat.adapters import split_scale
from edgetune.engine.beam import BeamSettings
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.export import check_convertible, find_base_dir
from edgetune.fingerprint import read_chat_template
from edgetune.gguf_header import read_gguf_header
from edgetune.library import check_pair_headers, classify, find_model
from edgetune.opening.files import DEFAULT_MODEL, ModelChoice, check_writes, choose_model, find_draft
from edgetune.opening.torch_files import TorchFiles, find_torch_files
from edgetune.template import ChatTemplate

_LLAMA_ALONE = ("gpu_layers", "batch_size", "cache_type_k", "cache_type_v", "flash_attn", "draft", "verbose")
_DECODERS_ALONE = ("draft", "flash_attn", "batch_size")


@dataclass(frozen=True)
class Writer:
    """A model that is open, and writes."""

    engine: Any
    """A `protocol.Engine` that has a `path`."""
    is_encoder_decoder: bool
    """Whether it answers a source, and does not continue a prompt."""
    family: str = ""
    """`model_type` of an encoder-decoder's config.json, or "t5"."""
    template: ChatTemplate | None = None
    """What a decoder's chat is rendered with; None for one that only continues text."""
    name: str = "llama.cpp"
    """Of the engine."""
    limit: int = -1
    """How many new tokens the model's own settings allow; -1: they say nothing."""
    beams: BeamSettings = field(default_factory=BeamSettings)
    """The beam search that it asks for by itself."""


def open_session(
    model: str | None = None,
    lora: Sequence[str] = (),
    *,
    force: bool = False,
    draft: str = "",
    sink: Sink = ignore,
    **engine_options: Any,
) -> Session:
    """Open a decoder for chatting: `model`, or the base of the adapters `lora` (`FILE[:SCALE]`), or the embedded one.

    `draft` is "ngram" or another model's name; `engine_options` are `LlamaEngine.open`'s. Raises `UsageError` for what
    is not there, `UnsupportedError` for a model that does not chat, `MismatchError` for an adapter of another base
    unless `force`.
    """
    check_writes(model)
    choice = choose_model(model, lora, sink=sink)
    return _open_choice(choice, force=force, draft=find_draft(draft, sink=sink), sink=sink, **engine_options)


def open_writer(
    model: str | None = None,
    lora: Sequence[str] = (),
    *,
    engine: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    sink: Sink = ignore,
    **engine_options: Any,
) -> Writer:
    """Open a decoder or an encoder-decoder. `engine` is "llama", "torch", or "auto": llama.cpp where it has the graph.

    `dtype` is torch's: "f32", "bf16", "int8" or "auto". `engine_options` hold what was asked for and nothing else; what
    the engine that comes out does not know is refused with `UsageError`. Raises as `open_session`.
    """
    files = _torch_files(model, lora, engine=engine, force=force, sink=sink)
    if files is not None:
        return _open_torch(files, dtype=dtype, sink=sink, **engine_options)
    if dtype != "auto":
        raise UsageError("--dtype is for models in torch.", hint="Leave it out, or add --engine torch.")
    choice = choose_model(model, lora, sink=sink)
    from edgetune.engine.seq2seq import SEQ2SEQ_ARCHITECTURES

    if read_gguf_header(choice.base).architecture in SEQ2SEQ_ARCHITECTURES:
        return _open_seq2seq(choice, force=force, **engine_options)
    engine_options["draft"] = find_draft(engine_options.get("draft", ""), sink=sink)
    session = _open_choice(choice, force=force, sink=sink, **engine_options)
    return Writer(session.engine, False, template=session.template)


def _open_choice(choice: ModelChoice, *, force: bool, sink: Sink, **engine_options: Any) -> Session:
    session = open_session_of(choice.base, lora=choice.lora, force=force, **engine_options)
    engine = session.engine
    asked = engine_options.get("ctx_size", 0)
    trained = engine.trained_context
    if asked > trained:
        sink(Notice(f"The model was trained on texts of up to {trained} tokens, not {asked}.", "warning"))
    elif not asked and engine.context_size < trained:
        sink(Notice(f"The context is {engine.context_size} of {trained} tokens to spare memory; -c sets it."))
    return session


def _open_seq2seq(choice: ModelChoice, *, force: bool, **options: Any) -> Writer:
    from edgetune.engine.seq2seq import Seq2SeqEngine

    if unused := options.keys() & set(_DECODERS_ALONE):
        raise UsageError(f"{_flag(min(unused))} means nothing for an encoder-decoder.", hint="Leave it out.")
    header = read_gguf_header(choice.base)
    for adapter in choice.lora:
        check_pair_headers(header, read_gguf_header(adapter.path), force=force)
    return Writer(Seq2SeqEngine.open(choice.base, lora=choice.lora, **options), True, "t5")


def _torch_files(model: str | None, lora: Sequence[str], *, engine: str, force: bool, sink: Sink) -> TorchFiles | None:
    """The directories to run in torch; None where llama.cpp runs the model."""
    if engine == "llama":
        return None
    path = find_model(model or (split_scale(lora[0])[0] if lora else DEFAULT_MODEL))
    if engine == "torch":
        return find_torch_files(path, lora, force=force)
    base = find_base_dir(path) if classify(path) == "run" else path
    if base.is_file():
        return None
    try:
        check_convertible(base)
        return None
    except UnsupportedError as error:
        sink(Notice(f"{error.message.rstrip('.')}: it runs in torch."))
    return find_torch_files(path, lora, force=force)


def _open_torch(files: TorchFiles, *, dtype: Any, sink: Sink, **options: Any) -> Writer:
    if unused := options.keys() & set(_LLAMA_ALONE):
        raise UsageError(f"{_flag(min(unused))} is for llama.cpp; this model runs in torch.", hint="Leave it out.")
    from edgetune.engine.torch.engine import TorchEngine

    engine = TorchEngine.open(files.base, dtype=dtype, lora=files.adapters, **options)
    if ignored := engine.own.ignored:
        asked = ", ".join(ignored)
        sink(Notice(f"The model's generation_config.json asks for {asked}, which is not done here.", "warning"))
    template = None if engine.own.is_encoder_decoder else _template(engine, files)
    own = engine.own
    return Writer(engine, own.is_encoder_decoder, own.model_type, template, "torch", limit=own.limit, beams=own.beams)


def _template(engine: Any, files: TorchFiles) -> ChatTemplate | None:
    """The chat template a decoder is used with: an adapter's own where it brings one, else the base's."""
    places = [one.path for one in files.adapters if one.scale] + [files.base]
    source = next((text for place in places if (text := read_chat_template(place))), None)
    return ChatTemplate(source, engine.tokenizer.special_texts, engine.tokenizer.control_tokens) if source else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
