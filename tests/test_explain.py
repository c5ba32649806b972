"""What explain shows of a model is what torch computes in it: states, attention, guesses, distributions, adapters."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgetune.cli.main import run
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_run import explain_checkpoint, sampled_shares
from edgetune.explain.filters import iter_filters
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import Explanation
from edgetune.explain.words import percent, visible
from edgetune.export import export_adapter, export_base
from tests.adapters import write_adapter
from tests.checkpoints import DECODERS, randomize, write_checkpoint
from tests.encoders import write_encoder
from tests.ggufs import base_gguf, checkpoint

PROMPT = "The quick brown fox jumps over the lazy dog and 42 cats"
GREEDY = Sampling(temp=0.0, seed=1)


def compare(ours: Explanation, torch: Explanation) -> None:
    for mine, other in zip(ours.runs, torch.runs, strict=True):
        mine_stack, other_stack = mine.stacks[-1], other.stacks[-1]
        assert [token.id for token in mine_stack.tokens] == [token.id for token in other_stack.tokens]
        assert len(mine_stack.blocks) == len(other_stack.blocks)
        assert mine_stack.attention is not None
        assert other_stack.attention is not None
        np.testing.assert_allclose(mine_stack.attention, other_stack.attention, atol=2e-3)
        for block, expected in zip(mine_stack.blocks, other_stack.blocks, strict=True):
            assert block.norm == pytest.approx(expected.norm, rel=1e-2)
            assert block.lens.guesses[0].id == expected.lens.guesses[0].id
            assert block.lens.guesses[0].probability == pytest.approx(expected.lens.guesses[0].probability, abs=5e-3)
            assert block.lens.by_token == expected.lens.by_token
        assert mine.entropy == pytest.approx(other.entropy, abs=1e-2)
        assert [step.id for step in mine.steps] == [step.id for step in other.steps]


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_every_block_says_in_llama_cpp_what_it_says_in_torch(family: str) -> None:
    ours = explain_gguf(base_gguf(family), PROMPT, sampling=GREEDY, steps=3)
    torch = explain_checkpoint(checkpoint(family), PROMPT, sampling=GREEDY, steps=3)
    assert not ours.notes
    assert not torch.notes
    compare(ours, torch)
    mine, other = ours.anatomy.stacks[0], torch.anatomy.stacks[0]
    for name in ("layers", "hidden_size", "heads", "kv_heads", "head_size", "positions", "window"):
        assert getattr(mine, name) == getattr(other, name), name
    assert ours.anatomy.tied == torch.anatomy.tied
    assert (mine.rope is None) == (other.rope is None)
    if mine.rope and other.rope:
        for name in ("base", "scaling", "window_base"):
            assert getattr(mine.rope, name) == getattr(other.rope, name), name
        if family != "gemma3":  # Both of its blocks have a window: torch has no other table.
            assert mine.rope.wavelengths == pytest.approx(other.rope.wavelengths, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "short_factor": [1 + 0.02 * pair for pair in range(16)],
                "long_factor": [1.5 + 0.1 * pair for pair in range(16)],
            },
        ),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_positions_turn_as_the_models_own_table_says(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0, **settings}, "max_position_embeddings": 512}
    if settings["rope_type"] == "longrope":
        changes["original_max_position_embeddings"] = 256
    source = write_checkpoint(tmp_path / family, family, overrides=changes)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    ours = explain_gguf(tmp_path / "model.gguf", PROMPT, sampling=GREEDY, steps=1)
    torch = explain_checkpoint(source, PROMPT, sampling=GREEDY, steps=1)
    compare(ours, torch)
    mine, other = ours.anatomy.stacks[0].rope, torch.anatomy.stacks[0].rope
    assert mine is not None
    assert other is not None
    assert mine.dimensions == other.dimensions
    assert mine.wavelengths == pytest.approx(other.wavelengths, rel=1e-4)
    assert mine.angles == pytest.approx(other.angles, abs=0.1)
    assert bool(ours.notes) == (settings["rope_type"] == "longrope")


def test_base_and_adapter_side_by_side(tmp_path: Path) -> None:
    base_dir = checkpoint("llama")
    peft_dir = write_adapter(tmp_path / "peft", base_dir, target_modules=["q_proj", "down_proj", "lm_head"])
    lora = export_adapter(peft_dir, tmp_path / "lora.gguf", base_dir=base_dir, outtype="f32").path
    ours = explain_gguf(base_gguf("llama"), PROMPT, lora=[LoraSpec(lora, 0.5)], sampling=GREEDY, steps=2)
    torch = explain_checkpoint(base_dir, PROMPT, lora=[LoraSpec(peft_dir, 0.5)], sampling=GREEDY, steps=2)
    assert len(ours.runs) == len(torch.runs) == 2
    compare(ours, torch)
    for block, expected in zip(ours.runs[1].stacks[0].blocks, torch.runs[1].stacks[0].blocks, strict=True):
        assert block.lens.kl_from_base == pytest.approx(expected.lens.kl_from_base, rel=0.05, abs=1e-4)
        assert block.lens.kl_from_base
    assert all(block.lens.kl_from_base is None for block in ours.runs[0].stacks[0].blocks)
    adapted = {part.name for block in ours.anatomy.stacks[0].blocks for part in block if part.adapted}
    assert adapted == {"attn_q.weight", "ffn_down.weight"}
    assert [part.adapted for part in ours.anatomy.stacks[0].head if part.name == "output.weight"] == [(8,)]


def test_a_prompt_of_several_batches_is_put_together() -> None:
    text = "the lazy dog and the quick fox " * 12
    ours = explain_gguf(base_gguf("qwen2"), text, sampling=GREEDY, steps=1)
    torch = explain_checkpoint(checkpoint("qwen2"), text, sampling=GREEDY, steps=1)
    assert len(ours.runs[0].stacks[0].tokens) > 64
    compare(ours, torch)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temp=0.7, top_k=5, top_p=1.0, min_p=0.0),
        Sampling(temp=1.0, top_k=0, top_p=0.6, min_p=0.0),
        Sampling(temp=1.3, top_k=0, top_p=1.0, min_p=0.2),
        Sampling(temp=1.0, top_k=0, top_p=1.0, min_p=0.0, typical=0.5),
        Sampling(),
        Sampling(temp=0.0),
    ],
)
def test_the_filters_keep_what_llama_cpps_own_chain_keeps(sampling: Sampling) -> None:
    with LlamaEngine.open(base_gguf("llama"), ctx_size=256) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        logits = engine.logits(ids)[-1].copy()
        chosen = engine.generate(ids, replace(sampling, seed=1), max_tokens=1, top=500)
        for _ in chosen:
            pass
        options = list(chosen.choices[0].alternatives)
    kept = {option.id for option in options if option.sampled > 0}
    assert list(iter_filters(logits, sampling))[-1].kept == len(kept)
    shares = sampled_shares(logits, sampling)
    assert set(np.flatnonzero(shares).tolist()) == kept
    for option in options:
        assert shares[option.id] == pytest.approx(option.sampled, abs=2e-3)


def test_encoder_decoders_show_both_sides(tmp_path: Path) -> None:
    import torch
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer(chat_template=None)
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = explain_checkpoint(tmp_path, PROMPT, sampling=GREEDY, steps=4)
    assert not shown.notes
    encoder, decoder = shown.runs[0].stacks
    assert (encoder.name, len(encoder.blocks), decoder.name, len(decoder.blocks)) == ("encoder", 2, "decoder", 3)
    assert decoder.cross_attention is not None
    assert decoder.cross_attention.shape == (3, 4, len(decoder.tokens), len(encoder.tokens))
    ids = torch.tensor([[token.id for token in encoder.tokens]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1)[0, 1:].tolist()
    steps = [step.id for step in shown.runs[0].steps]
    assert steps == expected[: len(steps)]
    assert decoder.blocks[-1].lens.guesses[0].id == steps[0]
    assert shown.runs[0].steps[0].options[0].id == steps[0]
    assert "Attention to the source" in page(shown)


def test_classifiers_show_their_scores(tmp_path: Path) -> None:
    import torch
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer(chat_template=None)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, num_labels=3, id2label={0: "good", 1: "bad", 2: "so <b>so"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = explain_checkpoint(tmp_path, PROMPT)
    ids = torch.tensor([[token.id for token in shown.runs[0].stacks[0].tokens]])
    with torch.no_grad():
        expected = model(ids).logits.softmax(-1)[0].tolist()
    assert list(shown.runs[0].scores) == ["good", "bad", "so <b>so"]
    assert list(shown.runs[0].scores.values()) == pytest.approx(expected, abs=1e-4)
    assert "so &lt;b&gt;so" in page(shown)


def test_the_page_stands_alone_and_escapes_everything() -> None:
    shown = explain_gguf(base_gguf("llama"), 'the </script><script>alert("x")</script> & fox', sampling=GREEDY, steps=2)
    text = page(shown)
    assert text.count("</script>") == text.count("<script")
    assert "alert(" not in text.replace("alert(&quot;", "")
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    for title in ("Prompt", "Tokens", "Embedding", "Blocks", "Head", "The next token"):
        assert f"</span>{title}</h2>" in text


def values_of(text: str, part: str) -> list[dict[str, Any]]:
    """What the elements with the attribute `part` tell the page's script."""
    found = re.findall(rf"<div {part}[^>]*><script type=application/json>(.*?)</script>", text)
    return [json.loads(one) for one in found]


def test_the_pages_script_gets_the_values_that_were_computed() -> None:
    shown = explain_gguf(base_gguf("llama"), PROMPT, sampling=GREEDY, steps=2)
    text, run_ = page(shown), shown.runs[0]
    (maps,) = values_of(text, "data-maps")
    attention = run_.stacks[0].attention
    assert attention is not None
    assert maps["causal"]
    below = np.tril_indices(attention.shape[-1])
    for told, levels, expected in (("mean", 255, attention.mean(1)), ("each", maps["levels"], attention)):
        shades = np.frombuffer(zlib.decompress(base64.b64decode(maps[told])), np.uint8)
        shares = (shades / levels).reshape(*expected.shape[:-2], -1) ** 2
        np.testing.assert_allclose(shares, expected[..., below[0], below[1]], atol=0.005)
    (rope,) = values_of(text, "data-rope")
    assert rope["last"] == len(run_.stacks[0].tokens) - 1
    (choice,) = values_of(text, "data-sampler")
    assert choice["shares"][0] == pytest.approx(run_.steps[0].options[0].probability, rel=1e-4)
    assert len(choice["shares"]) + sum(count for _, count in choice["tail"]) == shown.anatomy.vocabulary
    mass = sum(choice["shares"]) + sum(count * np.exp(log) for log, count in choice["tail"])
    assert mass == pytest.approx(1.0, abs=0.02)


def test_guesses_at_every_token_come_with_their_probability() -> None:
    ours = explain_gguf(base_gguf("gemma2"), PROMPT, sampling=GREEDY, steps=1).runs[0].stacks[0].blocks
    torch = explain_checkpoint(checkpoint("gemma2"), PROMPT, sampling=GREEDY, steps=1).runs[0].stacks[0].blocks
    for mine, other in zip(ours, torch, strict=True):
        assert mine.lens.by_token_shares == pytest.approx(other.lens.by_token_shares, abs=5e-3)
        assert mine.lens.by_token_shares[-1] == pytest.approx(mine.lens.guesses[0].probability, abs=1e-4)


def test_the_command_prints_six_steps_and_json() -> None:
    runner = CliRunner()
    from edgetune.cli.explain import command

    plain = runner.invoke(command, [str(base_gguf("llama")), PROMPT, "--temp", "0", "-n", "2"])
    assert plain.exit_code == 0, plain.output
    for number, title in enumerate(("Prompt", "Tokens", "Embedding", "Blocks", "Head", "The next token"), 1):
        assert f"{number} {title}" in plain.stdout
    as_json = runner.invoke(command, [str(base_gguf("llama")), PROMPT, "--temp", "0", "-n", "2", "--json"])
    values = json.loads(as_json.stdout)
    assert values["anatomy"]["parameters"] > 0
    assert len(values["runs"][0]["steps"]) == 2
    assert len(values["runs"][0]["stacks"][0]["blocks"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{model}", ""], 2, "The prompt is empty"),
        (["{model}", "the " * 2000], 2, "explain shows up to 512"),
        (["{model}", "fox", "--chat"], 2, "has no chat template"),
        (["{model}", "fox", "--engine", "torch"], 2, "is a GGUF file"),
        (["{model}", "fox", "--stop", "x"], 2, "takes no --stop"),
        (["{model}", "fox", "-n", "0"], 2, "at least one token"),
        (["nowhere.gguf", "fox"], 2, "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(base_gguf("llama", chat_template=None))
    assert run(["explain", *(argument.format(model=model) for argument in arguments)]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_page_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "page.html"
    arguments = ["explain", str(base_gguf("llama")), "fox", "-n", "1", "--html", str(target)]
    assert run(arguments) == 0
    assert target.read_text(encoding="utf-8").endswith("</html>\n")
    before = target.read_bytes()

    def cut(explanation: Explanation) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgetune.explain.html.page", cut)
    assert run(arguments) == 5
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    assert "Traceback" not in capsys.readouterr().err


def test_control_characters_of_a_token_do_not_act() -> None:
    assert visible("a\x1b[31m b\n") == "a\\x1b[31m·b⏎"
    assert visible("\u202e") == "\\x202e"
    assert visible("") == "∅"


def test_shares_for_people() -> None:
    assert [percent(value) for value in (1.0, 0.999, 0.5, 0.0312, 0.00003, 0.0, 25.0)] == [
        "100 %", "100 %", "50 %", "3.1 %", "<0.01 %", "0 %", "2,500 %",
    ]  # fmt: skip


def test_a_head_that_came_with_an_adapter_speaks(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    from edgetune.artifacts import RUN_RECORD, Fingerprint, Run
    from edgetune.paths import write_json
    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer(chat_template=None)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.BertModel(config)
    randomize(base)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4))
    randomize(adapted, seed=1)
    adapted.save_pretrained(tmp_path / "run")
    run = Run(
        tmp_path / "run", tmp_path / "base", "base", Fingerprint(), "classification", data={"labels": ["a", "b", "c"]}
    )
    write_json(tmp_path / "run" / RUN_RECORD, run.record())

    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    reference = peft.PeftModel.from_pretrained(reference, tmp_path / "run").eval()
    shown = explain_checkpoint(tmp_path / "base", PROMPT, lora=[LoraSpec(tmp_path / "run")])
    assert len(shown.runs) == 1
    assert "head came with the adapter" in shown.notes[0]
    ids = torch.tensor([[token.id for token in shown.runs[0].stacks[0].tokens]])
    with torch.no_grad():
        expected = reference(ids).logits.softmax(-1)[0].tolist()
    assert list(shown.runs[0].scores) == ["a", "b", "c"]
    assert list(shown.runs[0].scores.values()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_what_a_prompt_spells_stays_text_in_torch_as_in_llama_cpp(chat: bool) -> None:
    prompt = "fox <|im_end|>\n<|im_start|>system dog"
    torch = explain_checkpoint(checkpoint("llama"), prompt, chat=chat, sampling=GREEDY, steps=1)
    ours = explain_gguf(base_gguf("llama"), prompt, chat=chat, sampling=GREEDY, steps=1)
    tokens = [[token.id for token in shown.runs[0].stacks[0].tokens] for shown in (torch, ours)]
    assert tokens[0] == tokens[1]
    control = [token.piece for token in torch.runs[0].stacks[0].tokens if token.control]
    assert control == (["<|im_start|>", "<|im_end|>", "<|im_start|>"] if chat else [])


def test_a_vocabulary_of_characters_shows_source_and_target_in_their_own(shared_data: Path) -> None:
    shown = explain_checkpoint(shared_data / "models" / "g2p-bart-us", "hello", sampling=GREEDY, steps=8)
    source, target = shown.runs[0].stacks
    assert [token.piece for token in source.tokens[1:-1]] == list("hello")
    # It writes BOS first, which stands for no character.
    assert "".join(step.piece for step in shown.runs[0].steps if not step.ends) == "<1>hˈɛlO"
    assert len(target.tokens) >= 1


def test_an_adapter_of_another_base_is_refused_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, base_dir = base_gguf("llama", seed=5), checkpoint("llama")
    peft_dir = write_adapter(tmp_path / "peft", base_dir, target_modules=["q_proj"])
    lora = export_adapter(peft_dir, tmp_path / "lora.gguf", base_dir=base_dir, outtype="f32").path
    for arguments in ([str(base_gguf("llama")), "fox"], [str(other), "fox", "--force"]):
        assert run(["explain", *arguments, "--lora", str(lora), "-n", "1", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert run(["explain", str(other), "fox", "--lora", str(lora)]) == 3
    assert "was trained on" in capsys.readouterr().err


def test_a_run_of_another_base_is_refused_in_torch_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgetune.artifacts import RUN_RECORD, Run
    from edgetune.fingerprint import fingerprint_checkpoint
    from edgetune.paths import write_json

    base_dir, other = checkpoint("llama"), checkpoint("llama", seed=5)
    run_dir = write_adapter(tmp_path / "run", base_dir, target_modules=["q_proj"])
    record = Run(run_dir, base_dir, "llama", fingerprint_checkpoint(base_dir), "completion")
    write_json(run_dir / RUN_RECORD, record.record())
    arguments = ["explain", str(other), "fox", "--engine", "torch", "--lora", f"{run_dir}:0.5", "-n", "1", "--json"]
    assert run(arguments) == 3
    assert "was trained on llama" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["runs"]] == ["base", "run:0.5"]


def test_two_runs_fit_on_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    from edgetune.cli.explain import command

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    name = "an-adapter-with-a-rather-long-name-of-more-than-one-word"
    peft_dir = write_adapter(tmp_path / name, checkpoint("llama"), target_modules=["q_proj"])
    arguments = [str(checkpoint("llama")), "fox \x1b[31m \u202e", "--engine", "torch", "--lora", str(peft_dir)]
    shown = CliRunner().invoke(command, [*arguments, "--temp", "0", "-n", "2"])
    assert shown.exit_code == 0, shown.output
    assert max(map(cell_len, shown.stdout.split("\n"))) <= 80
    assert "\x1b" not in shown.stdout
    assert "\u202e" not in shown.stdout
    (title,) = [line for line in shown.stdout.split("\n") if line.split()[:1] == ["block"]]
    assert title.split()[:2] == ["block", "state"]
    rows = [line.split() for line in shown.stdout.split("\n") if re.match(r" +\d+ +\d+\.\d", line)]
    assert len(rows) == 2
    assert all(float(row[-1]) > 0 for row in rows)


def test_labels_are_written_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"id2label": {0: "as before", 1: "better now"}, "label2id": {"as before": 0, "better now": 1}}
    source = write_encoder(tmp_path / "bert", "bert", "ForSequenceClassification", overrides=names)
    assert run(["explain", str(source), "the fox"]) == 0
    assert "as·before" not in capsys.readouterr().out
    text = page(explain_checkpoint(source, "the fox"))
    assert "<bdi>as before</bdi>" in text
