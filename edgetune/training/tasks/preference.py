"""Preference tuning of decoders on the one loop: DPO (with IPO), ORPO and SimPO from pairs, KTO from judged replies.

A reply is what training for chat learns of the same row: rendered by the chat template, behind the ids that chat makes
of its prompt. What DPO and KTO compare with is the base itself, the adapter switched off: no second model is held.
The loss of a step is the mean over its pairs (or replies), however they are spread over passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Masker, Split, TextTokenizer, Tokenized
from edgetune.data.columns import Columns
from edgetune.data.dataset import Skipped, read_columns, tell_losses
from edgetune.data.messages import RowError
from edgetune.data.preferences import Judged, Preference, Prompt, Reply, judged_rows, paired_rows, reply_text
from edgetune.errors import DataError, UnsupportedError, UsageError
from edgetune.events import Notice, Progress, Sink
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks import preference_losses as losses
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.causal import CausalTask
from edgetune.training.tasks.preference_logps import Replies, score, score_base

if TYPE_CHECKING:
    import torch

_WITHOUT_BASE = ("full", "houlsby", "pfeiffer")
"""Methods that change the base's own weights or layers, so that it is not there any more to compare with."""


@dataclass(frozen=True)
class PairSequence:
    """Two replies behind one prompt."""

    chosen: Tokenized
    rejected: Tokenized
    example: Preference

    @property
    def ids(self) -> NDArray[np.int32]:
        """Both, one after the other: what the pair costs."""
        return np.concatenate([self.chosen.ids, self.rejected.ids])

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Both replies."""
        return np.concatenate([self.chosen.learned, self.rejected.learned])

    @property
    def learned_count(self) -> int:
        """Tokens of both replies."""
        return self.chosen.learned_count + self.rejected.learned_count


@dataclass(frozen=True)
class JudgedSequence:
    """A reply behind its prompt, and another prompt's reply behind the same one."""

    whole: Tokenized
    mismatched: Tokenized
    example: Judged

    @property
    def ids(self) -> NDArray[np.int32]:
        """Those of the reply with its prompt."""
        return self.whole.ids

    @property
    def learned(self) -> NDArray[np.bool_]:
        """The reply."""
        return self.whole.learned

    @property
    def learned_count(self) -> int:
        """Tokens of the reply."""
        return self.whole.learned_count


@dataclass(frozen=True)
class PreferenceBatch:
    """What one pass takes: pairs (all chosen replies, then all rejected ones), or judged replies."""

    replies: Replies
    size: int
    """Pairs, or judged replies: what the loss is a mean over."""
    mismatched: Replies | None = None
    good: torch.Tensor | None = None
    """(replies,), where they are judged."""

    @property
    def tokens(self) -> int:
        """Without padding; those behind which the divergence is estimated do not count."""
        return self.replies.rows.tokens

    @property
    def learned_tokens(self) -> int:
        """Tokens of the replies."""
        return self.replies.rows.learned_tokens

    @property
    def denominator(self) -> float:
        """The mean is over pairs, or judged replies."""
        return float(self.size)


class PreferenceTask(CausalTask):
    """What all four share: reading, rendering and cutting rows, and rewards."""

    packs: ClassVar[bool] = False
    packs_batches: ClassVar[bool] = True
    """A batch is one packed row where the model keeps packed sequences apart."""
    needs_base: ClassVar[bool] = False
    """Whether the loss compares with the base."""
    default_beta: ClassVar[float] = 0.1

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.packed = False
        self.settings = TrainSettings()

    @property
    def beta(self) -> float:
        """The strength asked for, or the method's usual one."""
        return self.settings.beta or self.default_beta

    def formats(self, *, chat: bool) -> Sequence[Columns]:
        """The layouts of rows it takes."""
        return (paired_rows(chat=chat),)

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Preferences; texts are put through the chat template where there is one."""
        self.settings = settings
        self.check_settings()
        dataset = read_columns(
            settings.data_paths,
            self.formats(chat=has_template),
            task=self.name,
            skip_bad_rows=settings.skip_bad_rows,
            splits=("train", "valid") if settings.eval else ("train",),
            valid_share=settings.valid_share,
            sink=sink,
        )
        if settings.lr > 1e-4:
            sink(Notice(f"--lr {settings.lr:g} is much for {self.name}; 5e-6 to 5e-5 is usual.", "warning"))
        return dataset

    def check_settings(self) -> None:
        """Raise `UsageError` for settings that do not go together."""
        if self.needs_base and self.settings.method in _WITHOUT_BASE:
            raise UnsupportedError(
                f"{self.name} compares with the base, which --method {self.settings.method} does not leave as it was.",
                hint="Use --method lora, or --task orpo or simpo, which compare with no base.",
            )

    # --- sequences

    def tokenize(
        self, dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink
    ) -> Mapping[str, Split[Any]]:
        """Token ids of every reply behind its prompt, and which of them are the reply's."""
        self._tokenizer = tokenizer
        masker = Masker(tokenizer, max_length)
        splits = {}
        for name, rows in dataset.examples.items():
            maker = _Maker(masker, dataset.skipped)
            sequences, rows_of = [], []
            for number, (row, sequence) in enumerate(self.sequences(rows, maker), 1):
                if sequence is not None:
                    sequences.append(sequence)
                    rows_of.append(row)
                if number % 500 == 0:
                    sink(Progress("tokenize", min(number, len(rows)), len(rows), "rows", name))
            sink(Progress("tokenize", len(rows), len(rows), "rows", name))
            splits[name] = Split(sequences, len(rows), maker.truncated, maker.dropped, rows_of)
        for note in masker.notes:
            sink(Notice(note))
        tell_losses(splits, max_length, sink)
        if not splits["train"].sequences:
            raise DataError(
                "Nothing is left to train on: every row was cut before its replies differ.", hint="Raise --max-length."
            )
        if "valid" in splits and not splits["valid"].sequences:
            raise DataError(
                "No validation row is left: every one was cut before its replies differ.",
                hint="Raise --max-length, or leave them out with --no-eval.",
            )
        return splits

    def sequences(self, rows: Sequence[tuple[str, Any]], maker: _Maker) -> Iterator[tuple[int, Any]]:
        """Each row's number and its sequence; None for one that is left out."""
        for number, (place, example) in enumerate(rows):
            made = maker.make(place, example.prompt, (example.chosen, example.rejected))
            if made is not None and np.array_equal(made[0].ids, made[1].ids):
                maker.dropped += 1
                made = None
            yield number, None if made is None else PairSequence(*made, example)

    def sampled(self, sequence: Any) -> Tokenized:
        """The better reply, or the one there is, behind its prompt."""
        found: Tokenized = sequence.chosen if isinstance(sequence, PairSequence) else sequence.whole
        return found

    def collate(self, sequences: Sequence[Any], device: torch.device) -> Any:
        """All chosen replies, then all rejected ones."""
        every = [*(pair.chosen for pair in sequences), *(pair.rejected for pair in sequences)]
        return PreferenceBatch(Replies.of(every, device, packed=self.packed), len(sequences))

    # --- loss

    def judge(self, model: Any, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pair, and the rewards of both replies (2, pairs)."""
        raise NotImplementedError

    def summed_loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Over the pairs (or judged replies)."""
        return self.judge(model, batch)[0].sum()

    def predict(self, model: Any, batch: Any) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss, and the two rewards of each pair."""
        loss, rewards = self.judge(model, batch)
        return loss.sum(), rewards.detach().T.tolist()

    # --- measures

    @property
    def metrics(self) -> Mapping[str, bool]:
        """How often, and by how much, the chosen reply is rewarded more."""
        return {"reward_accuracy": True, "reward_margin": True, "chosen_reward": True, "rejected_reward": False}

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Rewards of the validation pairs."""
        chosen, rejected = np.array(said, dtype=np.float64).T
        values = {
            "reward_accuracy": _share_won(chosen, rejected),
            "reward_margin": float((chosen - rejected).mean()),
            "chosen_reward": float(chosen.mean()),
            "rejected_reward": float(rejected.mean()),
        }
        predictions = [
            {
                "prompt": row.example.prompt.text,
                "chosen": reply_text(row.example.chosen),
                "rejected": reply_text(row.example.rejected),
                "chosen_reward": better,
                "rejected_reward": worse,
            }
            for row, better, worse in zip(sequences, chosen.tolist(), rejected.tolist(), strict=True)
        ]
        return Measured(values, predictions)

    def data_record(self) -> dict[str, Any]:
        """The strength that was meant."""
        return {"beta": self.beta}


class DpoTask(PreferenceTask):
    """Direct preference optimization: rewards are β·(gain of the reply's log-probability on the base)."""

    needs_base: ClassVar[bool] = True

    def check_settings(self) -> None:
        """IPO has no smoothing."""
        super().check_settings()
        if self.settings.dpo_loss == "ipo" and self.settings.label_smoothing:
            raise UsageError("--label-smoothing is not for --dpo-loss ipo.", hint="Leave one of them out.")

    def judge(self, model: Any, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """DPO's or IPO's loss."""
        import torch

        is_ipo = self.settings.dpo_loss == "ipo"
        found, base = score(model, batch.replies), score_base(model, batch.replies)
        ours, theirs = (scores.means if is_ipo else scores.sums for scores in (found, base))
        four = (ours[: batch.size], ours[batch.size :], theirs[: batch.size], theirs[batch.size :])
        if is_ipo:
            loss = losses.ipo(*four, beta=self.beta)
        else:
            loss = losses.dpo(*four, beta=self.beta, label_smoothing=self.settings.label_smoothing)
        gains = self.beta * (ours - theirs).detach()
        return loss, torch.stack([gains[: batch.size], gains[batch.size :]])


class _AloneTask(PreferenceTask):
    """Losses of mean log-probabilities, without a base; the reward is a multiple of the mean."""

    reward_scale: float

    def loss_of(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """The loss of each pair."""
        raise NotImplementedError

    def judge(self, model: Any, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """From one pass alone."""
        import torch

        chosen, rejected = (half.means for half in score(model, batch.replies).split(batch.size))
        rewards = self.reward_scale * torch.stack([chosen, rejected]).detach()
        return self.loss_of(chosen, rejected), rewards


class OrpoTask(_AloneTask):
    """Odds ratio preference optimization: the chosen reply is learned, and its odds against the rejected one."""

    reward_scale = 1.0

    def loss_of(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """ORPO's."""
        return losses.orpo(chosen, rejected, weight=self.settings.orpo_lambda)

    def data_record(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


class SimpoTask(_AloneTask):
    """Simple preference optimization: mean log-probabilities, and a margin."""

    default_beta: ClassVar[float] = 2.0

    @property
    def reward_scale(self) -> float:  # type: ignore[override]
        """β."""
        return self.beta

    def loss_of(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """SimPO's."""
        return losses.simpo(
            chosen,
            rejected,
            beta=self.beta,
            gamma=self.settings.gamma,
            label_smoothing=self.settings.label_smoothing,
        )


class KtoTask(PreferenceTask):
    """Kahneman-Tversky optimization, from replies found good or bad; a pair is one of each.

    How far the adapter went from the base is estimated, as the paper does, by replies behind prompts they do not
    belong to, over the replies of one pass: a pass is not computed in parts.
    """

    divisible: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True

    def formats(self, *, chat: bool) -> Sequence[Columns]:
        """Verdicts, and pairs as well."""
        return (paired_rows(chat=chat), judged_rows(chat=chat))

    def check_settings(self) -> None:
        """One of the two weights may be 0."""
        super().check_settings()
        if not (self.settings.desirable_weight or self.settings.undesirable_weight):
            raise UsageError("--desirable-weight and --undesirable-weight are both 0: nothing would be learned.")

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Every reply by itself, and which kinds there are."""
        dataset = super().read(settings, model_dir, has_template=has_template, sink=sink)
        kinds = {}
        for split, rows in dataset.examples.items():
            found = [example.good for _, row in rows for example in _verdicts(row)]
            kinds[split] = frozenset(found)
            sink(Notice(f"{split}: {sum(found)} replies found good, {len(found) - sum(found)} found bad."))
        if len(kinds["train"]) < 2:
            sink(Notice("All replies got the same verdict: with both kinds there is more to learn.", "warning"))
        self._measured_kinds = kinds.get("valid", frozenset())
        return dataset

    def sequences(self, rows: Sequence[tuple[str, Any]], maker: _Maker) -> Iterator[tuple[int, Any]]:
        """Each reply behind its prompt, and the next other prompt's reply behind it."""
        every = [(number, example) for number, (_, row) in enumerate(rows) for example in _verdicts(row)]
        for (number, example), other in zip(every, _others([example for _, example in every]), strict=True):
            made = maker.make(rows[number][0], example.prompt, (example.reply, other.reply))
            yield number, None if made is None else JudgedSequence(*made, example)

    def collate(self, sequences: Sequence[Any], device: torch.device) -> Any:
        """The replies, and apart from them those behind prompts they do not belong to."""
        import torch

        return PreferenceBatch(
            Replies.of([row.whole for row in sequences], device, packed=self.packed),
            len(sequences),
            Replies.of([row.mismatched for row in sequences], device, packed=self.packed),
            torch.tensor([row.example.good for row in sequences], device=device),
        )

    def judge(self, model: Any, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """KTO's loss of each reply, and its reward (1, replies)."""
        import torch

        assert batch.mismatched is not None
        assert batch.good is not None
        gain = score(model, batch.replies).sums - score_base(model, batch.replies).sums
        with torch.no_grad():
            apart = score(model, batch.mismatched).sums - score_base(model, batch.mismatched).sums
        loss = losses.kto(
            gain,
            batch.good,
            apart.mean().clamp(min=0),
            beta=self.beta,
            good_weight=self.settings.desirable_weight,
            bad_weight=self.settings.undesirable_weight,
        )
        return loss, self.beta * gain.detach()[None]

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Those of pairs, of every good reply with every bad one; with one kind alone, its reward."""
        known = super().metrics
        if self._measured_kinds == {True, False}:
            return known
        return {"chosen_reward" if good else "rejected_reward": good for good in self._measured_kinds}

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Rewards of good replies against those of bad ones."""
        rewards = np.array(said, dtype=np.float64)[:, 0]
        good = np.array([row.example.good for row in sequences])
        chosen, rejected = rewards[good], rewards[~good]
        values = {}
        if len(chosen) and len(rejected):
            values["reward_accuracy"] = _share_won(chosen[:, None], rejected[None])
            values["reward_margin"] = float(chosen.mean() - rejected.mean())
        if len(chosen):
            values["chosen_reward"] = float(chosen.mean())
        if len(rejected):
            values["rejected_reward"] = float(rejected.mean())
        predictions = [
            {
                "prompt": row.example.prompt.text,
                "reply": reply_text(row.example.reply),
                "label": row.example.good,
                "reward": reward,
            }
            for row, reward in zip(sequences, rewards.tolist(), strict=True)
        ]
        return Measured(values, predictions)


def _share_won(chosen: NDArray[np.float64], rejected: NDArray[np.float64]) -> float:
    """How often `chosen` is more; equal ones, as all are on a fresh adapter, count half: that is chance, not defeat."""
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def _verdicts(row: Preference | Judged) -> list[Judged]:
    if isinstance(row, Judged):
        return [row]
    return [Judged(row.prompt, row.chosen, True), Judged(row.prompt, row.rejected, False)]


def _others(examples: Sequence[Judged]) -> list[Judged]:
    """For each example, the next one with another prompt; round the end, and any one where there is no other."""
    count = len(examples)
    following = [(at + 1) % count for at in range(count)]
    # From the end, twice: examples before the last change of prompt look past the end.
    for at in [*reversed(range(count)), *reversed(range(count))]:
        behind = (at + 1) % count
        following[at] = following[behind] if examples[behind].prompt == examples[at].prompt else behind
    return [examples[at] for at in following]


@dataclass
class _Maker:
    """Makes sequences of replies to one prompt, and counts what is lost."""

    masker: Masker
    skipped: Skipped
    truncated: int = 0
    dropped: int = 0

    def make(self, place: str, prompt: Prompt, replies: tuple[Reply, Reply]) -> tuple[Tokenized, Tokenized] | None:
        """Both replies behind `prompt`, cut; None when a bad row is skipped or nothing of a reply is left."""
        try:
            whole = [self._one(prompt, reply) for reply in replies]
        except RowError as error:
            self.skipped.add(place, str(error))
            return None
        length = self.masker.max_length
        self.truncated += any(len(sequence.ids) > length for sequence in whole)
        first, second = (sequence.cut(length) for sequence in whole)
        if first.learned[1:].any() and second.learned[1:].any():
            return first, second
        self.dropped += 1
        return None

    def _one(self, prompt: Prompt, reply: Reply) -> Tokenized:
        made = self.masker.sequences(prompt.answered(reply))
        if len(made) != 1:
            raise RowError("a reply that the chat template writes in one go", "one it rewrites on the way")
        return made[0]
