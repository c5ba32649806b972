"""The task of decoders: predict the learned tokens of a chat or of bare text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from edgetune.data import Dataset, Split, TextTokenizer, Tokenized, read_dataset, tokenize
from edgetune.errors import UnsupportedError
from edgetune.events import Sink
from edgetune.training.batches import Batch, collate
from edgetune.training.loss import summed_loss
from edgetune.training.packing import PackedBatch
from edgetune.training.settings import TrainSettings

if TYPE_CHECKING:
    import torch


class CausalTask:
    """Next-token prediction, "chat" through the model's template or "completion" of bare text."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    packs: ClassVar[bool] = True
    """Its sequences may be packed into rows in place of `collate`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Rows as conversations, pairs or documents; "auto" settles on one of them."""
        dataset = read_dataset(
            [Path(path).expanduser() for path in settings.data],
            has_template=has_template,
            task=cast(Literal["auto", "chat", "completion"], self.name),
            skip_bad_rows=settings.skip_bad_rows,
            splits=("train", "valid") if settings.eval else ("train",),
            sink=sink,
        )
        self.name = dataset.task
        return dataset

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Decoders alone."""
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        )

        decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (architecture and architecture not in decoders):
            raise UnsupportedError(
                f"{model_dir} is a {architecture or config.model_type}, not a decoder that writes text.",
                hint="Give a causal language model, e.g. LlamaForCausalLM or Qwen2ForCausalLM.",
            )
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{model_dir} is an encoder-decoder ({architecture}), not a decoder alone.")

    def tokenize(
        self, dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink
    ) -> Mapping[str, Split[Tokenized]]:
        """Token ids and which of them are learned."""
        return tokenize(dataset, tokenizer, max_length=max_length, sink=sink)

    def head_modules(self, model: Any) -> list[str]:
        """None: the head is the base's own."""
        return []

    def collate(self, sequences: Sequence[Tokenized], device: torch.device) -> Batch:
        """Padded rows."""
        return collate(sequences, device)

    def summed_loss(self, model: Any, batch: Batch | PackedBatch) -> torch.Tensor:
        """Cross entropy over the learned tokens."""
        return summed_loss(model, batch)

    def data_record(self) -> dict[str, Any]:
        """Nothing more."""
        return {}
