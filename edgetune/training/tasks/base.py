"""What a task answers to the loop: how rows become sequences and batches, the loss, and what is trained and measured.

The loop, checkpoints, schedules and the run directory are the same for all. A task's state (label names, say) is a
function of settings and data, so that a resumed run finds it again by reading them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgetune.events import Sink

if TYPE_CHECKING:
    import torch

    from edgetune.data import Dataset, Split, TextTokenizer
    from edgetune.training.settings import TrainSettings


class Batch(Protocol):
    """What one forward pass takes."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        ...

    @property
    def learned_tokens(self) -> int:
        """How many things the loss is over: tokens, or labels."""
        ...

    @property
    def denominator(self) -> float:
        """What the summed loss is divided by for the mean; adds up over the batches of one optimizer step."""
        ...


@dataclass(frozen=True)
class Measured:
    """What the validation rows showed beside their loss."""

    values: Mapping[str, float] = field(default_factory=dict)
    """By metric name."""
    predictions: Sequence[Mapping[str, Any]] = ()
    """JSON-ready, one a row, in the rows' order."""
    confusion: Sequence[Sequence[int]] = ()
    """Rows by true label and predicted label; empty where it means nothing."""


class Task(Protocol):
    """One kind of training. It may have `options`: what `settings.option` may hold for it, name → what it is."""

    auto_class: ClassVar[str]
    """The transformers class that loads the base with this task's head, e.g. "AutoModelForCausalLM"."""
    peft_type: ClassVar[str]
    """PEFT's name of the task, e.g. "CAUSAL_LM"."""
    most_eval_rows: ClassVar[int]
    """Validation rows measured each time; more tell little and cost as much as training."""

    divisible: ClassVar[bool]
    """Whether a batch may be computed in parts: not where its rows look at each other."""

    def __init__(self, name: str) -> None: ...

    @property
    def name(self) -> str:
        """What the run record calls it; known after `read`."""
        ...

    @property
    def metrics(self) -> Mapping[str, bool]:
        """What `measure` measures: name → whether more is better. The first is the one to show."""
        ...

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Read and check every row; needs neither torch nor transformers. Raises `UsageError` or `DataError`.

        What is added from other files belongs into the data's `sha256`: runs are resumed, and token ids kept, by it.
        """
        ...

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Raise `UnsupportedError` for a base that is the wrong kind; may add to `config` (the labels, say)."""
        ...

    def tokenize(
        self, dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink
    ) -> Mapping[str, Split[Any]]:
        """The sequences of every split. Raises `DataError`."""
        ...

    def head_modules(self, model: Any) -> list[str]:
        """Modules of `model` that are trained in full and saved beside the adapter; the base may lack their weights."""
        ...

    def frozen_modules(self, model: Any) -> list[str]:
        """Modules that "all-linear" leaves alone, because this task does not run them or llama.cpp could not."""
        ...

    def start(self, model: Any) -> None:
        """First values of the head, in the base just loaded; a function of the seed."""
        ...

    def collate(self, sequences: Sequence[Any], device: torch.device) -> Batch:
        """Sequences → tensors on `device`."""
        ...

    def summed_loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The loss of `batch`, summed; divided by the denominators of a step's batches it is their mean."""
        ...

    def predict(self, model: Any, batch: Any) -> tuple[torch.Tensor, Sequence[Any]]:
        """The summed loss and what the model says of each sequence, for `measure`."""
        ...

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Metrics over all `sequences`; `said` is what `predict` gave. `tick` takes what is done and the whole."""
        ...

    def settle(self, model: Any) -> None:
        """Last changes to the trained weights before they are saved for good."""
        ...

    def data_record(self) -> dict[str, Any]:
        """What the run record says of the data beside the counts."""
        ...


class TaskClass(Protocol):
    """Makes a task: what is registered."""

    def __call__(self, name: str) -> Task:
        """A task for one run, asked for by `name`."""
        ...
