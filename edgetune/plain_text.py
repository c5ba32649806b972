"""tokenizer.json with its control tokens out of reach of any text; for every reader of such files.

The `tokenizers` library can be told not to look for special tokens in a text. Unigram and WordPiece models find them
all the same, as entries of their vocabulary: "</s>" would end a text that only quotes it. Values only; reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_HIDDEN = "\uffff "
"""In front of a name: no text has it, as spaces are replaced before a model looks, and U+FFFF is no character."""


def text_only(values: dict[str, Any], control: Collection[str]) -> dict[str, Any]:
    """tokenizer.json's `values` in which only the `control` tokens are special, under names that no text can spell.

    For encoding alone, with `encode_special_tokens` on: ids stay as they are.
    """
    model = values["model"]
    hidden = {text: f"{_HIDDEN}{text}" for text in control}
    if isinstance(model["vocab"], list):
        vocabulary: Any = [[hidden.get(text, text), score] for text, score in model["vocab"]]
    elif model.get("type") in ("WordPiece", "WordLevel"):
        vocabulary = {hidden.get(text, text): number for text, number in model["vocab"].items()}
        model = {**model, "unk_token": hidden.get(model["unk_token"], model["unk_token"])}
    else:
        vocabulary, hidden = model["vocab"], {}
    added = [
        {**token, "special": token["content"] in control, "content": hidden.get(token["content"], token["content"])}
        for token in values.get("added_tokens") or []
    ]
    return {**values, "added_tokens": added, "model": {**model, "vocab": vocabulary}}
