"""Files that cannot be trained on, and tasks that cannot be trained on a file: one sentence each, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune
from edgetune.cli.main import run
from edgetune.errors import UnsupportedError
from edgetune.export import CONFIG_KEY, export_base
from tests.ggufs import base_gguf, checkpoint

Change = Callable[[Any], Any]


def rewrite(
    source: Path,
    path: Path,
    *,
    architecture: str = "llama",
    keys: Mapping[str, Any] = {},
    tensors: Mapping[str, Change | None] = {},
    vocabulary_only: bool = False,
) -> Path:
    """`source` with other `keys` (None: without) and changed `tensors` (None: without)."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, writer = GGUFReader(source), GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        inner = {"sub_type": field.types[-1]} if field.types[0] == GGUFValueType.ARRAY else {}
        writer.add_key_value(name.replace("llama.", f"{architecture}."), field.contents(), field.types[0], **inner)
    for name, value in keys.items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            (writer.add_uint16 if name.startswith("split.") else add)(name, value)
    for tensor in reader.tensors if not vocabulary_only else ():
        change = tensors.get(tensor.name, lambda data: data)
        if change is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(change(np.array(tensor.data))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"fox {n}", "completion": f"dog {n}"}) + "\n" for n in range(6)))
    return path


def refusal(path: Path, rows: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """The exit code of training on `path`, and what it says."""
    out = rows.with_name("run")
    code = run(["train", "-m", str(path), "-d", str(rows), "-o", str(out), "--steps", "10", *more])
    told = capsys.readouterr().err
    assert not (out / "adapter_model.safetensors").exists()
    assert told.count("error: ") == 1
    assert "did not expect" not in told
    return code, told.split("error: ")[1]


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "a matrix with too few rows": ({"tensors": {"blk.0.ffn_up.weight": lambda d: d[:-32]}}, 1, "480 x 256"),
    "rotary rows too few": ({"tensors": {"blk.0.attn_q.weight": lambda d: d[:-32]}}, 1, "224 x 256"),
    "a matrix with too few columns": ({"tensors": {"blk.1.ffn_down.weight": lambda d: d[:, :-32]}}, 1, "256 x 480"),
    "a vector too short": ({"tensors": {"blk.0.attn_norm.weight": lambda d: d[:-1]}}, 1, "is 255"),
    "a smaller vocabulary": ({"tensors": {"token_embd.weight": lambda d: d[:-3]}}, 1, "embed_tokens.weight"),
    "a tensor missing": ({"tensors": {"blk.1.ffn_up.weight": None}}, 1, "lacks the tensor 'blk.1.ffn_up.weight'"),
    "more layers than there are": ({"keys": {"llama.block_count": 5}}, 1, "lacks the tensor 'blk.2."),
    "no number of layers": ({"keys": {"llama.block_count": None}}, 1, "does not say its llama.block_count"),
    "no number of heads": ({"keys": {"llama.attention.head_count": None}}, 1, "llama.attention.head_count"),
    "heads that do not fit": ({"keys": {"llama.attention.head_count": 3}}, 1, "cannot read what model"),
    "no epsilon": ({"keys": {"llama.attention.layer_norm_rms_epsilon": None}}, 1, "layer_norm_rms_epsilon"),
    "no vocabulary": ({"keys": {"tokenizer.ggml.tokens": None}}, 3, "has no vocabulary"),
    "a vocabulary alone": ({"vocabulary_only": True}, 1, "it has no tensors"),
    "an unknown architecture": ({"architecture": "nope"}, 3, "architecture 'nope'"),
    "one that transformers alone knows": ({"architecture": "falcon"}, 3, "architecture 'falcon'"),
    "an encoder": ({"architecture": "bert"}, 3, "architecture 'bert'"),
    "an encoder-decoder": ({"architecture": "t5"}, 3, "architecture 't5'"),
    "a part of a model": (
        {"keys": {"split.count": 2, "split.no": 0}, "tensors": {"blk.1.ffn_up.weight": None}},
        3,
        "one of 2 files",
    ),
    "a config that names no model": ({"keys": {CONFIG_KEY: "{}"}}, 1, "names no model_type"),
    "a config that is no JSON": ({"keys": {CONFIG_KEY: "{nope"}}, 1, "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_trained_on(
    name: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, code, words = BAD[name]
    path = rewrite(base_gguf("llama"), tmp_path / "bad.gguf", **changes)
    found, told = refusal(path, rows, capsys)
    assert (found, words in told) == (code, True), told
    assert "bad.gguf" in told


@pytest.mark.parametrize("own", [False, True])
def test_a_file_cut_short(own: bool, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = export_base(checkpoint("llama"), tmp_path / "own.gguf", quant="Q4_K_M").path if own else base_gguf("llama")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-5000])
    code, told = refusal(cut, rows, capsys)
    assert code == 1
    assert "truncated" in told


LABELLED = [{"text": f"fox {n}", "label": "ab"[n % 2]} for n in range(8)]
OTHER_TASKS: dict[str, list[dict[str, Any]]] = {
    "classification": LABELLED,
    "regression": [{"text": f"fox {n}", "score": float(n)} for n in range(8)],
    "embedding": [{"anchor": f"fox {n}", "positive": f"dog {n}"} for n in range(8)],
    "seq2seq": [{"source": f"fox {n}", "target": f"dog {n}"} for n in range(8)],
}


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_a_task_with_a_head_of_its_own(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", OTHER_TASKS[task])
    code, told = refusal(base_gguf("llama"), data, capsys, "--task", task)
    assert code == 3
    assert f"is a GGUF file; {task} is trained on Hugging Face directories" in told
    assert "hint:  Give the directory that the file was made from" in told


@pytest.mark.parametrize("more", [("--dry-run",), ("--find-lr",), ("--sweep", "lr=1e-4,1e-3")])
def test_it_is_refused_however_it_is_asked(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", LABELLED)
    code, told = refusal(base_gguf("llama"), data, capsys, "--task", "classification", *more)
    assert code == 3
    assert "is a GGUF file" in told


def test_it_is_refused_from_python(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", LABELLED)
    with pytest.raises(UnsupportedError, match="is a GGUF file"):
        edgetune.train(model=str(base_gguf("llama")), data=str(data), out=str(tmp_path / "run"), task="classification")


def test_plan_refuses_what_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewrite(base_gguf("llama"), tmp_path / "part.gguf", keys={"split.count": 2, "split.no": 0})
    assert run(["plan", "-m", str(path)]) == 3
    assert "one of 2 files" in capsys.readouterr().err
    assert run(["plan", "-m", str(base_gguf("mixtral"))]) == 3
    assert "mixture of experts" in capsys.readouterr().err


def test_weights_in_blocks_are_not_trained_themselves(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refusal(base_gguf("llama"), rows, capsys, "--modules-to-save", "lm_head")
    assert code == 2
    assert "stay in their blocks" in told


@pytest.mark.parametrize("base", [checkpoint, base_gguf])
def test_pissa_does_not_start_stacks_of_experts(
    base: Callable[[str], Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = refusal(base("mixtral"), rows, capsys, "--method", "pissa")
    assert code == 2
    assert "starts linear layers only" in told


def test_targets_are_those_of_the_checkpoint(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refusal(base_gguf("llama"), rows, capsys, "--target-modules", "nope")
    assert code == 2
    assert "hint:  Modules that can be adapted: down_proj, embed_tokens, gate_proj" in told
    code, told = refusal(base_gguf("llama"), rows, capsys, "--rank", "999")
    assert code == 2
    assert "rank above 256" in told
