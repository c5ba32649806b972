"""ByT5's vocabulary, which has no file: every byte of a text is a token, after the three control tokens.

transformers reads it with a class without a fast form. Here that class becomes the same vocabulary in the terms of the
`tokenizers` library, so that ByT5 is read by the code that reads every other model. What it writes that is no UTF-8 is
shown as U+FFFD, where transformers leaves it out. Loads transformers only when asked to convert one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CLASS = "ByT5Tokenizer"
_BYTES = 256


def reads_bytes(model_dir: Path) -> bool:
    """Whether the files in `model_dir` name ByT5's tokenizer."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            values = json.loads((model_dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and values.get("tokenizer_class") == _CLASS:
            return True
    return False


def with_fast_form(tokenizer: Any) -> Any:
    """`tokenizer`, one of transformers', in a form that has a `backend_tokenizer`; itself unless it is ByT5's."""
    if type(tokenizer).__name__ != _CLASS:
        return tokenizer
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    control = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    signs = bytes_to_unicode()
    vocabulary = {signs[byte]: tokenizer.offset + byte for byte in range(_BYTES)}
    # Without merges no text becomes more than one sign a token: the control tokens' names are never reached.
    backend = Tokenizer(models.BPE(vocab={**control, **vocabulary}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    end = tokenizer.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
