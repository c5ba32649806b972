"""A Hugging Face model in torch, ready to be followed: weights in float32, its vocabulary, adapters on it.

Reads safetensors alone and runs no code that comes with a model. What the model then does is `checkpoint_run`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.torch.loading import load_vocabulary
from edgetune.errors import CorruptFileError, UnsupportedError, UsageError
from edgetune.explain.page import ModelKind
from edgetune.fingerprint import read_chat_template, read_safetensors_header, safetensors_files, transformer_dir
from edgetune.template import ChatTemplate

MOST_TOKENS = 512
"""As `gguf_parts.MOST_TOKENS`."""


@dataclass(frozen=True)
class Loaded:
    """A model in torch with its vocabulary."""

    model: Any
    """With PEFT around it where there are adapters."""
    base: Any
    """The transformers model itself."""
    config: Any
    kind: ModelKind
    vocabulary: JsonTokenizer | CharTokenizer
    model_dir: Path
    template: str | None = None
    """The chat template's source: an adapter's own, else the model's."""
    head_is_adapters: bool = False
    """Whether the head came with an adapter, so that the base by itself says nothing."""

    def encode(self, prompt: str, *, chat: bool, system: str) -> tuple[list[int], str]:
        """Token ids of `prompt`, all of it text, and the text that the model reads. Raises `UsageError`."""
        if not prompt.strip():
            raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
        if chat:
            if not self.template or isinstance(self.vocabulary, CharTokenizer):
                raise UsageError(f"{self.model_dir} has no chat template.", hint="Leave out --chat.")
            template = ChatTemplate(self.template, self.vocabulary.special_texts, self.vocabulary.control_tokens)
            turns = [{"role": "system", "content": system}] if system else []
            rendered = template.render([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True)
            ids, text = self.vocabulary.encode_rendered(rendered), rendered.text
        else:
            ids, text = self.vocabulary.encode(prompt), prompt
        if len(ids) > MOST_TOKENS:
            raise UsageError(
                f"The prompt has {len(ids)} tokens; explain shows up to {MOST_TOKENS}.", hint="Give a shorter one."
            )
        return ids, text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return [self.vocabulary.piece(token, special=True).decode(errors="replace") for token in ids]

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        """The same of what is read, where that has a vocabulary of its own."""
        if isinstance(self.vocabulary, CharTokenizer):
            return [self.vocabulary.source_piece(token) for token in ids]
        return self.pieces(ids)

    def is_control(self, piece: str) -> bool:
        """Whether a token's text is that of a control token."""
        return not isinstance(self.vocabulary, CharTokenizer) and piece in self.vocabulary.control_tokens


def load(model_dir: Path, adapters: Sequence[tuple[Path, float]] = ()) -> Loaded:
    """Load `model_dir` in float32, with the PEFT directories in `adapters` on it, each with its scale.

    Raises `CorruptFileError`, `UnsupportedError`.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_dir = transformer_dir(model_dir)
    for file in safetensors_files(model_dir):
        read_safetensors_header(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
            labels = _trained_labels(adapters)
            kind: ModelKind
            if labels:
                config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
                kind, auto = "encoder", transformers.AutoModelForSequenceClassification
            else:
                kind, auto = _kind(config)
            base = auto.from_pretrained(
                model_dir,
                config=config,
                ignore_mismatched_sizes=bool(labels),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise CorruptFileError(f"{model_dir} cannot be loaded in torch: {reason}.") from error
        model = base
        for number, (path, scale) in enumerate(adapters):
            model = _adapted(model, path, scale, number)
    vocabulary = load_vocabulary(model_dir, config.to_dict(), eog_ids=frozenset())
    template = next(
        (text for place in (*(path for path, _ in adapters), model_dir) if (text := read_chat_template(place))), None
    )
    return Loaded(model.eval(), base, config, kind, vocabulary, model_dir, template, head_is_adapters=bool(labels))


def _trained_labels(adapters: Sequence[tuple[Path, float]]) -> list[str]:
    """What a head that came with an adapter says, by the run's record; empty when there is none."""
    for path, _ in adapters:
        if not (path / RUN_RECORD).is_file():
            continue
        run = Run.load(path)
        if run.task == "regression":
            return ["value"]
        if run.task == "classification":
            return [str(label) for label in run.data.get("labels") or ()]
    return []


def _kind(config: Any) -> tuple[ModelKind, Any]:
    import transformers

    architecture = str((config.architectures or [""])[0])
    if config.is_encoder_decoder:
        return "encoder-decoder", transformers.AutoModelForSeq2SeqLM
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder", transformers.AutoModelForCausalLM
    if architecture.endswith("ForSequenceClassification"):
        return "encoder", transformers.AutoModelForSequenceClassification
    if architecture.endswith("ForMaskedLM"):
        return "encoder", transformers.AutoModelForMaskedLM
    return "encoder", transformers.AutoModel


def _adapted(model: Any, path: Path, scale: float, number: int) -> Any:
    import peft

    name = f"adapter{number}"
    try:
        if number:
            model.load_adapter(str(path), adapter_name=name)
            model.base_model.set_adapter([*model.active_adapters, name])
        else:
            model = peft.PeftModel.from_pretrained(model, str(path), adapter_name=name)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UnsupportedError(f"The adapter {path} does not fit the model: {reason}.") from error
    if scale != 1:
        for module in model.modules():
            # Attention modules have a number by that name; PEFT's layers a table of adapters.
            if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling:
                scaling[name] *= scale
    return model
