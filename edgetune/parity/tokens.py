"""Token ids, rendered templates, BOS/EOS and the stop set: the GGUF's vocabulary against Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgetune.artifacts import ParityCheck
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import UsageError
from edgetune.parity.reference import Reference, first_difference
from edgetune.parity.texts import Conversation, conversations, stress_texts
from edgetune.template import ChatTemplate, Rendered

_SHOWN = 12
"""Ids of each side shown around a difference."""


def check_tokenizer(reference: Reference, tokenizer: GgufTokenizer, *, texts: Iterable[str] = ()) -> ParityCheck:
    """Compare ids on the stress set and `texts`: as text, and with control tokens parsed as in a rendered template."""
    checked = equal = 0
    difference = ""
    # What llama.cpp takes for a control token is never made from text; Hugging Face may not know it for one.
    added = reference.added_tokens - tokenizer.control_tokens
    for text in dict.fromkeys([*stress_texts(reference.tokenizer.control_ids, added_tokens=added), *texts]):
        pairs = [
            ("text", reference.encode(text), tokenizer.encode(text)),
            ("rendered text", reference.encode_parsed(text), tokenizer.encode_rendered(Rendered(text))),
        ]
        for what, expected, found in pairs:
            checked += 1
            equal += expected == found
            if expected != found and not difference:
                difference = f"{what} {shorten(text)}: {describe_ids(expected, found)}"
    return ParityCheck("tokenizer", checked, equal, difference)


def check_template(
    reference: Reference, tokenizer: GgufTokenizer, source: str | None, *, where: str = "the GGUF"
) -> ParityCheck:
    """Compare the template's text in the GGUF (`source`), and what it makes of conversations, as text and as ids."""
    expected_source = reference.template
    if not expected_source and not source:
        return ParityCheck("template", 0, 0, skipped="the model has no chat template")
    if expected_source != source:
        return ParityCheck("template", 1, 0, _source_difference(expected_source or "", source or "", where))
    template = tokenizer.build_template(source or "")
    checked, equal, difference = 1, 1, ""
    for conversation, opens in conversations(reference.tokenizer.control_ids):
        problems = list(_compare_conversation(reference, tokenizer, template, conversation, opens))
        checked += 2
        equal += 2 - len(problems)
        difference = difference or "".join(problems[:1])
    return ParityCheck("template", checked, equal, difference)


def check_stop(reference: Reference, tokenizer: GgufTokenizer) -> ParityCheck:
    """Compare BOS, EOS, what is put around a text, and that every id Hugging Face stops at stops llama.cpp as well."""
    problems: list[str] = []
    checked = 0
    found_ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for name, expected in reference.special_ids.items():
        checked += 1
        # A vocabulary without BOS may carry one in the file; it is never added, which the next comparison proves.
        if expected is not None and expected != found_ids[name]:
            problems.append(f"the {name.upper()} token is {found_ids[name]} instead of {expected}")
    checked += 1
    around, found_around = reference.encode("a"), tokenizer.encode("a")
    if around != found_around:
        problems.append(f"the text 'a' becomes {found_around} instead of {around}")
    for stop in sorted(reference.tokenizer.eog_ids):
        checked += 1
        if stop not in tokenizer.eog_ids:
            problems.append(f"the token {stop} ends a turn, but llama.cpp would not stop at it")
    return ParityCheck("stop", checked, checked - len(problems), "".join(problems[:1]))


def _compare_conversation(
    reference: Reference, tokenizer: GgufTokenizer, template: ChatTemplate, conversation: Conversation, opens: bool
) -> Iterable[str]:
    what = f"conversation {shorten(str([dict(turn) for turn in conversation]), 90)}"
    try:
        rendered: Rendered | None = template.render(conversation, add_generation_prompt=opens)
    except UsageError:
        rendered = None
    if reference.hugging_face is not None:
        expected = reference.render(conversation, opens)
        found = rendered.text if rendered else None
        if expected != found:
            texts = [shorten(text or "an error", 200) for text in (found, expected)]
            yield f"{what}: rendered as {texts[0]} instead of {texts[1]}"
    if rendered:
        expected_ids, found_ids = reference.encode_rendered(rendered), tokenizer.encode_rendered(rendered)
        if expected_ids != found_ids:
            yield f"{what}: {describe_ids(expected_ids, found_ids)}"


def _source_difference(expected: str, found: str, where: str) -> str:
    if not found:
        return f"{where} has no chat template, the checkpoint has one"
    if not expected:
        return f"{where} has a chat template, the checkpoint has none"
    at = next(
        (n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return (
        f"the chat template in {where} differs from character {at} on: "
        f"{shorten(found[at : at + 40])} instead of {shorten(expected[at : at + 40])}"
    )


def describe_ids(expected: Sequence[int], found: Sequence[int]) -> str:
    """Two lists of ids around their first difference, for people."""
    at = first_difference(expected, found)
    begin = max(0, at - 2)

    def shown(ids: Sequence[int]) -> str:
        return f"{'… ' if begin else ''}{list(ids[begin : begin + _SHOWN])}"

    return f"ids {shown(found)} instead of {shown(expected)} (from position {at})"


def shorten(text: str, limit: int = 60) -> str:
    """`text` in quotes, its beginning if it is long."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
