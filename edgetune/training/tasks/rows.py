"""What the tasks beside chat share: rows of known columns → sequences, padding, and the parts of an encoder that train.

A task of these is a subclass that says its formats, its sequences, its loss and what it measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Split, TextTokenizer
from edgetune.data.columns import Columns
from edgetune.data.dataset import read_columns, tell_losses
from edgetune.errors import DataError, UnsupportedError
from edgetune.events import Progress, Sink
from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.text_limit import positions
from edgetune.training.batches import padded_length
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.choose import Kind, base_kind

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class ReadSequence:
    """A row in ids that is read whole: none of its tokens is learned, the row is."""

    ids: Ids

    @property
    def learned(self) -> NDArray[np.bool_]:
        """No token is written."""
        return np.zeros(len(self.ids), dtype=bool)

    @property
    def learned_count(self) -> int:
        """One row, one thing to learn."""
        return 1


@dataclass(frozen=True)
class RowBatch:
    """Padded rows and what is to be learned of them."""

    inputs: Mapping[str, torch.Tensor]
    """What the model's forward takes."""
    labels: torch.Tensor
    tokens: int
    learned_tokens: int
    denominator: float
    extra: Mapping[str, torch.Tensor]
    """What the loss needs besides."""


class RowTask:
    """The base of tasks whose rows are `Columns`. Everything here is a default that a task may replace."""

    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    most_eval_rows: ClassVar[int] = 2000
    divisible: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]]
    """The kinds of base it can train."""
    way_out: ClassVar[str]
    """What to do with a base of another kind."""

    settings: TrainSettings

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: Kind = "encoder"
        self.pad_id = 0
        self.raw: Mapping[str, Any] = {}
        self.most_places: int | None = None
        """Tokens that the base has positions for; None where nothing bounds them."""
        self.has_types = False
        self._weights: frozenset[str] = frozenset()
        self.train_sequences: Sequence[Any] = ()

    # --- rows

    def formats(self) -> Sequence[Columns]:
        """The layouts of rows it takes."""
        raise NotImplementedError

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Rows in one of `formats`, then checked together."""
        self.settings = settings
        if model_dir.is_file():
            raise UnsupportedError(
                f"{model_dir} is a GGUF file; {self.name} is trained on Hugging Face directories.",
                hint="Give the directory that the file was made from with -m.",
            )
        self.raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        self.kind = base_kind(self.raw)
        self.check_kind(model_dir)
        dataset = read_columns(
            settings.data_paths,
            self.formats(),
            task=self.name,
            skip_bad_rows=settings.skip_bad_rows,
            splits=("train", "valid") if settings.eval else ("train",),
            valid_share=settings.valid_share,
            sink=sink,
        )
        return self.check_rows(dataset, sink)

    def check_kind(self, model_dir: Path) -> None:
        """Raise `UnsupportedError` for a base of a kind that this task cannot train."""
        if self.kind not in self.kinds:
            raise UnsupportedError(
                f"{model_dir} is an {self.kind} ({self.raw['model_type']}), which cannot be trained for {self.name}."
                if self.kind != "decoder"
                else f"{model_dir} is a decoder ({self.raw['model_type']}), which cannot be trained for {self.name}.",
                hint=self.way_out,
            )

    def check_rows(self, dataset: Dataset, sink: Sink) -> Dataset:
        """What can only be said of all rows together. Raises `DataError`."""
        return dataset

    # --- base

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Take note of padding, text types and of which weights there are."""
        inner = getattr(config, "encoder", None) or config.get_text_config()
        pads = (getattr(source, "pad_token_id", None) for source in (config, inner))
        self.pad_id = next((pad for pad in pads if isinstance(pad, int) and pad >= 0), 0)
        parts = (inner, getattr(config, "decoder", None))
        known = (positions(part.to_dict()) for part in parts if part is not None)
        self.most_places = min((places for places in known if places), default=None)
        self.has_types = self.kind == "encoder" and (getattr(config, "type_vocab_size", 0) or 0) > 1
        self._weights = frozenset(
            name for path in safetensors_files(model_dir) for name in read_safetensors_header(path)[0]
        )

    def has_weights(self, model: Any, module: str) -> bool:
        """Whether the base has the weights of `module`, with or without the body's prefix."""
        prefix = f"{model.base_model_prefix}."
        names = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]
        return all(name in self._weights or name.removeprefix(prefix) in self._weights for name in names)

    def head_modules(self, model: Any) -> list[str]:
        """None: nothing is trained beside the adapter."""
        return []

    def frozen_modules(self, model: Any) -> list[str]:
        """Poolers: they are no part of what llama.cpp computes, and only classifiers run them."""
        return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == "pooler"]

    def start(self, model: Any) -> None:
        """Nothing to set."""

    def settle(self, model: Any) -> None:
        """Nothing to change."""

    # --- sequences

    def tokenize(
        self, dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink
    ) -> Mapping[str, Split[Any]]:
        """One sequence a row; rows of which no token is left are left out and counted."""
        self.ready(tokenizer, sink)
        splits = {}
        for name, rows in dataset.examples.items():
            sequences, rows_of, truncated = [], [], 0
            for number, (_, example) in enumerate(rows, 1):
                sequence, cut = self.sequence(example, tokenizer, max_length)
                truncated += cut
                if len(sequence.ids):
                    sequences.append(sequence)
                    rows_of.append(number - 1)
                if number % 500 == 0 or number == len(rows):
                    sink(Progress("tokenize", number, len(rows), "rows", name))
            splits[name] = Split(sequences, len(rows), truncated, len(rows) - len(sequences), rows_of)
        tell_losses(splits, max_length, sink)
        self.train_sequences = splits["train"].sequences
        if not splits["train"].sequences:
            raise DataError("Nothing is left to train on: no row has a token.", hint="Look at the data's texts.")
        return splits

    def ready(self, tokenizer: TextTokenizer, sink: Sink) -> None:
        """Called with the tokenizer before the first sequence is made."""

    def sequence(self, example: Any, tokenizer: TextTokenizer, max_length: int) -> tuple[Any, bool]:
        """The sequence of one example, and whether something of it was cut."""
        raise NotImplementedError

    def padded(self, rows: Sequence[Ids], device: torch.device) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of `rows`, padded on the right; the mask always, as encoders want it."""
        ids, mask = pad_rows(rows, self.pad_id, device, most=self.most_places)
        return {"input_ids": ids, "attention_mask": mask}

    # --- measures

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Nothing but the loss."""
        return {}

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Nothing but the loss."""
        return Measured()

    def data_record(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


def pad_rows(
    rows: Sequence[Ids], fill: int, device: torch.device, *, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows, tokens) padded on the right with `fill`, and their mask, 1 where a token is.

    `most`: how many positions the model has, where it has not any number.
    """
    import torch

    longest = padded_length(max(len(row) for row in rows), most)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
