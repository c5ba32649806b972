"""Which engine `edgetune generate` runs MODEL with, and how it is opened: llama.cpp where it can, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.cli.model_options import DEFAULT_MODEL, choose_model, open_chosen
from edgetune.cli.progress import say, show_progress
from edgetune.errors import MismatchError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from edgetune.engine.protocol import LoraSpec
    from edgetune.template import ChatTemplate

_LLAMA_ALONE = ("gpu_layers", "batch_size", "cache_type_k", "cache_type_v", "flash_attn", "draft", "verbose")


@dataclass(frozen=True)
class OpenModel:
    """A model that is open."""

    engine: Any
    """A `protocol.Engine` that has a `path`."""
    is_encoder_decoder: bool
    """Whether it answers a source, and does not continue a prompt."""
    family: str
    """`model_type` of an encoder-decoder's config.json, or "t5"."""
    template: ChatTemplate | None = None
    name: str = "llama.cpp"
    """Of the engine."""


@dataclass(frozen=True)
class _TorchFiles:
    base: Path
    adapters: tuple[LoraSpec, ...]


def open_model(model: str | None, options: dict[str, Any], *, given: frozenset[str]) -> OpenModel:
    """Open MODEL with `model_options`, --engine and --dtype, which leave `options`; `given` are those typed by hand."""
    engine, dtype = options.pop("engine"), options.pop("dtype")
    files = _torch_files(model, options["lora"], engine=engine, force=options["force"])
    if files is not None:
        return _open_torch(files, options, dtype=dtype, given=given)
    if dtype != "auto":
        raise UsageError("--dtype is for models in torch.", hint="Leave it out, or add --engine torch.")
    with show_progress() as sink:
        choice = choose_model(model, options["lora"], sink=sink)
    from edgetune.engine.seq2seq import SEQ2SEQ_ARCHITECTURES
    from edgetune.gguf_header import read_gguf_header

    if read_gguf_header(choice.base).architecture in SEQ2SEQ_ARCHITECTURES:
        return _open_seq2seq(choice.base, choice.lora, options, given=given)
    options["lora"] = tuple(f"{one.path}:{one.scale:g}" for one in choice.lora)
    session = open_chosen(str(choice.base), options)
    return OpenModel(session.engine, False, "", session.template)


def _open_seq2seq(base: Path, lora: Sequence[LoraSpec], options: dict[str, Any], *, given: frozenset[str]) -> OpenModel:
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.engine.seq2seq import Seq2SeqEngine
    from edgetune.gguf_header import read_gguf_header
    from edgetune.library import check_pair_headers

    if unused := given & {"draft", "flash_attn", "batch_size"}:
        raise UsageError(f"{_flag(min(unused))} means nothing for an encoder-decoder.", hint="Leave it out.")
    for adapter in lora:
        check_pair_headers(read_gguf_header(base), read_gguf_header(adapter.path), force=options["force"])
    values = _take(options)
    # T5's decoder caches little, and exactly unless something else is asked for.
    wanted = ("ctx_size", "gpu_layers", "threads", "verbose", *(given & {"cache_type_k", "cache_type_v"}))
    speak_before_aborting()
    engine = Seq2SeqEngine.open(base, lora=lora, **{name: values[name] for name in wanted})
    return OpenModel(engine, True, "t5")


def _open_torch(files: _TorchFiles, options: dict[str, Any], *, dtype: Any, given: frozenset[str]) -> OpenModel:
    if unused := given & set(_LLAMA_ALONE):
        raise UsageError(f"{_flag(min(unused))} is for llama.cpp; this model runs in torch.", hint="Leave it out.")
    values = _take(options)
    from edgetune.engine.torch.engine import TorchEngine

    engine = TorchEngine.open(
        files.base, dtype=dtype, ctx_size=values["ctx_size"], threads=values["threads"], lora=files.adapters
    )
    if ignored := engine.ignored_settings:
        say(f"The model's generation_config.json asks for {', '.join(ignored)}, which is not done here.", warning=True)
    template = _template(engine, files) if not engine.is_encoder_decoder else None
    return OpenModel(engine, engine.is_encoder_decoder, engine.model_type, template, "torch")


def _template(engine: Any, files: _TorchFiles) -> ChatTemplate | None:
    """The chat template a decoder is used with: an adapter's own where it brings one, else the base's."""
    from edgetune.fingerprint import read_chat_template
    from edgetune.template import ChatTemplate

    places = [one.path for one in files.adapters if one.scale] + [files.base]
    source = next((text for place in places if (text := read_chat_template(place))), None)
    return ChatTemplate(source, engine.tokenizer.special_texts, engine.tokenizer.control_tokens) if source else None


def _torch_files(model: str | None, lora: Sequence[str], *, engine: str, force: bool) -> _TorchFiles | None:
    """The directories to run in torch; None where llama.cpp runs MODEL."""
    if engine == "llama":
        return None
    from edgetune.chat.adapters import split_scale
    from edgetune.engine.protocol import LoraSpec
    from edgetune.export import check_convertible, find_base_dir
    from edgetune.library import classify, find_model

    adapters = [LoraSpec(find_model(name), scale) for name, scale in map(split_scale, lora)]
    path = find_model(model or DEFAULT_MODEL) if model or not adapters else adapters[0].path
    kind = classify(path)
    if path.is_file():
        if engine == "torch":
            raise UsageError(f"{path} is a GGUF file; torch runs Hugging Face directories.", hint="Leave out --engine.")
        return None
    if kind == "run":
        base = find_base_dir(path)
        adapters = adapters or [LoraSpec(path)]
    else:
        base = path
    if base.is_file():
        return None
    if engine == "auto":
        try:
            check_convertible(base)
            return None
        except UnsupportedError as error:
            say(f"{error.message.rstrip('.')}: it runs in torch.")
    for adapter in adapters:
        if classify(adapter.path) != "run":
            raise UsageError(
                f"{adapter.path} is a GGUF adapter; a model in torch takes PEFT directories.",
                hint="Give the run it was made from.",
            )
        if not force:
            check_run_base(adapter.path, base)
    return _TorchFiles(base, tuple(adapters))


def check_run_base(adapter_dir: Path, base: Path) -> None:
    """Refuse an adapter whose record says that it was trained on other weights."""
    from edgetune.export import load_run
    from edgetune.fingerprint import fingerprint_checkpoint

    run = load_run(adapter_dir)
    if run is None or not run.fingerprint.weights:
        return
    found = replace(fingerprint_checkpoint(base), template="")
    if differing := run.fingerprint.differences(found):
        raise MismatchError(
            f"{adapter_dir} was trained on {run.base_name}; {base} has other {' and '.join(differing)}.",
            hint=f"Use {run.base_path}, or --force.",
        )


def _take(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `model_options` added out of `options`."""
    names = ("lora", "force", "ctx_size", "threads", *_LLAMA_ALONE)
    return {name: options.pop(name) for name in names}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
