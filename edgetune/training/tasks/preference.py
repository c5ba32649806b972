"""Preference tuning of decoders on the one loop: what DPO (with IPO), ORPO, SimPO and KTO have in common.

Learning from pairs stands in `preference_pairs`, from judged replies in `preference_verdicts`. What DPO and KTO compare
with is the base itself, the adapter switched off: no second model is held. The loss of a step is the mean over its
pairs (or replies), however they are spread over passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Masker, Split, TextTokenizer, Tokenized
from edgetune.data.columns import Columns
from edgetune.data.dataset import read_columns, tell_losses
from edgetune.errors import DataError, UnsupportedError
from edgetune.events import Notice, Progress, Sink
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.causal import CausalTask
from edgetune.training.tasks.preference_logps import Replies
from edgetune.training.tasks.preference_sequences import PreferenceBatch, SequenceMaker

if TYPE_CHECKING:
    import torch

_WITHOUT_BASE = ("full", "houlsby", "pfeiffer")
"""Methods that change the base's own weights or layers, so that it is not there any more to compare with."""

REWARD_METRICS: Mapping[str, bool] = {
    "reward_accuracy": True,
    "reward_margin": True,
    "chosen_reward": True,
    "rejected_reward": False,
}
"""What is measured of good replies against bad ones; true where more is better."""


class PreferenceTask(CausalTask):
    """What all four share: reading rows, rendering and cutting their replies, and how losses are summed."""

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
        raise NotImplementedError

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
        self._tokenizer, self.max_length = tokenizer, max_length
        masker = Masker(tokenizer, max_length)
        splits = {}
        for name, rows in dataset.examples.items():
            maker = SequenceMaker(masker, dataset.skipped)
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

    def sequences(self, rows: Sequence[tuple[str, Any]], maker: SequenceMaker) -> Iterator[tuple[int, Any]]:
        """Each row's number and its sequence; None for one that is left out."""
        raise NotImplementedError

    # --- loss

    def judge(self, model: Any, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pair or judged reply, and the rewards: (2, pairs) or (1, replies)."""
        raise NotImplementedError

    def replies(self, sequences: Sequence[Tokenized], device: torch.device) -> Replies:
        """`sequences` as one pass takes them."""
        return Replies.of(sequences, device, packed=self.packed, most=self.max_length)

    def summed_loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Over the pairs, or judged replies."""
        return self.judge(model, batch)[0].sum()

    def predict(self, model: Any, batch: Any) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss, and the rewards of each sequence."""
        loss, rewards = self.judge(model, batch)
        return loss.sum(), rewards.detach().T.tolist()

    def data_record(self) -> dict[str, Any]:
        """The strength that was meant."""
        return {"beta": self.beta}


def share_won(chosen: NDArray[np.float64], rejected: NDArray[np.float64]) -> float:
    """How often `chosen` is more; equal ones, as all are on a fresh adapter, count half: that is chance, not defeat."""
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
