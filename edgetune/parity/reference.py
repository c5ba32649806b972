"""The reference side of tokens and templates: what Hugging Face makes of a text or a conversation.

With transformers installed it is the reference itself. Without, the `tokenizers` library reads the same tokenizer.json,
which is all of it but transformers' own corrections; what cannot be compared then is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.data import TextTokenizer, load_tokenizer
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.fingerprint import read_chat_template
from edgetune.parity.texts import Conversation
from edgetune.template import Rendered

NO_TORCH = 'torch is not installed (pip install "edgetune[train]")'
NO_TRANSFORMERS = 'transformers is not installed (pip install "edgetune[train]")'


@dataclass(frozen=True)
class Reference:
    """A checkpoint's tokenizer, and its template where transformers can render it."""

    model_dir: Path
    tokenizer: TextTokenizer
    """Keeps message text apart from control tokens; ids as training uses them."""
    template: str | None
    hugging_face: Any | None
    """transformers' tokenizer; None when transformers is missing."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as text, with what the model wants around it; Hugging Face's own where it spells no token."""
        if any(token in text for token in self.tokenizer.control_ids):
            return self.tokenizer.encode(text)
        return list(self.tokenizer.backend.encode(text, add_special_tokens=True).ids)

    def encode_parsed(self, text: str) -> list[int]:
        """Ids of `text` with control tokens in it parsed as such, as Hugging Face does with a rendered template."""
        return list(self.tokenizer.backend.encode(text, add_special_tokens=False).ids)

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> str | None:
        """The text transformers makes of `conversation`; None when the template refuses it."""
        assert self.hugging_face is not None
        from jinja2 import TemplateError

        try:
            text: str = self.hugging_face.apply_chat_template(
                list(conversation),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, ValueError, TypeError, KeyError):
            return None
        return text

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered conversation, message text kept as text."""
        return self.tokenizer.encode_rendered(rendered)

    @cached_property
    def added_tokens(self) -> frozenset[str]:
        """Texts of the tokens that are found in any text, the control tokens aside."""
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added) - self.tokenizer.control_ids.keys()

    @cached_property
    def special_ids(self) -> dict[str, int | None]:
        """BOS and EOS by name, where known."""
        if self.hugging_face is None:
            return {}
        return {"bos": self.hugging_face.bos_token_id, "eos": self.hugging_face.eos_token_id}


def load_reference(model_dir: Path, *, template: str | None) -> Reference:
    """The tokenizer of `model_dir`, with `template` as its chat template.

    Raises `CorruptFileError` or `UnsupportedError` when it cannot be read.
    """
    try:
        import transformers
    except ImportError:
        return Reference(model_dir, _plain_tokenizer(model_dir), template, None)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(model_dir, chat_template=template)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hugging_face = transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    return Reference(model_dir, tokenizer, template, hugging_face)


def _plain_tokenizer(model_dir: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(f"{model_dir} has no tokenizer.json, and {NO_TRANSFORMERS}.")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing more specific for a file it cannot read.
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint="Download it again.") from error
    backend.no_truncation()
    backend.no_padding()
    control = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    return TextTokenizer(backend=backend, control_ids=control, eos_id=None, eog_ids=frozenset())


def effective_template(base_dir: Path, adapter_dir: Path | None) -> str | None:
    """The template a model is used with: the adapter's own where it brings one, else the base's."""
    return (read_chat_template(adapter_dir) if adapter_dir else None) or read_chat_template(base_dir)


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int:
    """The first position at which two id lists differ."""
    for position, (mine, theirs) in enumerate(zip(expected, found, strict=False)):
        if mine != theirs:
            return position
    return min(len(expected), len(found))
