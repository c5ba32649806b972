"""The task of decoders: predict the learned tokens of a chat or of bare text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Split, TextTokenizer, Tokenized, read_dataset, tokenize
from edgetune.data.cache import cached_tokenize
from edgetune.errors import UnsupportedError
from edgetune.events import Sink
from edgetune.training import metrics
from edgetune.training.batches import Batch, collate
from edgetune.training.evaluate import chosen_rows
from edgetune.training.loss import summed_loss
from edgetune.training.packing import PackedBatch
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.generate import greedy

if TYPE_CHECKING:
    import torch


_SAMPLE_TOKENS = 96
"""The longest sample."""

_SAMPLE_SECONDS = 30.0
"""Samples that take longer, as beside weights that are dequantized for every token, stay as far as they have come."""

_STARTED = 32
"""Tokens of a bare text that it is to be gone on from."""

_Reply = tuple[NDArray[np.int32], NDArray[np.int32]]


class CausalTask:
    """Next-token prediction, "chat" through the model's template or "completion" of bare text."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    most_eval_rows: ClassVar[int] = 256
    divisible: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    """Its sequences may be packed into rows in place of `collate`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.max_length: int | None = None
        """No sequence is longer, nor padded to more; None before there are sequences."""
        self._texts = -1

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Rows as conversations, pairs or documents; "auto" settles on one of them."""
        dataset = read_dataset(
            settings.data_paths,
            has_template=has_template,
            task=cast(Literal["auto", "chat", "completion"], self.name),
            skip_bad_rows=settings.skip_bad_rows,
            splits=("train", "valid") if settings.eval else ("train",),
            valid_share=settings.valid_share,
            sink=sink,
        )
        self.name = dataset.task
        self._texts = settings.eval_texts
        self._make = cached_tokenize if settings.cache else tokenize
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
        self._tokenizer, self.max_length = tokenizer, max_length
        return self._make(dataset, tokenizer, max_length=max_length, sink=sink)

    def head_modules(self, model: Any) -> list[str]:
        """None: the head is the base's own."""
        return []

    def frozen_modules(self, model: Any) -> list[str]:
        """None: every layer is run."""
        return []

    def start(self, model: Any) -> None:
        """Nothing to set."""

    def settle(self, model: Any) -> None:
        """Nothing to change."""

    def collate(self, sequences: Sequence[Tokenized], device: torch.device) -> Batch:
        """Padded rows."""
        return collate(sequences, device, most=self.max_length)

    def summed_loss(self, model: Any, batch: Batch | PackedBatch) -> torch.Tensor:
        """Cross entropy over the learned tokens."""
        return summed_loss(model, batch)

    def predict(self, model: Any, batch: Batch | PackedBatch) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss; texts are written in `measure`."""
        return self.summed_loss(model, batch), ()

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Texts against texts, where `--eval-texts` asks for it."""
        return metrics.TEXT if self._texts > 0 else {}

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Write the first reply of some of the rows, greedily, and compare."""
        rows: list[Tokenized] = chosen_rows(sequences, self._texts) if self._texts > 0 else []
        replies = [_first_reply(row) for row in rows]
        if not replies:
            return Measured()
        predictions = self._write(model, replies, max(len(reply) for _, reply in replies) + 8, tick)
        found, wanted = ([row[name] for row in predictions] for name in ("predicted", "target"))
        return Measured(metrics.texts(found, wanted), predictions)

    def write_samples(
        self, model: Any, sequences: Sequence[Any], tick: Callable[[int, int], None]
    ) -> list[dict[str, str]]:
        """What the model replies to the prompt of each of `sequences`, and what the row has there."""
        replies = [_first_reply(self.sampled(row)) for row in sequences]
        longest = max(len(reply) for _, reply in replies)
        most_tokens = min(_SAMPLE_TOKENS, 2 * longest + 8)
        return self._write(model, replies, most_tokens, tick, most_seconds=_SAMPLE_SECONDS)

    def sampled(self, sequence: Any) -> Tokenized:
        """The sequence whose prompt is asked again, of what is made of a row."""
        found: Tokenized = sequence
        return found

    def _write(
        self,
        model: Any,
        replies: Sequence[_Reply],
        most_tokens: int,
        tick: Callable[[int, int], None],
        *,
        most_seconds: float | None = None,
    ) -> list[dict[str, str]]:
        tokenizer = self._tokenizer
        written = greedy(
            model,
            [prompt for prompt, _ in replies],
            most_tokens=most_tokens,
            end_ids=tokenizer.eog_ids,
            pad_id=tokenizer.eos_id or 0,
            most_seconds=most_seconds,
            tick=tick,
        )
        return [
            {
                "prompt": tokenizer.decode(prompt.tolist()),
                "target": tokenizer.decode_text(reply.tolist()).strip(),
                "predicted": tokenizer.decode_text(ids).strip(),
            }
            for (prompt, reply), ids in zip(replies, written, strict=True)
        ]

    def data_record(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


def _first_reply(row: Tokenized) -> _Reply:
    """The ids before the first learned stretch of `row`, and those of it; a text learned whole is cut in two."""
    begin = int(row.learned.argmax())
    if begin < 2 and row.learned[1:].all():
        begin = max(1, min(_STARTED, len(row.ids) // 2))
    begin = max(1, begin)
    end = begin + int((~np.append(row.learned[begin:], False)).argmax())
    return row.ids[:begin], row.ids[begin:end]
