"""What classification and regression share: a head on an encoder's or a decoder's state.

The head is trained in full and saved with the adapter, and so is a pooler that the base has no weights for. A base that
is a classifier with these labels keeps its head. On decoders the head reads the last token, whatever the padding is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import TextTokenizer
from edgetune.data.columns import Labelled, Scored
from edgetune.training.tasks.choose import Kind
from edgetune.training.tasks.rows import Ids, ReadSequence, RowBatch, RowTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadSequence(ReadSequence):
    """A text (or pair) in ids, and what the head should say of it."""

    type_ids: Ids
    target: NDArray[np.float32]
    """(outputs,): a one for each label it has, or the number."""
    example: Labelled | Scored


class HeadTask(RowTask):
    """What classification and regression share."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    kinds: ClassVar[tuple[Kind, ...]] = ("encoder", "decoder")
    way_out: ClassVar[str] = "Give an encoder such as BERT, or a decoder; for source and target texts: --task seq2seq."

    outputs: int
    problem: str
    """transformers' name of the problem type."""
    keeps_head = False
    """Whether the base's own head goes on being trained."""

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Give the head its size."""
        super().check_config(config, architecture, model_dir)
        config.num_labels = self.outputs
        config.problem_type = self.problem

    def head_modules(self, model: Any) -> list[str]:
        """Everything outside the body, and the pooler where the base has none."""
        heads = [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and any(True for _ in child.parameters())
        ]
        return heads + [name for name in super().frozen_modules(model) if not self.has_weights(model, name)]

    def frozen_modules(self, model: Any) -> list[str]:
        """A pooler that the base has."""
        return [name for name in super().frozen_modules(model) if self.has_weights(model, name)]

    def start(self, model: Any) -> None:
        """A head for other labels starts anew, also where its size is the same."""
        import torch

        if self.keeps_head:
            return
        generator = torch.Generator().manual_seed(self.settings.seed)
        last = last_linear(model, self.outputs)
        with torch.no_grad():
            last.weight.copy_(torch.randn(last.weight.shape, generator=generator) * 0.02)
            if last.bias is not None:
                last.bias.zero_()

    def sequence(self, example: Any, tokenizer: TextTokenizer, max_length: int) -> tuple[HeadSequence, bool]:
        """The text as the tokenizer wraps it."""
        whole = tokenizer.encode_whole(example.first, example.second, max_length=max_length)
        return HeadSequence(whole.ids, whole.type_ids, self.target(example), example), whole.cut

    def target(self, example: Any) -> NDArray[np.float32]:
        """What the head should say."""
        raise NotImplementedError

    def weight(self, sequence: HeadSequence) -> float:
        """How much a row counts in the loss."""
        return 1.0

    def collate(self, sequences: Sequence[HeadSequence], device: torch.device) -> RowBatch:
        """Padded texts and their targets."""
        import torch

        inputs = self.padded([sequence.ids for sequence in sequences], device)
        if self.has_types:
            types = np.zeros(inputs["input_ids"].shape, dtype=np.int64)
            for row, sequence in enumerate(sequences):
                types[row, : len(sequence.type_ids)] = sequence.type_ids
            inputs["token_type_ids"] = torch.from_numpy(types).to(device)
        weights = [self.weight(sequence) for sequence in sequences]
        return RowBatch(
            inputs=inputs,
            labels=torch.from_numpy(np.stack([sequence.target for sequence in sequences])).to(device),
            tokens=sum(len(sequence.ids) for sequence in sequences),
            learned_tokens=len(sequences),
            denominator=sum(weights),
            extra={"weights": torch.tensor(weights, device=device)},
        )

    def logits(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """What the head says, in f32: (rows, outputs)."""
        if self.kind == "encoder":
            return model(**batch.inputs).logits.float()  # type: ignore[no-any-return]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.score(self.last_states(base, batch)).float()  # type: ignore[no-any-return]

    def last_states(self, base: Any, batch: RowBatch) -> torch.Tensor:
        """A decoder's state at each row's last token: (rows, hidden)."""
        import torch

        body = getattr(base, base.base_model_prefix)
        hidden = body(**batch.inputs, use_cache=False).last_hidden_state  # (rows, tokens, hidden)
        last = batch.inputs["attention_mask"].sum(dim=1) - 1
        return hidden[torch.arange(len(last), device=last.device), last]  # type: ignore[no-any-return]

    def row_losses(self, logits: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        """The loss of each row: (rows,)."""
        raise NotImplementedError

    def summed_loss(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """The rows' losses by their weights."""
        return (self.row_losses(self.logits(model, batch), batch) * batch.extra["weights"]).sum()

    def predict(self, model: Any, batch: RowBatch) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss and each row's logits."""
        logits = self.logits(model, batch)
        loss = (self.row_losses(logits, batch) * batch.extra["weights"]).sum()
        return loss, list(logits.cpu().numpy())


def last_linear(model: Any, outputs: int) -> Any:
    """The head's last layer, that which is trained."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == outputs
        and not name.startswith(f"{base.base_model_prefix}.")
        and "original_module" not in name
    ]
    return found[-1][1]


def texts_of(example: Labelled | Scored) -> dict[str, str]:
    """The text, or both, by the names of their columns."""
    return {"text": example.first} if example.second is None else {"text_a": example.first, "text_b": example.second}
