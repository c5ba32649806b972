"""A Hugging Face model that writes, or fills in, tokens, in torch and ready to be followed: weights in float32.

Reads safetensors alone and runs no code that comes with a model. What the model then does is `checkpoint_run`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.torch.adapters import AdapterSet, PeftAdapters
from edgetune.engine.torch.loading import load_checkpoint, load_vocabulary, translated
from edgetune.errors import CorruptFileError, UsageError
from edgetune.explain.page import ModelKind
from edgetune.explain.parts import check_length
from edgetune.explain.spelling import without_unknown
from edgetune.fingerprint import read_chat_template, read_safetensors_header, safetensors_files, transformer_dir
from edgetune.piece_tokenizer import PieceTokenizer
from edgetune.template import ChatTemplate, Rendered

_WRITERS = ("ForCausalLM", "LMHeadModel")
_FILLERS = ("ForMaskedLM",)


@dataclass(frozen=True)
class Loaded:
    """A model in torch with its vocabulary."""

    adapters: PeftAdapters
    active: AdapterSet
    """All of the adapters, with their scales."""
    base: Any
    """The transformers model itself."""
    kind: ModelKind
    vocabulary: JsonTokenizer | CharTokenizer | PieceTokenizer
    model_dir: Path
    template: str | None = None
    """The chat template's source: an adapter's own, else the model's."""

    @property
    def model(self) -> Any:
        """The model with what lies on it."""
        return self.adapters.model

    @property
    def config(self) -> Any:
        """The transformers model's."""
        return self.base.config

    def encode(self, prompt: str, *, chat: bool, system: str) -> tuple[list[int], str]:
        """Token ids of `prompt`, all of it text, and the text that the model reads. Raises `UsageError`."""
        if chat:
            if not self.template or not isinstance(self.vocabulary, JsonTokenizer):
                raise UsageError(f"{self.model_dir} has no chat template.", hint="Leave out --chat.")
            template = ChatTemplate(self.template, self.vocabulary.special_texts, self.vocabulary.control_tokens)
            turns = [{"role": "system", "content": system}] if system else []
            rendered = template.render([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True)
            ids, text = self.vocabulary.encode_rendered(rendered), rendered.text
        elif self.mask and isinstance(self.vocabulary, JsonTokenizer):
            ids, text = _with_gaps(self.vocabulary, prompt, self.mask), prompt
        else:
            ids, text = self.vocabulary.encode(prompt), prompt
        check_length(ids)
        return ids, text

    @property
    def mask(self) -> str:
        """What stands for a gap in a text, of a model that fills them; empty for others."""
        if self.kind != "encoder" or not isinstance(self.vocabulary, JsonTokenizer):
            return ""
        return self.vocabulary.special_texts.get("mask_token", "")

    def place(self, ids: Sequence[int]) -> int:
        """Where in `ids` the guess is: at the end, or of a model that fills gaps at the first one or the last word."""
        if self.kind != "encoder":
            return len(ids) - 1
        texts = self.pieces(ids)
        if self.mask in texts:
            return texts.index(self.mask)
        return max((at for at, text in enumerate(texts) if text not in self.control_tokens), default=len(ids) - 1)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return [self.vocabulary.piece(token, special=True).decode(errors="surrogateescape") for token in ids]

    @property
    def source(self) -> Loaded | SourcePieces:
        """The vocabulary of what is read, where that is another than of what is written."""
        return self if isinstance(self.vocabulary, JsonTokenizer) else SourcePieces(self.vocabulary)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that are never made from a text."""
        return without_unknown(self.vocabulary.control_tokens)


@dataclass(frozen=True)
class SourcePieces:
    """What a model reads that has a vocabulary a side."""

    vocabulary: CharTokenizer | PieceTokenizer

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that are never made from a text."""
        return self.vocabulary.control_tokens

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self.vocabulary.source_piece(token) for token in ids]


def _with_gaps(vocabulary: JsonTokenizer, prompt: str, mask: str) -> list[int]:
    """Token ids of a text in which the mask token's name is a gap, and every other control token's is text."""
    *before, last = prompt.split(mask)
    around, gap = vocabulary.encode(""), vocabulary.encode_rendered(Rendered(mask))
    before = [part.rstrip() for part in before] if vocabulary.takes_space_before(mask) else before
    inside = [token for part in before for token in (*vocabulary.encode(part, add_special=False), *gap)]
    return [*around[:1], *inside, *vocabulary.encode(last, add_special=False), *around[1:]]


def kind_of(config: Any) -> ModelKind | None:
    """What a model with this config.json is, if it writes or fills in tokens; None for others."""
    architecture = str((config.architectures or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return None
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "decoder" if architecture.endswith(_WRITERS) else "encoder" if architecture.endswith(_FILLERS) else None


def load(model_dir: Path, lora: Sequence[LoraSpec] = ()) -> Loaded:
    """Load `model_dir` in float32, with the PEFT directories in `lora`.

    Raises `CorruptFileError`, `UnsupportedError`, `MismatchError`, `ResourceError`.
    """
    model_dir = transformer_dir(model_dir)
    for file in safetensors_files(model_dir):
        read_safetensors_header(file)
    kind = kind_of(read_config(model_dir))
    assert kind is not None
    base = _filler(model_dir) if kind == "encoder" else load_checkpoint(model_dir, dtype="f32", device="cpu")
    base.set_attn_implementation("eager")
    adapters = PeftAdapters(base)
    active = adapters.load(lora)
    places = [*(path for path, _ in active), model_dir]
    template = next((text for place in places if (text := read_chat_template(place))), None)
    vocabulary = load_vocabulary(model_dir, base.config.to_dict(), eog_ids=frozenset())
    return Loaded(adapters, active, base, kind, vocabulary, model_dir, template)


def read_config(model_dir: Path) -> Any:
    """The model's config, as transformers has it. Raises `UnsupportedError`."""
    import transformers

    with translated(f"transformers cannot read {model_dir}"):
        return transformers.AutoConfig.from_pretrained(
            transformer_dir(model_dir), local_files_only=True, trust_remote_code=False
        )


def _filler(model_dir: Path) -> Any:
    import torch
    import transformers

    with translated(f"transformers cannot load {model_dir}"):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            model_dir,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise CorruptFileError(
            f"{model_dir} lacks {len(missing)} tensors of its model, {missing[0]!r} first.", hint="Get it again."
        )
    return model.eval()
