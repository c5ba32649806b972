"""`edgetune generate` with encoder-decoders: the engine it picks, tasks, languages, lines, beams, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.cli.main import run
from edgetune.export import export_adapter, export_base
from edgetune.fingerprint import fingerprint_checkpoint
from tests.conftest import SHARED_DATA
from tests.seq2seq_checkpoints import TEXTS, write_seq2seq
from tests.test_engine_torch_seq2seq import write_lora
from tests.test_layers import loaded_after


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_seq2seq(tmp_path_factory.mktemp("t5") / "flan", "flan-t5")
    export_base(directory, directory.parent / "flan.gguf", outtype="f32")
    return directory.parent / "flan.gguf"


@pytest.fixture(scope="module")
def mbart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seq2seq(tmp_path_factory.mktemp("mbart") / "mbart", "mbart50")


def values(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert run(["generate", *arguments, "--json", "-n", "6"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["generate", *arguments]) in (2, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_t5_answers_through_llama_without_torch(t5: Path) -> None:
    assert loaded_after(["generate", str(t5), TEXTS[0], "-n", "4"]) == {"code": 0, "loaded": []}


def test_the_likeliest_token_unless_a_sampling_flag_is_given(t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first,), (second,) = (values(capsys, str(t5), TEXTS[0], "--num-beams", "1") for _ in range(2))
    assert first["tokens"] == second["tokens"]
    hot = [values(capsys, str(t5), TEXTS[0], "--temp", "3", "--top-k", "0", "--seed", str(seed)) for seed in (1, 2)]
    assert hot[0][0]["tokens"] != hot[1][0]["tokens"]
    (beams,) = values(capsys, str(t5), TEXTS[0], "--num-beams", "3", "--length-penalty", "0.5")
    assert isinstance(beams["score"], float)
    assert "does not sample" in refused(capsys, str(t5), "x", "--num-beams", "3", "--temp", "1")
    assert "are for a beam search" in refused(capsys, str(t5), "x", "--length-penalty", "2")


def test_lines_are_answered_in_order(t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(TEXTS[:4]) + "\n", encoding="utf-8")
    rows = values(capsys, str(t5), str(path))
    assert [row["text"] for row in rows] == [values(capsys, str(t5), text)[0]["text"] for text in TEXTS[:4]]
    assert run(["generate", str(t5), str(path), "-n", "6"]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    path.write_text("rain\n\nbread\n", encoding="utf-8")
    assert "line 2: the text is empty" in refused(capsys, str(t5), str(path))


def test_lines_in_batches_are_answered_as_alone_and_bad_ones_left_out(
    t5: Path, mbart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.opening.answers.AT_ONCE", 5)
    good = [f"{text} {text}" if number % 3 else text for number, text in enumerate(TEXTS[:8])]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*good[:3], "", *good[3:6], "rain " * 600, *good[6:]]) + "\n", encoding="utf-8")
    for model in (t5, mbart):
        assert "line 4: the text is empty" in refused(capsys, str(model), str(path))
        assert run(["generate", str(model), str(path), "--json", "-n", "6", "--skip-bad"]) == 0
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["tokens"] for row in rows] == [values(capsys, str(model), text)[0]["tokens"] for text in good]
        assert "line 4: the text is empty" in captured.err
        assert "line 8: The text has" in captured.err


def test_a_task_puts_the_familys_words_before_the_text(t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {
        ("--task", "summarize"): "summarize: rain",
        ("--task", "translate"): "translate English to German: rain",
        ("--task", "translate", "--src-lang", "fr", "--tgt-lang", "ro_RO"): "translate French to Romanian: rain",
        ("--task", "qa", "--context", "old trains"): "question: rain context: old trains",
    }
    for flags, source in pairs.items():
        assert values(capsys, str(t5), "rain", *flags)[0]["tokens"] == values(capsys, str(t5), source)[0]["tokens"]
    assert "not trained on the language 'xx'" in refused(
        capsys, str(t5), "rain", "--task", "translate", "--tgt-lang", "xx"
    )
    assert "needs what the question is about" in refused(capsys, str(t5), "--whole", "rain", "--task", "qa")
    assert "is for models that chat" in refused(capsys, str(t5), "rain", "--system", "x")


def test_what_llama_has_no_graph_for_runs_in_torch(mbart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(mbart), "rain", "-n", "6", "--tgt-lang", "de", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("it runs in torch") == 1
    answer = json.loads(captured.out)
    assert answer["engine"] == "torch"
    assert answer["tokens"] != values(capsys, str(mbart), "rain", "--tgt-lang", "ro")[0]["tokens"]
    assert "no language 'xx'" in refused(capsys, str(mbart), "rain", "--src-lang", "xx")
    assert "needs the language to translate to" in refused(capsys, str(mbart), "rain", "--task", "translate")
    assert "learned none" in refused(capsys, str(mbart), "rain", "--task", "summarize")
    assert "no graph for MBart" in refused(capsys, str(mbart), "rain", "--engine", "llama")
    assert "is for llama.cpp" in refused(capsys, str(mbart), "rain", "-ngl", "3")


def test_a_run_brings_its_base(mbart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_lora(tmp_path / "lora", mbart)
    plain = values(capsys, str(mbart), TEXTS[0])
    adapted = values(capsys, str(adapter), TEXTS[0])
    assert adapted[0]["tokens"] == values(capsys, str(mbart), TEXTS[0], "--lora", str(adapter))[0]["tokens"]
    assert adapted[0]["tokens"] != plain[0]["tokens"]
    assert values(capsys, str(mbart), TEXTS[0], "--lora", f"{adapter}:0")[0]["tokens"] == plain[0]["tokens"]


def write_record(run_dir: Path, base: Path, **data: str) -> None:
    fingerprint = fingerprint_checkpoint(base)
    record = Run(run_dir, base, "base", fingerprint, task="seq2seq", data=data).record()
    (run_dir / RUN_RECORD).write_text(json.dumps(record))


def test_texts_are_given_as_the_adapter_was_trained_on_them(
    t5: Path, mbart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_lora(tmp_path / "mbart", mbart)
    assert run(["generate", str(adapter), "rain", "-n", "6"]) == 0
    assert "--tgt-lang says in which" in capsys.readouterr().err
    write_record(adapter, mbart, source_prefix="", src_lang="de", tgt_lang="ro")
    asked = values(capsys, str(adapter), "rain", "--src-lang", "de", "--tgt-lang", "ro")[0]["tokens"]
    assert values(capsys, str(adapter), "rain")[0]["tokens"] == asked
    assert values(capsys, str(mbart), "rain", "--lora", f"{adapter}:0")[0]["tokens"] != asked
    base = t5.parent / "flan"
    adapter = write_lora(tmp_path / "flan", base)
    write_record(adapter, base, source_prefix="summarize: ")
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=base, outtype="f32")
    lora = ("--lora", str(tmp_path / "lora.gguf"))
    whole = values(capsys, str(t5), "summarize: rain and bread", *lora)[0]["tokens"]
    assert values(capsys, str(t5), "rain and bread", *lora)[0]["tokens"] == whole
    assert values(capsys, str(t5), "rain and bread", *lora, "--task", "translate")[0]["tokens"] != whole
    assert run(["generate", str(t5), "rain", *lora, "-n", "4"]) == 0
    assert "every text begins with 'summarize: '" in capsys.readouterr().err


def test_it_is_not_converted_and_chat_says_where_it_answers(
    mbart: Path, t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(mbart), "-o", str(tmp_path / "out.gguf")]) == 3
    message = capsys.readouterr().err
    assert "no graph for MBartForConditionalGeneration" in message
    assert "edgetune generate" in message
    assert not list(tmp_path.iterdir())
    assert run(["chat", str(t5), "--plain"]) == 3
    assert "edgetune generate" in capsys.readouterr().err


def test_decoders_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Beam search runs on encoder-decoders" in refused(capsys, "pocket", "hi", "--num-beams", "2")
    assert "are for encoder-decoders" in refused(capsys, "pocket", "hi", "--task", "summarize")
    assert "--dtype is for models in torch" in refused(capsys, "pocket", "hi", "--dtype", "bf16")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("flags", [(), ("--num-beams", "4"), ("--dtype", "int8"), ("--dtype", "bf16")])
def test_a_genuine_bart_spells_words(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(SHARED_DATA / "models" / "g2p-bart-us"), "hello", *flags]) == 0
    assert capsys.readouterr().out == "h\u02c8\u025blO\n"


def test_chat_refuses_before_it_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer(chat_template=None)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert run(["chat", str(tmp_path / "bert"), "--plain"]) == 3
    told = capsys.readouterr().err
    assert "writes no text" in told
    assert "edgetune embed" in told
    assert "Converting" not in told
