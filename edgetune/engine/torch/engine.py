"""The torch engine: encoder-decoders and decoders from a Hugging Face directory, with PEFT adapters.

For what llama.cpp has no graph for (BART, mBART, bert2BERT) and for a look inside. Replies, sampling and beam search
are those of the llama.cpp engines; this evaluates, one cache of keys and values a reply. It keeps no cache between
replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.beam import BeamSettings, log_softmax
from edgetune.engine.beam_generation import BeamGeneration
from edgetune.engine.choices import as_candidates
from edgetune.engine.constraints import Constraints, not_honoured
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.torch.adapters import AdapterSet, PeftAdapters
from edgetune.engine.torch.loading import (
    Dtype,
    choose_device,
    load_checkpoint,
    load_vocabulary,
    quantize_int8,
    require_torch,
)
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError
from edgetune.languages import find_language

_DEFAULT_CONTEXT = 2048
_SIZES = ("max_position_embeddings", "n_positions", "max_source_positions")


@dataclass(eq=False)
class _Sequence:
    """One text, or several beams of it, in the engine."""

    source: list[int]
    """Of an encoder-decoder, what is encoded; of a decoder, nothing."""
    start: list[int]
    """What the decoder begins with: the start token, or the prompt."""
    adapters: AdapterSet
    constraints: Constraints
    max_new: int
    ids: list[int] = field(default_factory=list)
    """The decoder's tokens that were evaluated."""
    encoded: Any = None
    cache: Any = None


class TorchEngine:
    """A loaded model; see `protocol.Engine`. Of an encoder-decoder, the prompt of a reply is the source."""

    def __init__(self, path: Path, model: Any, *, dtype: Dtype, ctx_size: int) -> None:
        """Take over `model`, loaded from `path`; use `open`."""
        self.path, self._dtype = path, dtype
        self._peft = PeftAdapters(model)
        self._model: Any = model
        self._adapters: tuple[LoraSpec, ...] = ()
        self._active: AdapterSet = ()
        self._is_quantized = False
        self._current: _Sequence | None = None
        self._logits: NDArray[np.float32] | None = None
        self._config: dict[str, Any] = model.config.to_dict()
        self.generation_config: dict[str, Any] = model.generation_config.to_dict()
        """The model's own settings for what it generates."""
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        """Whether it answers a source, and does not continue a prompt."""
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        """Tokens that logits are about."""
        eog_ids = frozenset(_ids(self.generation_config.get("eos_token_id")) or _ids(self._config.get("eos_token_id")))
        self.tokenizer: JsonTokenizer | CharTokenizer = load_vocabulary(path, self._config, eog_ids=eog_ids)
        """The model's vocabulary."""
        self.trained_context = _trained_context(model.config) or _DEFAULT_CONTEXT
        """The longest text the model was made for, in tokens."""
        bounded = not _has_relative_positions(self._config)
        if bounded and ctx_size > self.trained_context:
            raise UsageError(f"The model has positions for {self.trained_context} tokens, not {ctx_size}.")
        self.context_size = ctx_size or self.trained_context
        """How many tokens a text may have: prompt and reply together, or source and target each."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        dtype: Dtype = "auto",
        device: str = "auto",
        ctx_size: int = 0,
        threads: int = 0,
        lora: Sequence[LoraSpec] = (),
    ) -> TorchEngine:
        """Load the Hugging Face directory `path` and the PEFT directories `lora`.

        `dtype` "int8" keeps the linear layers' weights in 8 bits; `threads` 0 is torch's own choice. Raises
        `UnsupportedError`, `CorruptFileError`, `ResourceError`, `MismatchError`.
        """
        require_torch()
        import torch

        if threads:
            torch.set_num_threads(threads)
        device = choose_device(device)
        engine = cls(path, load_checkpoint(path, dtype=dtype, device=device), dtype=dtype, ctx_size=ctx_size)
        engine.set_adapters(lora)
        return engine

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model = self._current = self._logits = None
        self._peft = PeftAdapters(None)

    @property
    def model(self) -> Any:
        """The torch module, adapters included, as the next evaluation uses it."""
        self._check_open()
        self._peft.apply(self._active)
        return self._model

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """The adapters applied now."""
        return self._adapters

    @property
    def cached_tokens(self) -> int:
        """How many tokens the text evaluated last has."""
        return len(self._current.ids) if self._current else 0

    @property
    def memory(self) -> EngineMemory:
        """What the model takes; keys and values are allocated as they come."""
        self._check_open()
        weights = sum(tensor.nbytes for tensor in self._model.state_dict().values() if hasattr(tensor, "nbytes"))
        return EngineMemory(weights=int(weights), context=0, per_token=0)

    @property
    def model_type(self) -> str:
        """The family as config.json names it, e.g. "bart"."""
        return str(self._config.get("model_type", ""))

    @property
    def own_limit(self) -> int:
        """How many new tokens the model's settings allow; -1 where they say nothing."""
        config = self.generation_config
        if isinstance(new := config.get("max_new_tokens"), int):
            return new
        whole = config.get("max_length")
        # 20 is what transformers writes where nobody chose a length.
        return whole - 1 if isinstance(whole, int) and whole > 1 and whole != 20 and self.is_encoder_decoder else -1

    @property
    def ignored_settings(self) -> list[str]:
        """Names of generation settings that the model asks for and that are not followed here."""
        return not_honoured(self.generation_config)

    @property
    def own_beams(self) -> BeamSettings:
        """The beam search that the model asks for by itself."""
        config = self.generation_config
        return BeamSettings(
            num_beams=int(config.get("num_beams") or 1),
            length_penalty=1.0 if config.get("length_penalty") is None else float(config["length_penalty"]),
            early_stopping=config.get("early_stopping") or False,
        )

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off.

        Raises `MismatchError` or `UnsupportedError` for one that does not fit the model; the set then stays as it was.
        """
        self._active, self._adapters = self._load_adapters(adapters), tuple(adapters)

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
        language: str = "",
    ) -> Generation:
        """Answer the source, or continue the prompt, `ids`; see `protocol.Engine`.

        With `beams` by beam search, which samples nothing. `language` is the target language, for models with several.
        """
        self._check_open()
        sequence = self._begin(ids, prefix, max_tokens, language, adapters)
        if beams and beams.num_beams > 1:
            if prefix:
                raise UsageError("A beam search cannot go on from the beginning of a reply.")
            return BeamGeneration(self, ids, beams, adapters=sequence, max_new=sequence.max_new, stop=stop)
        generation = LlamaGeneration(
            cast(Any, self),
            self._sampler(sampling, [*sequence.start, *prefix]),
            list(ids),
            adapters=cast(Any, sequence.adapters),
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
        )
        generation.slot = cast(Any, sequence)
        return generation

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies in turns: (which one, text)."""
        running = dict(enumerate(generations))
        while running:
            for number, generation in list(running.items()):
                try:
                    yield number, next(generation)
                except StopIteration:
                    del running[number]

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if self._logits is None or self._current is None:
            return ()
        sampler = self._sampler(sampling, self._current.ids)
        try:
            seen = sampler.peek_at(self._logits, top)
        finally:
            sampler.close()
        return as_candidates(seen, self.tokenizer.piece) if seen else ()

    def save_state(self, path: Path) -> None:
        """Nothing is kept between replies. Raises `UsageError`."""
        raise UsageError("A model in torch keeps no state between texts.")

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Nothing is taken up: 0."""
        return 0

    def logits(self, ids: Sequence[int], target_ids: Sequence[int] = ()) -> NDArray[np.float32]:
        """Logits after each of a decoder's `ids`, or after each of `target_ids` with `ids` as the source."""
        source, start = (ids, target_ids) if self.is_encoder_decoder else ((), ids)
        sequence = _Sequence(list(source), list(start), self._active, Constraints(), 0)
        return np.asarray(self._forward(sequence, [list(start)])[0])

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what this reply, the only one, waits for."""
        (one,) = generations
        sequence = cast(_Sequence, one.slot)
        pending = one.pending
        if not sequence.ids and self.is_encoder_decoder:
            # The first time it is the prompt, which is the source here, and what the reply begins with.
            pending = [*sequence.start, *pending[len(sequence.source) :]]
        logits = self._forward(sequence, [pending])[0, -1]
        text = sequence.ids[len(sequence.start) :]
        self._logits = sequence.constraints.apply(
            logits, text, start=sequence.start, end_ids=self.tokenizer.eog_ids, max_new=sequence.max_new
        )
        self._check_output(logits)

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after the last evaluation, and with `top` what from."""
        assert self._logits is not None
        return sampler.sample_from(self._logits, top)

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a reply whose prompt and text so far are `history`; of a source, penalties see nothing."""
        if self.is_encoder_decoder and self._current:
            history = [*self._current.start, *history[len(self._current.source) :]]
        return self._sampler(sampling, history)

    def release(self, slot: Any) -> None:
        """The reply has ended; what it took is freed."""
        slot.cache = slot.encoded = None

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the text can have no further token."""
        return self.cached_tokens + 1 >= self.context_size

    def begin_beams(self, source: Sequence[int], beams: int, adapters: _Sequence) -> NDArray[np.float32]:
        """Evaluate what every beam begins with; logits of the first token, (1, vocabulary)."""
        return self._forward(adapters, [adapters.start] * beams)[:1, -1]

    def advance_beams(self, parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Take every beam one token further; logits of the next, (beams, vocabulary)."""
        import torch

        sequence = self._current
        assert sequence is not None
        sequence.cache.reorder_cache(torch.tensor(list(parents), device=self._model.device))
        return self._forward(sequence, [[token] for token in tokens])[:, -1]

    def log_probs(
        self, logits: NDArray[np.float32], texts: Sequence[Sequence[int]], *, max_new: int
    ) -> NDArray[np.float32]:
        """Log-probabilities under the model's own demands on each of `texts`."""
        sequence = self._current
        assert sequence is not None
        scores = log_softmax(logits)
        if sequence.constraints.demands_nothing:
            return scores
        demand, ends = sequence.constraints, self.tokenizer.eog_ids
        rows = zip(scores, texts, strict=True)
        return np.stack(
            [demand.apply(row, text, start=sequence.start, end_ids=ends, max_new=max_new) for row, text in rows]
        )

    def _begin(
        self,
        ids: Sequence[int],
        prefix: Sequence[int],
        max_tokens: int,
        language: str,
        adapters: Sequence[LoraSpec] | None,
    ) -> _Sequence:
        active = self._active if adapters is None else self._load_adapters(adapters)
        constraints = Constraints.from_config(self.generation_config)
        start = list(ids)
        if self.is_encoder_decoder:
            start = [self._start_id()]
            if language:
                code, is_forced = self._language(language)
                start, constraints = (
                    (start, replace(constraints, forced_bos=code)) if is_forced else ([code], constraints)
                )
        self._check_prompt(ids, room_for=1 + len(prefix) + (1 if self.is_encoder_decoder else len(ids)))
        room = self.context_size - len(start) - len(prefix)
        max_new = room if max_tokens < 0 else min(room, max_tokens)
        source = list(ids) if self.is_encoder_decoder else []
        return _Sequence(source, start, active, constraints, max_new)

    def _language(self, wanted: str) -> tuple[int, bool]:
        """The code of a target language, and whether it is the first token of the text, after the start token."""
        codes = self.tokenizer.languages if isinstance(self.tokenizer, JsonTokenizer) else {}
        code = codes[find_language(wanted, codes)]
        assert isinstance(self.tokenizer, JsonTokenizer)
        return code, bool(self.tokenizer.marks_language_before)

    def _start_id(self) -> int:
        for values in (self.generation_config, self._config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if isinstance(found := values.get(name), int):
                    return found
        raise UnsupportedError(
            f"{self.path} does not say with which token its decoder starts.",
            hint="Set decoder_start_token_id in its generation_config.json.",
        )

    def _forward(self, sequence: _Sequence, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Evaluate more tokens of every row; logits after each, (rows, tokens, vocabulary)."""
        import torch

        self._check_open()
        self._peft.apply(sequence.adapters)
        device = self._model.device
        tokens = torch.tensor([list(row) for row in rows], device=device)
        with torch.inference_mode():
            if not self.is_encoder_decoder:
                output = self._model(input_ids=tokens, past_key_values=sequence.cache, use_cache=True)
            else:
                if sequence.encoded is None:
                    sequence.encoded = self._encode(sequence.source, len(rows))
                encoded, mask = sequence.encoded
                output = self._model(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=tokens,
                    past_key_values=sequence.cache,
                    use_cache=True,
                )
            logits: NDArray[np.float32] = output.logits.float().cpu().numpy()
        sequence.cache = output.past_key_values
        sequence.ids += rows[0]
        self._current = sequence
        return logits

    def _encode(self, source: Sequence[int], rows: int) -> tuple[Any, Any]:
        """The encoder's output for `source`, for so many rows, and its mask."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        ids = torch.tensor([list(source)], device=self._model.device)
        mask = torch.ones_like(ids)
        states = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=states.expand(rows, -1, -1)), mask.expand(rows, -1)

    def _sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        return Sampler(
            None,
            sampling,
            context_size=self.context_size,
            eog_ids=self.tokenizer.eog_ids,
            prompt=history,
            vocab_size=self.n_vocab,
        )

    def _load_adapters(self, adapters: Sequence[LoraSpec]) -> AdapterSet:
        self._check_open()
        if self._dtype == "int8":
            self._make_int8([one.path.resolve() for one in adapters if one.scale])
        active = self._peft.load(adapters)
        self._model = self._peft.model
        return active

    def _make_int8(self, wanted: Sequence[Path]) -> None:
        """Quantize the model with these adapters on it; PEFT cannot put one on layers that are quantized already."""
        new = [path for path in wanted if path not in self._peft.known]
        if self._is_quantized and not new:
            return
        model = load_checkpoint(self.path, dtype="int8", device="cpu") if self._is_quantized else self._model
        peft = PeftAdapters(model)
        for path in (*self._peft.known, *new):
            peft.load([LoraSpec(path)])
        peft.model = quantize_int8(peft.model)
        self._peft, self._is_quantized = peft, True

    def _check_open(self) -> None:
        if self._model is None:
            raise UsageError(f"{self.path} was closed.", hint="Open it again.")

    def _check_prompt(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if max(len(ids), room_for) > self.context_size:
            raise UsageError(
                f"The text has {len(ids)} tokens, the context {self.context_size}.", hint="Shorten the text."
            )
        rows = int(self._model.get_input_embeddings().weight.shape[0])
        if wrong := [token for token in ids if not 0 <= token < rows]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {rows}.")

    def _check_output(self, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits.max()):
            raise CorruptFileError(
                f"{self.path} answers with what is no number, with {len(self._active)} adapters on it.",
                hint="Is one of the files damaged? Try --dtype f32.",
            )


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(int(token) for token in value) if isinstance(value, list | tuple) else ()


def _has_relative_positions(config: dict[str, Any]) -> bool:
    return "relative_attention_num_buckets" in config


def _trained_context(config: Any) -> int | None:
    """The positions a model has; of an encoder and a decoder with vocabularies of their own, the fewer."""
    parts = [part for part in (getattr(config, "encoder", None), getattr(config, "decoder", None)) if part] or [config]
    found = [next((int(size) for key in _SIZES if (size := getattr(part, key, None))), 0) for part in parts]
    return min((size for size in found if size), default=None)
