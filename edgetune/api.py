"""edgetune from Python: the verbs of the command line as functions, values instead of flags, errors instead of codes.

    import edgetune

    run = edgetune.train(model="pocket", data="rows.jsonl", epochs=2)
    adapter = edgetune.convert(str(run.path)).gguf
    with edgetune.load("pocket", lora=[str(adapter.path)]) as model:
        print(model.generate("Where is my order?", temp=0).text)

`edgetune.load`, `edgetune.train` and their kin are these. Everything raises `EdgetuneError`s with one sentence and a
hint; `sink` hears the events that the command line draws as bars.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

from edgetune import training
from edgetune.artifacts import Run
from edgetune.conversion import Converted, convert
from edgetune.engine.encoder import Encoder
from edgetune.engine.protocol import FinishReason, Generation, Timings
from edgetune.engine.sampling import Sampling
from edgetune.events import Sink, ignore
from edgetune.opening.answers import AT_ONCE, Answers, Messages
from edgetune.opening.encoders import open_encoder
from edgetune.opening.prompting import Prompting
from edgetune.opening.writers import Writer, open_writer
from edgetune.parity import verify
from edgetune.training import TrainSettings

__all__ = [
    "Completion",
    "Converted",
    "Encoder",
    "Model",
    "TrainSettings",
    "convert",
    "load",
    "load_encoder",
    "train",
    "verify",
]

Prompt = str | tuple[str, str] | Messages
"""A text, a question with what it is about, or a conversation."""

_BEAMS = ("num_beams", "length_penalty", "early_stopping")


@dataclass(frozen=True)
class Completion:
    """What a model wrote."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, the one that ended it not included."""
    finish_reason: FinishReason
    seed: int
    """The seed in use, also when a random one was taken."""
    timings: Timings
    score: float | None = None
    """Of a beam search: the text's log-probability by its length, else None."""


class Model:
    """A model that writes: a decoder, or an encoder-decoder. Made by `load`; close it, or use it in a `with`."""

    def __init__(self, writer: Writer) -> None:
        """Take over `writer`."""
        self._writer = writer

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._writer.engine.close()

    @property
    def engine(self) -> Any:
        """The `engine.protocol.Engine` below: tokens, distributions, adapters, states."""
        return self._writer.engine

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it answers a source, and does not continue a prompt."""
        return self._writer.is_encoder_decoder

    def generate(self, prompt: Prompt, **settings: Any) -> Completion:
        """Answer `prompt` to the end; `settings` are `stream`'s, and it raises as that does."""
        return next(self.generate_all([prompt], **settings))

    def generate_all(self, prompts: Iterable[Prompt], **settings: Any) -> Iterator[Completion]:
        """Answer each of `prompts`, in their order; `settings` are `stream`'s, and it raises as that does.

        An encoder-decoder answers many in one batch; each answer is what it is alone.
        """
        answers, waiting = self._answers(**settings), iter(prompts)
        size = AT_ONCE if self.is_encoder_decoder else 1
        while begun := [answers.begin(prompt) for prompt in islice(waiting, size)]:
            for _ in self.engine.run_together(begun):
                pass
            yield from map(_completion, begun)

    def stream(self, prompt: Prompt, **settings: Any) -> Generation:
        """The answer to `prompt`: iterate over it for text as it comes.

        A decoder takes a text, or messages as `{"role": …, "content": …}`, with `system`; `raw` continues the text
        without the chat template. An encoder-decoder takes a text, or a question and what it is about, with `task`
        (summarize, translate, qa), `src_lang`, `tgt_lang` and `context`. Either takes `max_tokens`, `stop`, the fields
        of `Sampling` (temp, top_k, top_p, min_p, seed, grammar, …) and of a beam search (num_beams, length_penalty,
        early_stopping).

        Raises `UsageError` for what this kind of model has no use for, and for a prompt over the context.
        """
        return self._answers(**settings).begin(prompt)

    def _answers(
        self,
        *,
        system: str = "",
        raw: bool = False,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        task: str | None = None,
        src_lang: str = "",
        tgt_lang: str = "",
        context: str = "",
        **settings: Any,
    ) -> Answers:
        beams = {name: settings.pop(name) for name in _BEAMS if name in settings}
        return Answers(
            self._writer,
            Sampling(**settings),
            asked=settings.keys(),
            beams=beams,
            max_tokens=max_tokens,
            stop=stop,
            prompting=Prompting(task, src_lang, tgt_lang, context),
            raw=raw,
            system=system,
        )


def _completion(generation: Generation) -> Completion:
    assert generation.finish_reason is not None
    score = getattr(generation, "score", None)
    ids, timings = tuple(generation.ids), generation.timings
    return Completion(generation.text, ids, generation.finish_reason, generation.seed, timings, score)


def load(
    model: str | PathLike[str] | None = None,
    *,
    lora: Sequence[str | PathLike[str]] = (),
    engine: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    sink: Sink = ignore,
    **options: Any,
) -> Model:
    """Open a model that writes: a GGUF file, a Hugging Face directory, a run, or a name; None is the base of `lora`.

    `lora` are adapters, `FILE[:SCALE]`; one of another base raises `MismatchError` unless `force`. `engine` is "llama",
    "torch", or "auto": llama.cpp where it has the graph. `options` go to the engine: ctx_size, threads, gpu_layers,
    draft, cache_type_k, cache_type_v, flash_attn, batch_size.
    """
    name = None if model is None else str(model)
    adapters = [str(one) for one in lora]
    return Model(open_writer(name, adapters, engine=engine, dtype=dtype, force=force, sink=sink, **options))


def load_encoder(
    model: str | PathLike[str], *, lora: Sequence[str | PathLike[str]] = (), sink: Sink = ignore, **options: Any
) -> Encoder:
    """Open a model that reads, for `embed` and `classify`; `options` are `opening.encoders.open_encoder`'s."""
    return open_encoder(str(model), [str(one) for one in lora], sink=sink, **options)


def train(
    settings: TrainSettings | None = None,
    *,
    data: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    sink: Sink = ignore,
    **values: Any,
) -> Run:
    """Train an adapter by `settings`, or by values of its fields: `train(model="pocket", data="rows.jsonl", lr=1e-4)`.

    Raises as `training.train`. The run's directory holds the adapter in PEFT's layout, the record and the report.
    """
    if settings is None:
        files = (data,) if isinstance(data, (str, PathLike)) else tuple(data)
        values |= {name: str(values[name]) for name in ("model", "out") if name in values}
        settings = TrainSettings(data=tuple(map(str, files)), **values)
    elif data or values:
        raise TypeError("train takes settings, or the values of their fields, not both")
    return training.train(settings, sink=sink)
