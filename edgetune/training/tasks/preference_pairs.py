"""Preference tuning from pairs: DPO (with IPO), which compares with the base, ORPO and SimPO, which do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgetune.data import Tokenized
from edgetune.data.columns import Columns
from edgetune.data.preferences import paired_rows, reply_text
from edgetune.errors import UsageError
from edgetune.training.tasks import preference_losses as losses
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.preference import REWARD_METRICS, PreferenceTask, share_won
from edgetune.training.tasks.preference_logps import score, score_base
from edgetune.training.tasks.preference_sequences import PairSequence, PreferenceBatch, SequenceMaker

if TYPE_CHECKING:
    import torch


class PairedTask(PreferenceTask):
    """Pairs as sequences, and the rewards of both replies as measures."""

    def formats(self, *, chat: bool) -> Sequence[Columns]:
        """The layouts of rows it takes."""
        return (paired_rows(chat=chat),)

    def sequences(self, rows: Sequence[tuple[str, Any]], maker: SequenceMaker) -> Iterator[tuple[int, Any]]:
        """Each row's number and its sequence; None for one that is left out."""
        for number, (place, example) in enumerate(rows):
            made = maker.make(place, example.prompt, (example.chosen, example.rejected))
            if made is not None and np.array_equal(made[0].ids, made[1].ids):
                maker.dropped += 1
                made = None
            yield number, None if made is None else PairSequence(*made, example)

    def sampled(self, sequence: Any) -> Tokenized:
        """The better reply behind its prompt."""
        found: Tokenized = sequence.chosen
        return found

    def collate(self, sequences: Sequence[Any], device: torch.device) -> Any:
        """All chosen replies, then all rejected ones."""
        every = [*(pair.chosen for pair in sequences), *(pair.rejected for pair in sequences)]
        return PreferenceBatch(self.replies(every, device), len(sequences))

    @property
    def metrics(self) -> Mapping[str, bool]:
        """How often, and by how much, the chosen reply is rewarded more."""
        return REWARD_METRICS

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Rewards of the validation pairs."""
        chosen, rejected = np.array(said, dtype=np.float64).T
        values = {
            "reward_accuracy": share_won(chosen, rejected),
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


class DpoTask(PairedTask):
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


class _AloneTask(PairedTask):
    """Losses of mean log-probabilities, without a base; the reward is a multiple of the mean."""

    @property
    def reward_scale(self) -> float:
        """The multiple."""
        return 1.0

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
    def reward_scale(self) -> float:
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
