"""Tokens that are a part of a character: their bytes, and the character where it is complete, in every vocabulary."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from edgetune.cli.main import run
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_run import explain_checkpoint
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import Explanation
from edgetune.explain.spelling import Spelling, completed, named, segments
from edgetune.explain.words import visible
from edgetune.export import export_base
from tests.checkpoints import edit_json, write_checkpoint
from tests.encoders import LABELS, write_encoder
from tests.ggufs import base_gguf, checkpoint

TEXT = "the 火 of ümlaut 🦊"
GREEDY = Sampling(temp=0.0, seed=1)


def text_of(shown: Explanation) -> str:
    """The text that the shown tokens spell."""
    tokens = shown.runs[0].stacks[0].tokens
    return b"".join(token.piece.encode(errors="surrogateescape") for token in tokens).decode()


def write_sentencepiece_llama(directory: Path) -> Path:
    """A random Llama with SentencePiece's kind of vocabulary: letters, and bytes for all other characters."""
    write_checkpoint(directory, "llama", chat_template=None)
    control = ["<unk>", "<s>", "</s>"]
    signs = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    tokenizer = Tokenizer(
        models.BPE(
            {sign: at for at, sign in enumerate(signs)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in control])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    edit_json(
        directory / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False,
    )  # fmt: skip
    edit_json(directory / "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=None)
    return directory


@pytest.mark.parametrize("vocabulary", ["byte-level", "sentencepiece"])
def test_both_engines_show_the_bytes_and_the_character_they_make(vocabulary: str, tmp_path: Path) -> None:
    if vocabulary == "sentencepiece":
        source, gguf = write_sentencepiece_llama(tmp_path / "llama"), tmp_path / "model.gguf"
        export_base(source, gguf, outtype="f32")
    else:
        source, gguf = checkpoint("llama"), base_gguf("llama")
    torch = explain_checkpoint(source, TEXT, sampling=GREEDY, steps=2)
    llama = explain_gguf(gguf, TEXT, sampling=GREEDY, steps=2)
    for shown in (torch, llama):
        tokens = shown.runs[0].stacks[0].tokens
        assert TEXT in text_of(shown)
        assert [token.completes for token in tokens if token.completes] == ["火", "ü", "🦊"]
        assert "\ufffd" not in json.dumps(shown.record(), ensure_ascii=False)
        text = page(shown)
        text.encode()
        assert "\ufffd" not in text
        assert "→ <bdi>火</bdi>" in text
    mine, other = torch.runs[0].stacks[0], llama.runs[0].stacks[0]
    assert [(one.piece, one.completes) for one in mine.tokens] == [(one.piece, one.completes) for one in other.tokens]
    assert [one.lens.by_token for one in mine.blocks] == [one.lens.by_token for one in other.blocks]
    assert "".join(named(token.piece) for token in mine.tokens).endswith("<0xF0><0x9F><0xA6><0x8A>")


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForMaskedLM"])
def test_an_unknown_word_is_text_and_its_doing_is_told(kind: str, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "bert", "bert", kind, overrides=LABELS)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    for shown in (explain_checkpoint(source, "the 🦊 fox"), explain_gguf(tmp_path / "model.gguf", "the 🦊 fox")):
        (run_,) = shown.runs
        known = {token.piece: token.control for token in run_.stacks[0].tokens}
        assert known["[UNK]"] is False
        assert known["[CLS]"] is known["[SEP]"] is True
        if kind == "ForSequenceClassification":
            place = [token.piece for token in run_.stacks[0].tokens].index("[UNK]")
            assert run_.effects[place]


def test_a_letter_that_is_read_from_the_right_keeps_its_bytes_on_the_left() -> None:
    # Without a mark a browser turns "⟨95⟩→ו" around: the letter decides, and digits do not.
    text = page(explain_gguf(base_gguf("llama"), "שלום", sampling=GREEDY, steps=1))
    assert "\u200e⟨95⟩→ו" in text
    assert "\u200e⟨A9⟩→ש" in text


def test_the_terminal_and_json_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(base_gguf("llama")), TEXT, "-n", "1"]) == 0
    told = capsys.readouterr().out
    assert "⟨E7⟩" in told
    assert "⟨AB⟩→火" in told
    assert "�" not in told
    assert run(["explain", str(base_gguf("llama")), TEXT, "-n", "1", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["runs"][0]["stacks"][0]["tokens"]
    assert [token["piece"] for token in tokens if token["completes"] == "火"] == ["<0xAB>"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([b"a", b"\xe2\x82", b"\xac b"], ["", "", "€"]),
        ([b"\xe2", b"\x82", b"\xac"], ["", "", "€"]),
        ([b"\xe2", b"a"], ["", ""]),
        ([b"\xac", b"\xf0\x9f", b"\xa6\x8a\xc3", b"\xbc"], ["", "", "🦊", "ü"]),
        ([b"\xed\xa0\x80", b"", b"\xff"], ["", "", ""]),
    ],
)
def test_a_character_is_told_where_it_ends(raw: list[bytes], expected: list[str]) -> None:
    pieces = [one.decode(errors="surrogateescape") for one in raw]
    assert completed(pieces) == expected


def test_bytes_and_text_are_told_apart() -> None:
    piece = b"a\xe2\x82 \n".decode(errors="surrogateescape")
    assert list(segments(piece)) == [("a", False), ("E2 82", True), (" \n", False)]
    assert visible(piece) == "a⟨E2 82⟩·⏎"
    assert named(piece) == "a<0xE2><0x82> \n"
    assert visible("") == "∅"
    # What a text spells is no byte.
    assert list(segments("<0xE2>�")) == [("<0xE2>�", False)]


def test_a_replacement_character_of_the_text_is_itself(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "�": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="a"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spelled = Spelling(JsonTokenizer(tokenizer.to_str())).pieces(range(6))
    assert [named(piece) for piece in spelled] == ["a", "�", "<0xE2>", "<0x82>", "<0xAC>", "b"]
    assert [visible(piece) for piece in spelled] == ["a", "�", "⟨E2⟩", "⟨82⟩", "⟨AC⟩", "b"]
