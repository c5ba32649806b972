"""The torch engine: encoder-decoders and decoders from a Hugging Face directory, with PEFT adapters.

For what llama.cpp has no graph for (BART, mBART, bert2BERT) and for a look inside. Replies, sampling and beam search
are those of the llama.cpp engines; this evaluates, one cache of keys and values a reply. It keeps no cache between
replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.beam import BeamSettings, log_softmax
from edgetune.engine.beam_generation import BeamGeneration
from edgetune.engine.choices import as_candidates
from edgetune.engine.constraints import Constraints
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.in_step import run_in_batches
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.torch.adapters import AdapterSet, PeftAdapters, in_int8
from edgetune.engine.torch.group import PADDED, Group, Text
from edgetune.engine.torch.loading import (
    Dtype,
    choose_device,
    load_checkpoint,
    load_vocabulary,
    require_torch,
)
from edgetune.engine.torch.own_settings import OwnSettings
from edgetune.errors import CorruptFileError, UsageError
from edgetune.languages import find_language

_DEFAULT_CONTEXT = 2048
_MOST_ROWS, _MOST_TOKENS = 64, 4096
"""Of a batch: texts, counting each beam, and tokens of the sources."""


class TorchEngine:
    """A loaded model; see `protocol.Engine`. Of an encoder-decoder, the prompt of a reply is the source."""

    def __init__(self, path: Path, model: Any, *, dtype: Dtype, ctx_size: int) -> None:
        """Take over `model`, loaded from `path`; use `open`."""
        self.path, self._dtype = path, dtype
        self._peft: PeftAdapters | None = PeftAdapters(model)
        self._adapters: tuple[LoraSpec, ...] = ()
        self._active: AdapterSet = ()
        self._current: Text | None = None
        self._rows: list[NDArray[np.float32]] = []
        self.own = OwnSettings(path, model)
        """What the model says of itself."""
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        """Tokens that logits are about."""
        self.tokenizer = load_vocabulary(path, self.own.config, eog_ids=self.own.eog_ids)
        """The model's vocabulary."""
        trained = self.own.positions or _DEFAULT_CONTEXT
        if self.own.is_bounded and ctx_size > trained:
            raise UsageError(f"The model has positions for {trained} tokens, not {ctx_size}.")
        self.context_size = ctx_size or trained
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
        self._peft = self._current = None
        self._rows = []

    @property
    def model(self) -> Any:
        """The torch module, adapters included, as the next evaluation uses it."""
        peft = self._open_peft()
        peft.apply(self._active)
        return peft.model

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
        state = self._open_peft().model.state_dict()
        weights = sum(tensor.nbytes for tensor in state.values() if hasattr(tensor, "nbytes"))
        return EngineMemory(weights=int(weights), context=0, per_token=0)

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
        self._open_peft()
        text = self._begin(ids, prefix, max_tokens, language, adapters)
        if beams and beams.num_beams > 1:
            if prefix:
                raise UsageError("A beam search cannot go on from the beginning of a reply.")
            text.rows = beams.num_beams
            return BeamGeneration(self, ids, beams, slot=text, max_new=text.max_new, stop=stop)
        generation = LlamaGeneration(
            cast(Any, self),
            self._sampler(sampling, [*text.start, *prefix]),
            list(ids),
            adapters=cast(Any, text.adapters),
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
        )
        generation.slot = cast(Any, text)
        return generation

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies: (which one, text). Those of an encoder-decoder share batches where that is exact."""
        replies = cast("list[LlamaGeneration | BeamGeneration]", list(generations))
        return run_in_batches(
            replies,
            alike=self._kind,
            limits=lambda shared: (_MOST_TOKENS, self._most_replies(shared)),
            pads=True,
            evaluate=self._evaluate_together,
        )

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if not self._rows or self._current is None:
            return ()
        sampler = self._sampler(sampling, self._current.ids)
        try:
            seen = sampler.peek_at(self._rows[-1], top)
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
        source, start = (ids, target_ids) if self.own.is_encoder_decoder else ((), ids)
        text = Text(list(source), list(start), self._active, Constraints(), 0)
        return np.asarray(self._forward([text], [list(start)])[0])

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what these replies wait for."""
        texts = [cast(Text, one.slot) for one in generations]
        tokens = [
            # The first time it is the prompt, which is the source here, and what the reply begins with.
            [*text.start, *one.pending[len(text.source) :]] if text.source and not text.ids else one.pending
            for one, text in zip(generations, texts, strict=True)
        ]
        logits = self._forward(texts, tokens)[:, -1]
        self._check_output(logits)
        ends = self.tokenizer.eog_ids
        self._rows = [
            text.constraints.apply(
                row, text.ids[len(text.start) :], start=text.start, end_ids=ends, max_new=text.max_new
            )
            for text, row in zip(texts, logits, strict=True)
        ]
        for number, one in enumerate(generations):
            one.row = number

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after output `row` of the last evaluation, and with `top` what from."""
        return sampler.sample_from(self._rows[row], top)

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a reply whose prompt and text so far are `history`; of a source, penalties see nothing."""
        if self.own.is_encoder_decoder and self._current:
            history = [*self._current.start, *history[len(self._current.source) :]]
        return self._sampler(sampling, history)

    def release(self, slot: Any) -> None:
        """The reply has ended; what it took is freed."""
        slot.group = None

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the text can have no further token."""
        return self.cached_tokens + 1 >= self.context_size

    def evaluate_beams(self, generations: Sequence[BeamGeneration]) -> None:
        """Evaluate what these searches wait for."""
        texts = [cast(Text, one.slot) for one in generations]
        if texts[0].group is None:
            tokens = [text.start for text in texts for _ in range(text.rows)]
        else:
            firsts = np.cumsum([0, *(text.rows for text in texts)])
            parents = [
                int(first) + parent for one, first in zip(generations, firsts, strict=False) for parent in one.parents
            ]
            self._group_of(texts).reorder(parents)
            tokens = [[token] for one in generations for token in one.tokens]
        logits = self._forward(texts, tokens)[:, -1]
        self._check_output(logits)
        first = 0
        for one, text in zip(generations, texts, strict=True):
            one.logits = logits[first : first + (text.rows if one.parents else 1)]
            first += text.rows

    def log_probs(self, generation: BeamGeneration, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Log-probabilities under the model's own demands on each of `texts`."""
        text = cast(Text, generation.slot)
        assert generation.logits is not None
        scores = log_softmax(generation.logits)
        if text.constraints.demands_nothing:
            return scores
        demand, ends = text.constraints, self.tokenizer.eog_ids
        rows = zip(scores, texts, strict=False)  # before the first token all beams are one
        return np.stack(
            [demand.apply(row, said, start=text.start, end_ids=ends, max_new=text.max_new) for row, said in rows]
        )

    def _begin(
        self,
        ids: Sequence[int],
        prefix: Sequence[int],
        max_tokens: int,
        language: str,
        adapters: Sequence[LoraSpec] | None,
    ) -> Text:
        active = self._active if adapters is None else self._load_adapters(adapters)
        constraints = self.own.constraints
        start = list(ids)
        if self.own.is_encoder_decoder:
            start = [self.own.start_id]
            if language:
                code, is_forced = self._language(language)
                start, constraints = (
                    (start, replace(constraints, forced_bos=code)) if is_forced else ([code], constraints)
                )
        self._check_prompt(ids, room_for=1 + len(prefix) + (1 if self.own.is_encoder_decoder else len(ids)))
        room = self.context_size - len(start) - len(prefix)
        max_new = room if max_tokens < 0 else min(room, max_tokens)
        source = list(ids) if self.own.is_encoder_decoder else []
        return Text(source, start, active, constraints, max_new)

    def _language(self, wanted: str) -> tuple[int, bool]:
        """The code of a target language, and whether it is the first token of the text, after the start token."""
        codes = {} if isinstance(self.tokenizer, CharTokenizer) else self.tokenizer.languages
        code = codes[find_language(wanted, codes)]
        assert not isinstance(self.tokenizer, CharTokenizer)
        return code, bool(self.tokenizer.marks_language_before)

    def _kind(self, reply: LlamaGeneration | BeamGeneration) -> tuple[AdapterSet, int, int]:
        """What replies in one batch have in common: adapters, beams, and the length of what they begin with."""
        text = cast(Text, reply.slot)
        begin = 0 if isinstance(reply, BeamGeneration) else len(reply.pending) - len(text.source)
        return text.adapters, text.rows, begin

    def _most_replies(self, alike: Sequence[LlamaGeneration | BeamGeneration]) -> int:
        """How many replies may be in one batch, each then what it would be alone."""
        # int8 rounds activations by the largest one in the batch.
        is_exact = self.own.is_encoder_decoder and self.own.model_type in PADDED and self._dtype != "int8"
        return max(1, _MOST_ROWS // cast(Text, alike[0].slot).rows) if is_exact else 1

    def _evaluate_together(self, replies: Sequence[LlamaGeneration | BeamGeneration]) -> None:
        searches = [one for one in replies if isinstance(one, BeamGeneration)]
        if searches:
            self.evaluate_beams(searches)
        if others := [one for one in replies if isinstance(one, LlamaGeneration)]:
            self.evaluate(others)

    def _forward(self, texts: Sequence[Text], tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Evaluate more tokens of every row of `texts`; logits after each, (rows, tokens, vocabulary)."""
        self._open_peft().apply(texts[0].adapters)
        logits = self._group_of(texts).forward(tokens)
        self._current = texts[-1]
        return logits

    def _group_of(self, texts: Sequence[Text]) -> Group:
        """The group that `texts` are in, without the others of it; a new one at the first evaluation."""
        group = texts[0].group
        if group is not None:
            return group.narrowed(texts)
        return Group(self._open_peft().model, texts, pad_id=self.own.pad_id)

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
        peft = self._open_peft()
        if self._dtype == "int8":
            self._peft = peft = in_int8(self.path, peft, adapters)
        return peft.load(adapters)

    def _open_peft(self) -> PeftAdapters:
        if self._peft is None:
            raise UsageError(f"{self.path} was closed.", hint="Open it again.")
        return self._peft

    def _check_prompt(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if max(len(ids), room_for) > self.context_size:
            raise UsageError(
                f"The text has {len(ids)} tokens, the context {self.context_size}.", hint="Shorten the text."
            )
        rows = int(self._open_peft().model.get_input_embeddings().weight.shape[0])
        if wrong := [token for token in ids if not 0 <= token < rows]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {rows}.")

    def _check_output(self, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits.max()):
            raise CorruptFileError(
                f"{self.path} answers with what is no number, with {len(self._active)} adapters on it.",
                hint="Is one of the files damaged? Try --dtype f32.",
            )
