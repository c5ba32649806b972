"""The llama.cpp engine: one copy of the weights, one context, several sequences, on the low-level bindings.

It keeps the weights mapped with adapters and evaluates only what the KV cache does not hold yet. Which entries those
are is the cache's knowledge, evaluating them the evaluator's, choosing tokens the sampler's; text, stop strings and
timings are `generation`'s; how several replies share the context is `together`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.cache import Slot, adapters_of
from edgetune.engine.choices import as_candidates
from edgetune.engine.draft import DraftModel, open_draft
from edgetune.engine.evaluator import Evaluator
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.interrupt import interruptible
from edgetune.engine.loading import LOGIT_ROWS, CacheType, FlashAttention
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.opened import OpenedModel
from edgetune.engine.protocol import Candidate, EngineMemory, Generation, LoraSpec
from edgetune.engine.sampler import Sampler, Seen
from edgetune.engine.sampling import Sampling
from edgetune.engine.speculation import NgramDrafter, Speculation
from edgetune.engine.state_file import read_state_file, write_state_file
from edgetune.engine.tap import Tap
from edgetune.engine.together import run_together
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import UsageError


class LlamaEngine:
    """A loaded model; see `protocol.Engine`."""

    def __init__(self, opened: OpenedModel) -> None:
        """Take over `opened`; use `open`."""
        self._opened = opened
        self._vocab = lib.llama_model_get_vocab(opened.model)
        self._lora = LoadedAdapters(opened.model, opened.header)
        self._adapters: tuple[LoraSpec, ...] = ()
        self._adapter_key: AdapterKey = ()
        self._draft: DraftModel | None = None
        self._draft_ngrams = False
        self.tokenizer = GgufTokenizer(self._vocab, opened.header)
        """The model's vocabulary."""
        self._evaluator = Evaluator(opened, n_vocab=self.tokenizer.n_vocab)
        self.cache, self.costs = self._evaluator.cache, self._evaluator.costs
        self.context_size: int = lib.llama_n_ctx(opened.context)
        """How many tokens prompt and reply may have together."""
        self.trained_context: int = lib.llama_model_n_ctx_train(opened.model)
        """The longest text the model was trained on, in tokens."""
        self.can_go_back = not (lib.llama_model_is_recurrent(opened.model) or lib.llama_model_is_hybrid(opened.model))
        """Whether single tokens can be taken out of the KV cache again; recurrent models cannot."""
        weights, per_token = int(lib.llama_model_size(opened.model)), opened.bytes_per_token
        self.memory = EngineMemory(weights=weights, context=per_token * self.context_size, per_token=per_token)
        """What the model takes."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        ctx_size: int = 0,
        gpu_layers: int = -1,
        threads: int = 0,
        batch_size: int = 512,
        cache_type_k: CacheType = "f16",
        cache_type_v: CacheType = "f16",
        flash_attn: FlashAttention = "auto",
        lora: Sequence[LoraSpec] = (),
        draft: str = "",
        tap: Tap | None = None,
        verbose: bool = False,
    ) -> LlamaEngine:
        """Load the GGUF model at `path`.

        `ctx_size` 0 is the model's own context, or what memory allows; `gpu_layers` -1 is all that fit; `threads` 0 is
        the number of physical cores; `draft` is "ngram" or the path of a smaller model with the same vocabulary, to
        guess tokens with; `tap` looks into the graph and must outlive the engine. Raises `CorruptFileError`,
        `UnsupportedError`, `ResourceError`, `MismatchError`.
        """
        engine = cls(
            OpenedModel.open(
                path,
                ctx_size=ctx_size,
                gpu_layers=gpu_layers,
                threads=threads,
                batch_size=batch_size,
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                flash_attn=flash_attn,
                eval_callback=tap.callback if tap else None,
                verbose=verbose,
            )
        )
        try:
            engine.set_adapters(lora)
            engine._draft_ngrams = draft == "ngram"
            if draft and not engine._draft_ngrams:
                engine._draft = open_draft(Path(draft), engine, threads=threads, gpu_layers=gpu_layers)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._opened.header.path

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """The adapters applied now."""
        return self._adapters

    @property
    def adapter_key(self) -> AdapterKey:
        """What tells the adapters applied now, with their scales, from others."""
        return self._adapter_key

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens of the sequence used last, where they were evaluated under the adapters of now."""
        latest = self.cache.latest
        return tuple(latest.ids) if adapters_of(latest) == self._adapter_key else ()

    @property
    def cached_tokens(self) -> int:
        """How many tokens `cached_ids` are."""
        return len(self.cached_ids)

    @property
    def is_on_gpu(self) -> bool:
        """Whether any layer is computed on a GPU."""
        return self._opened.is_on_gpu

    def close(self) -> None:
        """Free the model, its context and its adapters."""
        if self._draft is not None:
            self._draft.close()
            self._draft = None
        self._opened.close()
        self.tokenizer.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_adapters(self, adapters: Sequence[LoraSpec | tuple[Path, float]]) -> None:
        """Apply these adapters, and no others; a scale of 0 switches one off.

        Raises `MismatchError` or `UnsupportedError` for one that does not fit the model; the set then stays as it was.
        """
        wanted = [adapter if isinstance(adapter, LoraSpec) else LoraSpec(*adapter) for adapter in adapters]
        self._opened.check()
        key = self._lora.load(wanted)
        self._lora.apply(self._opened.context, key)
        self._adapters, self._adapter_key = tuple(wanted), key

    def forget(self) -> None:
        """Empty the KV cache."""
        self._evaluator.forget()

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
    ) -> LlamaGeneration:
        """Continue the prompt `ids`: iterate over the result for text; see `protocol.Engine`.

        Raises `UsageError` when the prompt is empty or does not fit into the context.
        """
        self._opened.check()
        self._check_prompt([*ids, *prefix], room_for=1)
        return LlamaGeneration(
            self,
            self.build_sampler(sampling, [*ids, *prefix]),
            list(ids),
            adapters=self._adapter_key if adapters is None else self._lora.load(adapters),
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            top=top,
            shift=shift,
            speculation=self._speculation(),
        )

    def run_together(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Advance several replies side by side; see `protocol.Engine`."""
        return run_together(self, [one for one in generations if isinstance(one, LlamaGeneration)])

    def distribution(self, sampling: Sampling, *, top: int = 40) -> tuple[Candidate, ...]:
        """The next token's distribution after the last evaluation under `sampling`; empty before the first one."""
        if self._evaluator.latest is None or self._opened.is_closed:
            return ()
        slot, row = self._evaluator.latest
        sampler = self.build_sampler(sampling, slot.ids)
        try:
            seen = sampler.peek(self._opened.context, row, top)
        finally:
            sampler.close()
        return as_candidates(seen, self.tokenizer.piece) if seen else ()

    def save_state(self, path: Path) -> None:
        """Keep the KV cache of the sequence used last in a file. Raises `UsageError` when it is empty."""
        self._opened.check()
        slot = self.cache.latest
        if not slot.ids:
            raise UsageError("Nothing was evaluated yet, so there is no state to keep.")
        write_state_file(path, self._identity_under(slot.key), slot.ids, self.cache.read_state(slot))

    def load_state(self, path: Path, ids: Sequence[int]) -> int:
        """Take up a kept KV cache where it is the beginning of `ids`; returns how many tokens of it that are."""
        self._opened.check()
        found = read_state_file(path, self._identity_under(self._adapter_key))
        if found is None:
            return 0
        return self.cache.adopt(self._adapter_key, *found, wanted=ids)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after every token of `ids`, evaluated afresh; shape (tokens, vocabulary)."""
        rows = np.empty((len(ids), self.tokenizer.n_vocab), np.float32)
        for start, part in self.iter_logits(ids):
            rows[start : start + len(part)] = part
        return rows

    def iter_logits(self, ids: Sequence[int], *, keep: bool = False) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `logits`, in parts: (position of the first row, rows); a part is only valid until the next one.

        With `keep` the entries stay in the cache for a reply to the same text.
        """
        self._opened.check()
        self._check_prompt(ids, room_for=0)
        self.forget()
        self._lora.apply(self._opened.context, self._adapter_key)
        slot = self.cache.take(self._adapter_key, ids)
        try:
            rows = min(LOGIT_ROWS, self._evaluator.batch_size)
            for start in range(0, len(ids), rows):
                chunk = ids[start : start + rows]
                self._evaluator.evaluate([(slot, chunk)], every_output=True)
                yield start, self._evaluator.logits(len(chunk))
        finally:
            self.cache.release(slot)
            if not keep:
                self.forget()

    def evaluate(self, generations: Sequence[LlamaGeneration]) -> None:
        """Evaluate what these replies wait for: a single one's prompt, or the next tokens of several in one batch.

        They must have the same adapters. The outputs are valid until the next evaluation.
        """
        self._lora.apply(self._opened.context, generations[0].adapters)
        parts = [(one.slot, one.pending) for one in generations if one.slot is not None]
        if not parts:
            self._begin(*generations)
            return
        for one, row in zip(generations, self._evaluator.evaluate(parts, every_output=True), strict=True):
            one.row = row

    def choose(self, sampler: Sampler, row: int, top: int) -> tuple[int | None, Seen | None]:
        """The next token after output `row`, and with `top` what from; None when a grammar allows none."""
        if not top:
            return sampler.sample(self._opened.context, row), None
        seen = sampler.sample_seen(self._opened.context, row, top)
        return (seen.token if seen else None), seen

    def build_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """A sampler for a text that is `history` so far."""
        return Sampler(
            self._vocab, sampling, context_size=self.context_size, eog_ids=self.tokenizer.eog_ids, prompt=history
        )

    def release(self, slot: Slot) -> None:
        """The reply on `slot` has ended."""
        self.cache.release(slot)

    def drop_last(self, slot: Slot, count: int) -> None:
        """Take the last `count` tokens out of `slot`."""
        self.cache.truncate(slot, len(slot.ids) - count)

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether the context has no room for one more token of each reply; `unsure` of its entries are guesses."""
        return self.cache.is_full(unsure=unsure)

    def guess_limit(self) -> int:
        """How many guesses the context has room for beside the tokens that are certain."""
        return self._evaluator.guess_limit()

    def _begin(self, generation: LlamaGeneration) -> None:
        """Take a sequence for `generation` and evaluate its prompt as far as the cache does not hold it."""
        ids = generation.pending
        slot = self.cache.take(generation.adapters, ids, shift=generation.shift)
        generation.slot = slot
        if generation.shift:
            self.cache.shift_towards(slot, ids)
        kept = self.cache.keep_prefix(slot, ids)
        if not generation.ids:
            generation.reused_tokens = kept
        if len(ids) - kept + self.cache.running > self.cache.room() + 1:
            raise UsageError(
                f"The text has {len(ids)} tokens; beside the other reply the context takes {self.cache.room() + kept}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        # Stopped in the middle, the rest stays unevaluated; the reply itself finds out that it was cancelled.
        with interruptible(self._opened.context, lambda: generation.is_cancelled):
            for start in range(kept, len(ids), self._evaluator.batch_size):
                chunk = ids[start : start + self._evaluator.batch_size]
                (generation.row,) = self._evaluator.evaluate([(slot, chunk)])
            self._evaluator.check_output(generation.row, adapters=len(generation.adapters))

    def _speculation(self) -> Speculation | None:
        if not self.can_go_back or not (self._draft or self._draft_ngrams):
            return None
        return Speculation(self._draft or NgramDrafter(), self.costs)

    def _identity_under(self, adapters: object) -> str:
        return f"{self._opened.identity} {adapters}"

    def _check_prompt(self, ids: Sequence[int], *, room_for: int) -> None:
        if not ids:
            raise UsageError("There is nothing to evaluate: the text has no tokens.")
        if len(ids) + room_for > self.context_size:
            raise UsageError(
                f"The text has {len(ids)} tokens, the context {self.context_size}.",
                hint="Shorten it, or take a larger context with -c.",
            )
        if wrong := [token for token in ids if not 0 <= token < self.tokenizer.n_vocab]:
            raise UsageError(f"Token {wrong[0]} is outside the vocabulary of {self.tokenizer.n_vocab}.")
