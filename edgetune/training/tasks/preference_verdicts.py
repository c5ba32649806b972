"""Preference tuning from judged replies: KTO. A pair is a good reply and a bad one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgetune.data import Dataset, Tokenized
from edgetune.data.columns import Columns
from edgetune.data.preferences import Judged, Preference, judged_rows, paired_rows, reply_text
from edgetune.errors import UsageError
from edgetune.events import Notice, Sink
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks import preference_losses as losses
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.preference import REWARD_METRICS, PreferenceTask, share_won
from edgetune.training.tasks.preference_logps import score, score_base
from edgetune.training.tasks.preference_sequences import JudgedSequence, PreferenceBatch, SequenceMaker

if TYPE_CHECKING:
    import torch


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
        if settings.batch_size == 1:
            sink(
                Notice("--batch-size 1: how far the adapter went is judged by one reply; 8 or more is good.", "warning")
            )
        self._measured_kinds = kinds.get("valid", frozenset())
        return dataset

    def sequences(self, rows: Sequence[tuple[str, Any]], maker: SequenceMaker) -> Iterator[tuple[int, Any]]:
        """Each reply behind its prompt, and the next other prompt's reply behind it."""
        every = [(number, example) for number, (_, row) in enumerate(rows) for example in _verdicts(row)]
        for (number, example), other in zip(every, _others([example for _, example in every]), strict=True):
            made = maker.make(rows[number][0], example.prompt, (example.reply, other.reply))
            yield number, None if made is None else JudgedSequence(*made, example)

    def sampled(self, sequence: Any) -> Tokenized:
        """The reply behind its prompt."""
        found: Tokenized = sequence.whole
        return found

    def collate(self, sequences: Sequence[Any], device: torch.device) -> Any:
        """The replies, and apart from them those behind prompts they do not belong to."""
        import torch

        return PreferenceBatch(
            self.replies([row.whole for row in sequences], device),
            len(sequences),
            self.replies([row.mismatched for row in sequences], device),
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
        if self._measured_kinds == {True, False}:
            return REWARD_METRICS
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
            values["reward_accuracy"] = share_won(chosen[:, None], rejected[None])
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
