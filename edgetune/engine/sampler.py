"""llama.cpp's native sampler chain for a `Sampling`, in llama.cpp's own order.

Samplers that would do nothing are left out; a greedy choice skips what cannot change it. The grammar stands beside the
chain: it is applied first, and a vocabulary that cannot go on under it ends the text instead of the process.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native
from edgetune.engine.candidates import CandidateArray, likeliest_and, read_logits, sampled_shares
from edgetune.engine.native import lib
from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.errors import UsageError

_DRY_BREAKERS = (b"\n", b":", b'"', b"*")
_MIROSTAT_WINDOW = 100


class Seen(NamedTuple):
    """A choice and what it was made from; the last entry of each array is the chosen token's."""

    token: int
    tokens: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    """Before sampling."""
    sampled: NDArray[np.float32] | NDArray[np.bool_]
    """After."""


class Sampler:
    """Chooses tokens from the logits of a context's last evaluation."""

    def __init__(
        self,
        vocab: Any,
        sampling: Sampling,
        *,
        context_size: int,
        eog_ids: frozenset[int],
        prompt: Sequence[int],
        vocab_size: int = 0,
    ) -> None:
        """Build the chain; `prompt` is what the penalties see before the first token.

        Without a `vocab`, for logits of `vocab_size` tokens that llama.cpp does not know, there is no grammar and no
        DRY, which read the tokens' texts: `UsageError`.
        """
        if vocab is None and (sampling.grammar or sampling.dry_multiplier):
            raise UsageError(
                f"{'A grammar' if sampling.grammar else 'DRY'} needs a vocabulary of llama.cpp; this model has none.",
                hint="Leave it out, or run a GGUF of the model where there can be one.",
            )
        self.seed = secrets.randbits(31) if sampling.seed == RANDOM_SEED else sampling.seed & 0xFFFFFFFF
        self._vocab, self._vocab_size = vocab, vocab_size or lib.llama_vocab_n_tokens(vocab)
        self._grammar: Any = None
        self._array: CandidateArray | None = None
        self._is_greedy = False
        self.chain: Any = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._add_bias(sampling.biases(), eog_ids if sampling.ignore_eos else frozenset())
        look_back = self._add_penalties(sampling, context_size)
        self._add_choice(sampling)
        for token in list(prompt)[-look_back:] if look_back else ():
            lib.llama_sampler_accept(self.chain, token)
        if sampling.grammar:
            self._load_grammar(sampling.grammar, eog_ids)

    def sample(self, context: Any, row: int = -1) -> int | None:
        """Choose a token after output `row` and take it into account; None when the grammar allows none."""
        if self._grammar is None:
            return int(lib.llama_sampler_sample(self.chain, context, row))
        array = self._filtered(read_logits(context, row, self._vocab_size))
        return None if array is None else self._accept(array)

    def sample_seen(self, context: Any, row: int, top: int) -> Seen | None:
        """As `sample`, with the `top` most likely tokens and the chosen one's chances."""
        logits = read_logits(context, row, self._vocab_size)
        if self._is_greedy and self._grammar is None:
            # What is left is the chosen token alone, so there is no need to look at the chain's work.
            return self._seen(logits, top, None, int(lib.llama_sampler_sample(self.chain, context, row)))
        array = self._filtered(logits)
        return None if array is None else self._seen(logits, top, array, self._accept(array))

    def sample_from(self, logits: NDArray[np.float32], top: int) -> tuple[int | None, Seen | None]:
        """Choose a token from `logits`, whoever computed them; with `top`, what it was chosen from as well."""
        array = self._filtered(logits)
        if array is None:
            return None, None
        token = self._accept(array)
        return token, self._seen(logits, top, array, token) if top else None

    def peek(self, context: Any, row: int, top: int) -> Seen | None:
        """What `sample_seen` would see, without taking a choice into account."""
        return self.peek_at(read_logits(context, row, self._vocab_size), top)

    def peek_at(self, logits: NDArray[np.float32], top: int) -> Seen | None:
        """As `peek`, from `logits`, whoever computed them."""
        array = self._filtered(logits)
        return None if array is None else self._seen(logits, top, array, array.selected)

    def _filtered(self, logits: NDArray[np.float32]) -> CandidateArray | None:
        if self._array is None:
            self._array = CandidateArray(self._vocab_size)
        array = self._array
        array.load(logits)
        if self._grammar is not None:
            lib.llama_sampler_apply(self._grammar, ctypes.byref(array.raw))
            if np.isneginf(array.kept()[1]).all():
                return None
        lib.llama_sampler_apply(self.chain, ctypes.byref(array.raw))
        return array

    def _accept(self, array: CandidateArray) -> int:
        token = array.selected
        if self._grammar is not None:
            lib.llama_sampler_accept(self._grammar, token)
        lib.llama_sampler_accept(self.chain, token)
        return token

    def _seen(self, logits: NDArray[np.float32], top: int, array: CandidateArray | None, token: int) -> Seen:
        tokens, before = likeliest_and(token, logits, top)
        if array is None or self._is_greedy:
            return Seen(token, tokens, before, tokens == token)
        return Seen(token, tokens, before, sampled_shares(array.kept(), tokens))

    def close(self) -> None:
        """Free the native samplers."""
        if self._grammar is not None:
            lib.llama_sampler_free(self._grammar)
        if self.chain is not None:
            lib.llama_sampler_free(self.chain)
        self._grammar = self.chain = None

    def _add(self, sampler: Any) -> None:
        lib.llama_sampler_chain_add(self.chain, sampler)

    def _add_bias(self, wanted: dict[int, float], forbidden: frozenset[int]) -> None:
        if outside := [token for token in wanted if token >= self._vocab_size]:
            self.close()
            raise UsageError(f"logit_bias names token {outside[0]}; the vocabulary has {self._vocab_size}.")
        never = dict.fromkeys([*forbidden, *self._suppressed()], float("-inf"))
        if biases := sorted({**wanted, **never}.items()):
            values = (lib.llama_logit_bias * len(biases))(*biases)
            self._add(lib.llama_sampler_init_logit_bias(self._vocab_size, len(biases), values))

    def _suppressed(self) -> list[int]:
        """Tokens that the model's file says are never to be chosen."""
        if self._vocab is None:
            return []
        count = ctypes.c_int32(0)
        tokens = lib.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return list(tokens[: count.value])

    def _add_penalties(self, sampling: Sampling, context_size: int) -> int:
        """Add penalties and DRY where they are on; returns how many tokens back they look."""
        look_back = 0
        last_n = context_size if sampling.repeat_last_n < 0 else sampling.repeat_last_n
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if last_n and penalties != (1.0, 0.0, 0.0):
            self._add(lib.llama_sampler_init_penalties(self._vocab_size, last_n, *penalties))
            look_back = last_n
        dry_last_n = context_size if sampling.dry_penalty_last_n < 0 else sampling.dry_penalty_last_n
        if sampling.dry_multiplier and dry_last_n:
            breakers = (ctypes.c_char_p * len(_DRY_BREAKERS))(*_DRY_BREAKERS)
            strength = (sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length)
            self._add(lib.llama_sampler_init_dry(self._vocab, *strength, dry_last_n, breakers, len(breakers)))
            look_back = max(look_back, dry_last_n)
        return look_back

    def _add_choice(self, sampling: Sampling) -> None:
        if sampling.mirostat:
            self._add_mirostat(sampling)
            return
        is_greedy = sampling.temp <= 0
        if sampling.top_nsigma > 0 and not is_greedy:
            self._add(lib.llama_sampler_init_top_n_sigma(sampling.top_nsigma))
        # Of the filters, only these two can drop the most likely token.
        may_drop_best = sampling.typical < 1 or sampling.xtc_probability > 0
        if is_greedy and not may_drop_best:
            self._add(lib.llama_sampler_init_greedy())
            self._is_greedy = True
            return
        if sampling.top_k > 0:
            self._add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical < 1:
            self._add(lib.llama_sampler_init_typical(sampling.typical, 0))
        if sampling.top_p < 1:
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 0))
        if sampling.min_p > 0:
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 0))
        if sampling.xtc_probability > 0:
            chance = (sampling.xtc_probability, sampling.xtc_threshold)
            self._add(lib.llama_sampler_init_xtc(*chance, 0, self.seed))
        self._add(lib.llama_sampler_init_temp_ext(sampling.temp, sampling.dynatemp_range, sampling.dynatemp_exp))
        self._add(lib.llama_sampler_init_dist(self.seed))

    def _add_mirostat(self, sampling: Sampling) -> None:
        self._add(lib.llama_sampler_init_temp(sampling.temp))
        target = (sampling.mirostat_ent, sampling.mirostat_lr)
        if sampling.mirostat == 1:
            first = lib.llama_sampler_init_mirostat(self._vocab_size, self.seed, *target, _MIROSTAT_WINDOW)
            self._add(first)
        else:
            self._add(lib.llama_sampler_init_mirostat_v2(self.seed, *target))

    def _load_grammar(self, grammar: str, eog_ids: frozenset[int]) -> None:
        if not eog_ids:
            self.close()
            raise UsageError(
                "This model has no end token, so a grammar cannot end its text.", hint="Leave out --grammar."
            )
        native.forget_errors()
        with native.stderr_kept() as parser_output:
            self._grammar = lib.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not self._grammar:
            self._grammar = None
            self.close()
            raise UsageError(
                f"The grammar is not valid: {parser_output.first_line() or native.reason()}.",
                hint="It has to be GBNF with a rule called root; see llama.cpp's grammars/README.md.",
            )
