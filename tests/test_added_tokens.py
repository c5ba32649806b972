"""Added tokens: found where Hugging Face finds them, or the vocabulary is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters import UnsupportedModel
from converters.vocab import bpe
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.parity.reference import load_reference
from edgetune.parity.tokens import check_tokenizer
from tests.test_vocab import differing, keys_of, qwen_like, vocabulary_file

NFC = {"type": "NFC"}


def with_added(tmp_path: Path, *tokens: dict[str, Any], normalizer: dict[str, Any] | None = None) -> Path:
    """A Qwen2-like tokenizer with `tokens` added, numbered on unless they name an id."""
    model_dir = qwen_like(tmp_path)
    path = model_dir / "tokenizer.json"
    values = json.loads(path.read_text())
    for token in tokens:
        values["added_tokens"].append({"id": len(values["model"]["vocab"]) + len(values["added_tokens"]) - 2, **token})
    path.write_text(json.dumps({**values, "normalizer": normalizer}))
    return model_dir


def token(content: str, **flags: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


EXACT: dict[str, list[dict[str, Any]]] = {
    "not special": [token("<think>"), token("</think>")],
    "one begins another": [token("<a"), token("<a>"), token("<a><b>")],
    "runs of one character": [token("\n" * count) for count in range(2, 6)],
    "special and swallowing": [token("<mask_me>", lstrip=True, special=True), token("<|x|>", rstrip=True)],
    "overlapping control tokens": [token("xyz", special=True), token("zwvv", special=True)],
}


@pytest.mark.parametrize("case", EXACT)
def test_added_tokens_are_found_as_in_transformers(case: str, tmp_path: Path) -> None:
    assert differing(with_added(tmp_path, *EXACT[case]), tmp_path) == []


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, str]] = {
    "a gap": ([token("<|a|>", special=True), token("<|b|>", special=True, id=700)], None, "without gaps"),
    "swallows before": ([token("<think>", lstrip=True)], None, "swallows the white space"),
    "swallows after": ([token("<think>", rstrip=True)], None, "swallows the white space"),
    "a whole word": ([token("x y", single_word=True)], None, "single_word"),
    "overlap": ([token("xyz"), token("zwvv")], None, r"'xyzwvv'"),
    "overlap with spaces": ([token("  "), token(" world")], None, "'  world'"),
    "a control token inside": ([token("<|x|>", special=True), token("<|x|>more")], None, "overlap"),
    "before a control token": ([token("<|x|>", special=True), token("end<|")], None, "overlap"),
    "another normal form": ([token("cafe\u0301")], NFC, "normal form"),
    "never control in llama.cpp": ([token("<|start|>", special=True)], None, "whatever a person types"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_found_elsewhere_is_refused(case: str, tmp_path: Path) -> None:
    tokens, normalizer, reason = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        keys_of(with_added(tmp_path, *tokens, normalizer=normalizer))
    assert caught.value.hint


def test_a_normalized_token_is_no_matter(tmp_path: Path) -> None:
    assert differing(with_added(tmp_path, token("café", normalized=True), normalizer=NFC), tmp_path) == []


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_the_proof_spells_added_tokens(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another converter made may hold what ours refuses."""
    monkeypatch.setattr(bpe, "check_added_tokens", lambda tokens, *, normal_form: None)
    model_dir = with_added(tmp_path, token("<think>", **{flag: True}))
    tokenizer = GgufTokenizer.open(vocabulary_file(model_dir, tmp_path / "vocabulary.gguf"))
    check = check_tokenizer(load_reference(model_dir, template=None), tokenizer)
    tokenizer.close()
    assert not check.passed
    assert "<think>" in check.first_difference
