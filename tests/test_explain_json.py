"""What `edgetune explain --json` and `--attention` give: readable sizes, and all of it where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgetune.cli.explain import command
from tests.checkpoints import build_bpe_tokenizer
from tests.ggufs import base_gguf
from tests.seq2seq_checkpoints import write_seq2seq


def test_the_json_tells_of_each_head_what_it_looks_at_most(tmp_path: Path) -> None:
    text, maps = "the lazy dog and the quick fox " * 40, tmp_path / "maps.npz"
    runner = CliRunner()
    shown = runner.invoke(command, [str(base_gguf("llama")), text, "-n", "1", "--json", "--attention", str(maps)])
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout) < 150_000
    stack = json.loads(shown.stdout)["runs"][0]["stacks"][0]
    assert not {"attention", "cross_attention"} & set(stack)
    with np.load(maps) as file:
        assert list(file) == ["runs.0.stacks.0.attention"]
        attention = file["runs.0.stacks.0.attention"]
    tokens = len(stack["tokens"])
    assert tokens > 200
    assert (attention.dtype, attention.shape) == (np.float16, (2, 8, tokens, tokens))
    for block, rows in zip(stack["blocks"], attention[:, :, -1].astype(np.float64), strict=True):
        for head, row in zip(block["heads"], rows, strict=True):
            assert head["entropy"] == pytest.approx(-(row * np.log(row + 1e-30)).sum(), abs=1e-3)
            assert [share for _, share in head["looks_at"]] == pytest.approx(np.sort(row)[::-1][:5], rel=1e-4)
            assert [row[token] for token, _ in head["looks_at"]] == pytest.approx(np.sort(row)[::-1][:5], rel=1e-4)


def test_attention_alone_is_written_without_a_page_and_refused_where_it_is_not_told(tmp_path: Path) -> None:
    import transformers

    target = tmp_path / "maps.npz"
    source = write_seq2seq(tmp_path / "bart", "bart")
    result = CliRunner().invoke(command, [str(source), "fox", "-n", "1", "--attention", str(target)])
    assert (result.exit_code, result.stdout) == (0, "")
    with np.load(target) as file:
        assert set(file) == {f"runs.0.stacks.{name}" for name in ("0.attention", "1.attention", "1.cross_attention")}
    target.unlink()
    config = transformers.MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    build_bpe_tokenizer().save_pretrained(tmp_path / "mamba")
    arguments = [str(tmp_path / "mamba"), "fox", "-n", "1", "--engine", "torch", "--attention", str(target)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code
    assert "does not tell" in str(result.exception)
    assert not target.exists()
