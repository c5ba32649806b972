"""Language codes of multilingual vocabularies: which tokens they are, and which of them a person means.

mBART, NLLB and M2M-100 mark languages by tokens of their own ("de_DE", "deu_Latn", "__de__"). Where in a text they
stand is the tokenizer's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from edgetune.errors import UsageError

_CODE = re.compile(r"[a-z]{2,3}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")


def language_codes(tokens: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The language codes among special `tokens`, pairs of text and id."""
    return {text: index for text, index in tokens if _CODE.fullmatch(text)}


def find_language(wanted: str, codes: Mapping[str, int]) -> str:
    """The code that `wanted` names: itself, or by its language alone ("de" is de_DE).

    Raises `UsageError` with the list when there is none, or when several are of that language.
    """
    if not codes:
        raise UsageError(
            f"This model knows no languages, so none is {wanted!r}.", hint="Leave out --src-lang and --tgt-lang."
        )
    same = [code for code in codes if code.lower() == wanted.lower().replace("-", "_")]
    found = same or [code for code in codes if _language(code) == wanted.lower()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{wanted!r} may be any of {', '.join(sorted(found))}.", hint="Give the whole code.")
    close = get_close_matches(wanted, codes, n=1)
    raise UsageError(
        f"This model has no language {wanted!r}.",
        hint=(f"Did you mean {close[0]}? " if close else "") + f"It has: {', '.join(sorted(codes))}.",
    )


def _language(code: str) -> str:
    return code.strip("_").partition("_")[0]
