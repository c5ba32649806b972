"""Encoder-decoders (T5) through llama.cpp: the source is encoded once, the target decoded token by token or in beams.

Replies are `generation`'s and `beam_generation`'s, adapters `adapters`', so that this is no more than another way to
evaluate, in a `Seq2SeqContext`. A reply that goes on after another's turn is evaluated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.backends import list_devices
from edgetune.engine.beam import BeamSettings, log_softmax
from edgetune.engine.beam_generation import BeamGeneration
from edgetune.engine.choices import as_candidates
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.in_step import run_in_batches
from edgetune.engine.json_tokenizer import JSON_KEY, JsonTokenizer
from edgetune.engine.loading import CacheType, gpu_layers_for, load_model
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.seq2seq_context import Seq2SeqContext
from edgetune.engine.seq2seq_targets import Target
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header
from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, LongArray, read_gguf_header
from edgetune.hardware import available_memory

SEQ2SEQ_ARCHITECTURES = ("t5",)
"""`general.architecture` of the GGUF files that this engine runs."""
_DEFAULT_CONTEXT = 512
_SMALLEST_BATCH = 64
_MOST_ROWS, _MOST_TOKENS, _MOST_LOGITS = 16, 512, 1 << 24
"""Of what is evaluated at once: replies, counting each beam (16 measured best on a CPU), tokens of their sources, and
tokens times vocabulary."""
_SHARE_OF_MEMORY = 0.25
"""Of the free memory, what the keys and values of replies in one batch may take."""


class Seq2SeqEngine:
    """A loaded encoder-decoder; see `protocol.Engine`. The prompt of a reply is the source."""

    def __init__(self, header: GgufHeader, model: Any, *, context_size: int, options: dict[str, Any]) -> None:
        """Take over `model`; use `open`. `options` are `open_context`'s."""
        self._header, self._model = header, model
        self._vocab = lib.llama_model_get_vocab(model)
        self._lora = LoadedAdapters(model, header)
        self._context = Seq2SeqContext(model, header, self._lora, options)
        self._adapters: tuple[LoraSpec, ...] = ()
        self._adapter_key: AdapterKey = ()
        self._current: Target | None = None
        self._row: int | None = None
        self.n_vocab = self._context.n_vocab
        """Tokens that logits are about."""
        self.context_size = context_size
        """How many tokens a source may have, and how many a target, the start token included."""
        self.start_id = _start_token(model, header)
        """What the decoder begins with."""
        self.tokenizer: JsonTokenizer | GgufTokenizer = _tokenizer(self._vocab, header)
        """The model's vocabulary."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        ctx_size: int = 0,
        gpu_layers: int = -1,
        threads: int = 0,
        cache_type_k: CacheType = "f32",
        cache_type_v: CacheType = "f32",
        lora: Sequence[LoraSpec] = (),
        tap: Tap | None = None,
        verbose: bool = False,
    ) -> Seq2SeqEngine:
        """Load the GGUF model at `path`; `ctx_size` 0 is the length it was trained on. See `LlamaEngine.open`."""
        header = load_header(path)
        check_is_model(header)
        native.start(verbose=verbose)
        gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
        gpu_layers = gpu_layers_for(header, gpu_layers, 0, gpus)
        model = load_model(path, header, gpu_layers=gpu_layers, has_encoder=True)
        # Flash attention rounds T5's keys and values, which know no bounds, to 16 bits.
        options = {
            "threads": threads, "cache_type_k": cache_type_k, "cache_type_v": cache_type_v, "flash_attn": "off",
            "eval_callback": tap.callback if tap else None,
        }  # fmt: skip
        try:
            context_size = ctx_size or header.number("context_length") or _DEFAULT_CONTEXT
            engine = cls(header, model, context_size=context_size, options=options)
            engine.set_adapters(lora)
        except BaseException:
            lib.llama_model_free(model)
            raise
        return engine

    def __enter__(self) -> Seq2SeqEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, its context and its adapters."""
        self._context.close()
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._header.path

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """The adapters applied now."""
        return self._adapters

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the last target are in the cache."""
        return len(self._current.ids) if self._current else 0

    @property
    def memory(self) -> EngineMemory:
        """What the model takes; the context is as large as the replies so far needed."""
        self._check_open()
        context = self._context
        weights = int(lib.llama_model_size(self._model))
        return EngineMemory(weights=weights, context=context.nbytes, per_token=context.bytes_per_token)

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off."""
        self._check_open()
        self._adapter_key, self._adapters = self._lora.load(adapters), tuple(adapters)

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        prefix: Sequence[int] = (),
        top: int = 0,
        adapters: Sequence[LoraSpec] | None = None,
        shift: bool = False,
        beams: BeamSettings | None = None,
    ) -> Generation:
        """Answer the source `ids`; see `protocol.Engine`. With `beams` by beam search, which samples nothing."""
        self._check_open()
        self._check_source(ids, room_for=len(prefix) + 2)
        key = self._adapter_key if adapters is None else self._lora.load(adapters)
        if beams and beams.num_beams > 1:
            if prefix:
                raise UsageError("A beam search cannot go on from the beginning of a reply.")
            limit = self.context_size - 1
            new = min(limit, max_tokens) if max_tokens >= 0 else limit
            slot = Target(list(ids), key, new + 1, beams.num_beams)
            return BeamGeneration(self, ids, beams, slot=slot, max_new=new, stop=stop)
        room = len(prefix) + 2 + max_tokens if max_tokens >= 0 else self.context_size
        target = Target(list(ids), key, min(room, self.context_size))
        generation = LlamaGeneration(
            cast(Any, self),
            Sampler(
                self._vocab,
                sampling,
                context_size=self.context_size,
                eog_ids=self.tokenizer.eog_ids,
                prompt=[self.start_id, *prefix],
            ),
            list(ids),
            adapters=key,
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
        )
        generation.slot = cast(Any, target)
        return generation

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies: (which one, text). Under the same adapters they share batches."""
        replies = cast("list[LlamaGeneration | BeamGeneration]", list(generations))
        return run_in_batches(
            replies,
            alike=lambda one: (cast(Target, one.slot).adapters, cast(Target, one.slot).beams),
            limits=self._batch_limits,
            pads=False,
            evaluate=self._evaluate_together,
        )

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if self._row is None or self._current is None or self._current not in self._context.members:
            return ()
        sampler = self.build_sampler(sampling, self._current.ids)
        try:
            seen = sampler.peek(self._context.raw, self._row, top)
        finally:
            sampler.close()
        return as_candidates(seen, self.tokenizer.piece) if seen else ()

    def save_state(self, path: Path) -> None:
        """There is nothing that a later source could go on from. Raises `UsageError`."""
        raise UsageError("An encoder-decoder keeps no state between texts.")

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Nothing is taken up: 0."""
        return 0

    def logits(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `target_ids`, which begin with the start token; shape (target tokens, vocabulary)."""
        self._check_open()
        self._check_source(source_ids, room_for=len(target_ids))
        target = Target(list(source_ids), self._adapter_key, len(target_ids))
        self._context.encode([target], batch=len(target_ids))
        self._context.decode([(0, 0, target_ids)], every_output=True)
        return self._context.read_logits(len(target_ids))

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what these replies wait for."""
        targets = [cast(Target, one.slot) for one in generations]
        pending = [one.pending for one in generations]
        if any(target not in self._context.members for target in targets):
            pending = [
                # The first time a reply's `pending` is its prompt, which is the source here, and what it begins with.
                [*target.ids, *ids] if target.ids else [self.start_id, *ids[len(target.source) :]]
                for target, ids in zip(targets, pending, strict=True)
            ]
            self._context.encode(
                targets,
                batch=sum(map(len, pending)),
                is_cancelled=lambda: all(one.is_cancelled for one in generations),
            )
            # Stopped in the middle; the replies themselves find out that they were cancelled.
            if not self._context.members:
                return
            for target in targets:
                target.ids = []
        rows = self._context.decode(
            [(target.first, len(target.ids), ids) for target, ids in zip(targets, pending, strict=True)]
        )
        for one, target, ids, row in zip(generations, targets, pending, rows, strict=True):
            target.ids += ids
            one.row = row
            self._context.check_output(row)
        self._current, self._row = targets[-1], rows[-1]

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after output `row`, and with `top` what from."""
        if not top:
            return sampler.sample(self._context.raw, row), None
        seen = sampler.sample_seen(self._context.raw, row, top)
        return (seen.token if seen else None), seen

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a reply whose source and text so far are `history`; penalties look at the reply alone."""
        source = self._current.source if self._current else []
        if list(history[: len(source)]) == source:
            history = history[len(source) :]
        return Sampler(
            self._vocab,
            sampling,
            context_size=self.context_size,
            eog_ids=self.tokenizer.eog_ids,
            prompt=[self.start_id, *history],
        )

    def release(self, slot: Any) -> None:
        """The reply has ended; what it left is replaced by the next one."""

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the target can have no further token."""
        return self.cached_tokens + 1 >= self.context_size

    def evaluate_beams(self, generations: Sequence[BeamGeneration]) -> None:
        """Evaluate what these searches wait for."""
        targets = [cast(Target, one.slot) for one in generations]
        if any(target not in self._context.members for target in targets):
            if any(target.ids for target in targets):
                raise UsageError("Another text was answered meanwhile; a beam search cannot go on after that.")
            self._context.encode(targets, batch=sum(target.beams for target in targets))
            parts = [(target.first, 0, [self.start_id]) for target in targets]
        else:
            parts = []
            for one, target in zip(generations, targets, strict=True):
                self._context.copy_beams(target, one.parents)
                at = target.first + target.side * target.beams
                parts += [(at + beam, len(target.ids), [token]) for beam, token in enumerate(one.tokens)]
        rows = self._context.decode(parts)
        logits, first = self._context.read_logits(len(parts)), 0
        for one, target in zip(generations, targets, strict=True):
            count = len(one.tokens) or 1
            one.logits = logits[first : first + count]
            self._context.check_output(rows[first])
            target.ids.append(one.tokens[0] if one.tokens else self.start_id)
            first += count
        self._current, self._row = targets[-1], None

    def log_probs(self, generation: BeamGeneration, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As they are: a GGUF file demands nothing of its texts."""
        assert generation.logits is not None
        values: NDArray[np.float32] = log_softmax(generation.logits)
        return values

    def _evaluate_together(self, replies: Sequence[LlamaGeneration | BeamGeneration]) -> None:
        if searches := [one for one in replies if isinstance(one, BeamGeneration)]:
            self.evaluate_beams(searches)
        else:
            self.evaluate([one for one in replies if isinstance(one, LlamaGeneration)])

    def _batch_limits(self, alike: Sequence[LlamaGeneration | BeamGeneration]) -> tuple[int, int]:
        """Tokens of the sources, and replies, that are best evaluated at once."""
        largest = max((cast(Target, one.slot) for one in alike), key=lambda target: target.width * target.room)
        cells = largest.room * max(1, largest.beams) * self._context.bytes_per_token
        by_memory = int(available_memory() * _SHARE_OF_MEMORY // cells)
        most = max(1, min(_MOST_ROWS // max(1, largest.beams), by_memory))
        return max(_SMALLEST_BATCH, min(_MOST_TOKENS, _MOST_LOGITS // self.n_vocab)), most

    def _check_open(self) -> None:
        if self._model is None:
            raise UsageError(f"{self.path} was closed.", hint="Open it again.")

    def _check_source(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if max(len(ids), room_for) > self.context_size:
            raise UsageError(
                f"The text has {max(len(ids), room_for)} tokens, the context {self.context_size}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        if wrong := [token for token in ids if not 0 <= token < self.n_vocab]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {self.n_vocab}.")


def _tokenizer(vocab: Any, header: GgufHeader) -> JsonTokenizer | GgufTokenizer:
    """Hugging Face's own where the file carries it, else llama.cpp's."""
    own = GgufTokenizer(vocab, header)
    source = header.metadata.get(JSON_KEY)
    if isinstance(source, LongArray):
        source = read_gguf_header(header.path, arrays=True).metadata.get(JSON_KEY)
    return JsonTokenizer(str(source), eog_ids=own.eog_ids) if source else own


def _start_token(model: Any, header: GgufHeader) -> int:
    found = int(lib.llama_model_decoder_start_token(model))
    if found < 0:
        recorded = header.metadata.get("tokenizer.ggml.padding_token_id")
        if not isinstance(recorded, int):
            raise UnsupportedError(f"{header.path} does not say with which token its decoder starts.")
        found = recorded
    return found
