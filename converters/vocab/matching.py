"""Whether llama.cpp finds the same added tokens in a text as Hugging Face does.

Hugging Face takes the leftmost match, of those the longest. Our engine takes control tokens first, llama.cpp then the
other added tokens, one after the other, longest first. Where tokens overlap in a text the outcome may differ: a
vocabulary in which that can happen is refused. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal
from unicodedata import normalize

from converters.errors import UnsupportedModel
from converters.vocab.files import AddedToken
from converters.vocab.tokens import is_control

_Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""llama.cpp makes tokens of these names from any text, whatever their type says."""


def check_added_tokens(tokens: Iterable[AddedToken], *, normal_form: str = "") -> None:
    """Refuse added tokens that llama.cpp would find elsewhere; `normal_form` is what texts are brought into first."""
    tokens = list(tokens)
    for token in tokens:
        _check_alone(token, normal_form)
    control = [token.content for token in tokens if is_control(token)]
    others = sorted((token.content for token in tokens if not is_control(token)), key=lambda text: -len(text))
    for text in _overlaps(others, control):
        theirs, ours = _leftmost(text, [*control, *others]), _in_turn(text, control, others)
        if theirs != ours:
            raise UnsupportedModel(
                f"Added tokens overlap in texts like {text!r}, which Hugging Face reads as {theirs} and "
                f"llama.cpp as {ours}.",
                hint="Remove one of these added tokens from the tokenizer, if the model was trained without it.",
            )


def _check_alone(token: AddedToken, normal_form: str) -> None:
    if token.single_word:
        raise UnsupportedModel(
            f"The added token {token.content!r} is matched as a whole word only (single_word), which GGUF cannot say.",
            hint="Set single_word to false for it in tokenizer.json's added_tokens, and train with that tokenizer.",
        )
    if is_control(token):
        if token.content in _ALWAYS_TEXT:
            raise UnsupportedModel(
                f"llama.cpp makes the token {token.content!r} from whatever a person types, for any model.",
                hint="Rename it in tokenizer.json, tokenizer_config.json and the chat template; its id stays.",
            )
        return
    if token.lstrip or token.rstrip:
        raise UnsupportedModel(
            f"The added token {token.content!r} swallows the white space beside it (lstrip or rstrip) in any text; "
            "llama.cpp would keep that.",
            hint="Mark it as special in tokenizer.json's added_tokens, or set lstrip and rstrip to false there.",
        )
    forms: tuple[_Form, _Form] = ("NFKC", "NFKD") if normal_form.startswith("NFK") else ("NFC", "NFD")
    if normal_form and not token.normalized and any(normalize(form, token.content) != token.content for form in forms):
        raise UnsupportedModel(
            f"The added token {token.content!r} is matched before texts are brought into the normal form "
            f"{normal_form}; our engine would match it afterwards.",
            hint='Set "normalized" to true for it in tokenizer.json\'s added_tokens.',
        )


def _overlaps(others: Sequence[str], control: Sequence[str]) -> Iterator[str]:
    """Short texts in which an added token that is no control token meets another one inside itself."""
    starts: dict[str, list[str]] = {}
    for token in (*others, *control):
        for end in range(1, len(token)):
            starts.setdefault(token[:end], []).append(token)
    for first in others:
        yield from (first for inner in control if inner in first)
        for begin in range(1, len(first)):
            for second in starts.get(first[begin:], ()):
                text = first[:begin] + second
                if len(set(text)) > 1:  # Runs of one character come out alike: the longest ones from the left.
                    yield text


def _leftmost(text: str, tokens: Sequence[str]) -> list[str]:
    """Leftmost match, of those the longest."""
    present = [token for token in tokens if token in text]
    pieces, rest, position = [], "", 0
    while position < len(text):
        found = max((token for token in present if text.startswith(token, position)), key=len, default="")
        if found:
            pieces += [rest, found]
            rest, position = "", position + len(found)
        else:
            rest, position = rest + text[position], position + 1
    return [piece for piece in (*pieces, rest) if piece]


def _in_turn(text: str, control: Sequence[str], others: Sequence[str]) -> list[str]:
    """Control tokens first, then one token after the other in the rest."""
    pieces = _leftmost(text, control)
    for token in others:
        if token not in text:
            continue
        pieces = [
            part for piece in pieces for part in ([piece] if piece in control else _leftmost(piece, [token])) if part
        ]
    return pieces
