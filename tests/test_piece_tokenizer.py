"""Marian and M2M100, whose SentencePiece pieces a vocab.json numbers: ids, texts and training as in transformers."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import edgetune
from edgetune.artifacts import Run
from edgetune.cli.main import run
from edgetune.errors import CorruptFileError, ExitCode
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.piece_tokenizer import PieceTokenizer, load_pieces
from tests.encoder_decoders import CORPUS

_SOURCES = [
    "the quick brown fox minds the dog", "is a dog lazy?", "the house, again and again", "over and out", "12 345 67",
    "the dog is at the house", "two are four", "nothing (at all!) in particular",
] * 6  # fmt: skip
_TARGETS = [
    "der flinke braune Fuchs beachtet den Hund", "ist ein Hund faul?", "das Haus, immer wieder", "Ende und aus",
    "12 345 67", "der Hund ist beim Haus", "zwei sind vier", "überhaupt nichts (im Besonderen!)",
] * 6  # fmt: skip
_TEXTS = ("", " ", "the dog", "  a  b ", "der Hund", "überhaupt ﬁ x\ty\n", "東京 🙂", "no ☃☃ here")
_FAMILIES = ("marian", "marian-two", "marian-apart", "m2m100")


def _pieces(directory: Path, name: str, lines: Sequence[str]) -> list[str]:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=90, hard_vocab_limit=False, minloglevel=2
    )
    (directory / name).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.IdToPiece(index) for index in range(3, processor.GetPieceSize())]


def write_piece_model(directory: Path, family: str) -> Path:
    """A random checkpoint of one of `_FAMILIES` with the files that its published ones have."""
    import torch
    import transformers
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    from tests.seq2seq_checkpoints import _bart_sizes, _randomize

    directory.mkdir(parents=True)
    settings: dict[str, Any] = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    own: dict[str, Any] = {}
    if family == "m2m100":
        pieces = _pieces(directory, "sentencepiece.bpe.model", [*_SOURCES, *_TARGETS])
        texts = ["<s>", "<pad>", "</s>", "<unk>", *pieces[:-4]]
        codes = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]
        settings = {"tokenizer_class": "M2M100Tokenizer", "src_lang": "de", "additional_special_tokens": codes}
        end, pad, size = 2, 1, len(texts) + 108
        kind, start = "M2M100ForConditionalGeneration", end
    else:
        sources, targets = _pieces(directory, "source.spm", _SOURCES), _pieces(directory, "target.spm", _TARGETS)
        shared = sources if family == "marian-apart" else [*dict.fromkeys([*targets, *sources])]
        # As in published files, numbers are not SentencePiece's, and some pieces have none.
        marks = [">>deu<<", ">>fra<<"] if family == "marian-two" else []
        texts = ["</s>", "<unk>", *shared[::-1][4:], *marks, "<pad>"]
        end, pad, size = 0, len(texts) - 1, len(texts)
        kind, start = "MarianMTModel", pad
        own = {"bad_words_ids": [[pad]], "forced_eos_token_id": end, "num_beams": 3, "max_length": 12}
        if family == "marian-apart":
            # transformers drops what has the number of the source's padding.
            apart = ["</s>", "<unk>", *targets]
            apart[pad:pad] = ["<pad>"]
            (directory / "target_vocab.json").write_text(json.dumps(dict(zip(apart, range(len(apart)), strict=True))))
            settings["separate_vocabs"] = True
    (directory / "vocab.json").write_text(json.dumps({text: index for index, text in enumerate(texts)}))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = _bart_sizes(size, start=start, end=end, pad=pad)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**{**sizes, "forced_eos_token_id": None}))
        _randomize(model, seed=0)
        if kind == "MarianMTModel":
            model.final_logits_bias[0, end] -= 7.5
        named = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": pad}
        model.generation_config = transformers.GenerationConfig(**named, **own)
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pieces")
    return {family: write_piece_model(base / family, family) for family in _FAMILIES}


def _theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It recommends a package that it makes no use of.
        return AutoTokenizer.from_pretrained(directory)


def _mine(directory: Path) -> PieceTokenizer:
    found = load_pieces(directory)
    assert found is not None
    return found


@pytest.mark.parametrize("family", _FAMILIES)
def test_ids_and_texts_are_those_of_transformers(family: str, models: dict[str, Path]) -> None:
    theirs, mine = _theirs(models[family]), _mine(models[family])
    for text in (*_TEXTS, *_SOURCES[:8], *_TARGETS[:8], *CORPUS[:5]):
        assert mine.encode(text) == theirs(text)["input_ids"]
        if family != "m2m100":
            ids = theirs(text_target=text)["input_ids"]
            assert mine.encode_target(text) == ids
        else:
            ids = mine.encode(text)
            theirs.src_lang = "fr"
            assert mine.encode_source(text, language="fr") == theirs(text)["input_ids"]
            theirs.src_lang = "de"
        spell = mine.speller(after=0)
        wanted = theirs.decode(ids, skip_special_tokens=True)
        assert mine.decode(ids).decode() == b"".join(map(spell, ids)).decode() == wanted
    some = [[(7 * start + 5 * place) % len(mine.target_ids) for place in range(9)] for start in range(40)]
    for ids in some:
        assert mine.decode(ids).decode() == theirs.decode(ids, skip_special_tokens=True)
        assert len(b"".join(mine.piece(token, special=True) for token in ids)) > 0


@pytest.mark.parametrize("family", _FAMILIES)
def test_what_is_typed_is_text(family: str, models: dict[str, Path]) -> None:
    mine = _mine(models[family])
    for text in ("</s>", "<pad>", "<unk>", "__fr__ a", ">>fra<< a"):
        ids = mine.encode(text, add_special=False)
        made = {*mine.control_ids.values(), *mine.marks.values()} - {mine.unk_id}
        assert len(ids) > 1
        assert not made & {*ids}
    # Characters that SentencePiece does not know come as one piece.
    assert mine._ids(_OnePiece(), "</s>", {"</s>": mine.eos_id}) == [mine.unk_id]


class _OnePiece:
    def encode(self, text: str, out_type: type) -> list[str]:
        return [text]


@pytest.mark.parametrize("family", ["marian", "marian-two", "m2m100"])
def test_answers_are_those_of_transformers(family: str, models: dict[str, Path]) -> None:
    import torch
    import transformers

    directory = models[family]
    theirs, model = _theirs(directory), transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    forced: dict[str, Any] = {}
    how: dict[str, Any] = {}
    before = ""
    if family == "m2m100":
        theirs.src_lang, forced = "en", {"forced_bos_token_id": theirs.get_lang_id("fr")}
        how = {"src_lang": "en", "tgt_lang": "fr"}
    elif family == "marian-two":
        before, how = ">>fra<<", {"tgt_lang": "fra"}
    with edgetune.load(directory, dtype="f32") as engine:
        for text in _SOURCES[:4]:
            source = torch.tensor([theirs(before + text)["input_ids"]])
            for beams in (1, 3):
                wanted = model.generate(source, max_new_tokens=9, num_beams=beams, do_sample=False, **forced)[
                    0
                ].tolist()
                said = engine.generate(text, max_tokens=9, num_beams=beams, **how)
                assert list(said.ids) == [one for one in wanted[1:] if one != theirs.eos_token_id]
                assert said.ids


def test_a_file_is_answered_as_its_model_asks_for(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import transformers

    directory = models["marian"]
    (tmp_path / "lines.txt").write_text("".join(f"{text}\n" for text in _SOURCES[:8]))
    assert run(["generate", str(directory), str(tmp_path / "lines.txt")]) == ExitCode.OK
    theirs, model = _theirs(directory), transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    sources = [torch.tensor([theirs(text)["input_ids"]]) for text in _SOURCES[:8]]
    wanted = [theirs.decode(model.generate(source)[0], skip_special_tokens=True) for source in sources]
    assert capsys.readouterr().out.splitlines() == wanted
    for command in (["convert", str(directory)], ["generate", str(directory), "a", "--engine", "llama"]):
        assert run(command) == ExitCode.UNSUPPORTED
        assert "no graph for MarianMTModel" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "target"), [("marian", "de"), ("marian-two", "deu"), ("m2m100", "de")])
def test_it_is_trained_on_translations(
    family: str, target: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.cli.train import tell_run
    from edgetune.training.bases import load_base_tokenizer

    pairs = zip(_SOURCES, [*_TARGETS[:-1], "\u6771\u4eac"], strict=True)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f"{json.dumps({'source': source, 'target': text})}\n" for source, text in pairs), encoding="utf-8"
    )
    heard: list[Any] = []
    asked: dict[str, Any] = {} if family == "marian" else {"src_lang": "en", "tgt_lang": target}
    done: Run = edgetune.train(
        model=str(models[family]),
        data=tmp_path / "rows.jsonl",
        out=tmp_path / "run",
        steps=2,
        eval_texts=4,
        valid_share=0,
        sink=heard.append,
        **asked,
    )
    assert done.finished
    assert any("targets have characters" in getattr(event, "text", "") for event in heard)
    capsys.readouterr()
    tell_run(done)
    assert f"Next: edgetune generate {done.path}\n" in capsys.readouterr().err
    assert run(["generate", str(done.path), "the dog", "-n", "6", "--num-beams", "1"]) == ExitCode.OK
    told = capsys.readouterr()
    assert told.out.strip()
    assert ("As in training" in told.err) == bool(asked)
    tokenizer = load_base_tokenizer(done.path, chat_template=None, now=None)
    assert tokenizer.encode("the dog") == _mine(models[family]).encode("the dog")
    whole, cut = (tokenizer.encode_whole("the dog is lazy", max_length=most) for most in (99, 5))
    assert (whole.cut, cut.cut) == (False, True)
    assert whole.ids.tolist() == _mine(models[family]).encode("the dog is lazy")
    assert (len(cut.ids), cut.ids[-1]) == (5, whole.ids[-1])
    if family == "marian-two":
        # Columns have their own names for languages.
        columns = tmp_path / "columns.jsonl"
        columns.write_text("".join(f'{{"en": "{one}", "de": "Hund"}}\n' for one in _SOURCES[:4]))
        command = [
            "train",
            "-m",
            str(models[family]),
            "-d",
            str(columns),
            "--src-lang",
            "en",
            "--steps",
            "1",
            "--dry-run",
        ]
        assert run([*command, "--tgt-lang", "deu"]) == ExitCode.OK
        assert run([*command, "--tgt-lang", "xyz"]) == ExitCode.USAGE
        assert "'xyz'" in capsys.readouterr().err
        command = [
            "train",
            "-m",
            str(models[family]),
            "-d",
            str(tmp_path / "rows.jsonl"),
            "-o",
            str(tmp_path / "other"),
        ]
        assert run(command) == ExitCode.USAGE
        assert "deu, fra" in capsys.readouterr().err


def test_explain_shows_pieces(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(models["marian"]), "the dog", "--json"]) == ExitCode.OK
    told = capsys.readouterr().out
    assert " dog" in told
    assert '"positions": "sinusoidal"' in told


def test_files_that_do_not_belong_together_are_told_of(models: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(models["marian"], copy)
    before = fingerprint_checkpoint(copy)
    shutil.copy(copy / "source.spm", copy / "target.spm")
    assert fingerprint_checkpoint(copy).tokenizer != before.tokenizer
    (copy / "target.spm").write_bytes(b"no model")
    with pytest.raises(CorruptFileError, match=r"target\.spm is no SentencePiece model"):
        load_pieces(copy)
    (copy / "target.spm").unlink()
    assert load_pieces(copy) is None
    shutil.copy(models["marian"] / "target.spm", copy)
    for vocabulary, message in (("{", "cannot be read"), ("[]", "does not number"), ('{"a": 1}', "has no </s>")):
        (copy / "vocab.json").write_text(vocabulary)
        with pytest.raises(CorruptFileError, match=message):
            load_pieces(copy)


@pytest.mark.parametrize("change", [{"src_lang": "xx"}, {"language_codes": "none"}])
def test_languages_that_m2m100_does_not_have_are_told_of(
    models: dict[str, Path], tmp_path: Path, change: dict[str, str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(models["m2m100"], copy)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))
    with pytest.raises(CorruptFileError, match="names languages that are unknown"):
        load_pieces(copy)
