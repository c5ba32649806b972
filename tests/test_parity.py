"""The parity gate: right files of every kind of type pass, each wrong one fails at the check that should see it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from edgetune.artifacts import ParityReport
from edgetune.cli.main import run
from edgetune.cli.verify import command, report_values
from edgetune.errors import ParityError, UsageError
from edgetune.export import export_adapter, export_base
from edgetune.gguf_header import read_gguf_header
from edgetune.parity import verify
from edgetune.parity.bounds import ROUNDING, coarsest_type, fixed_bound, noise_bound
from edgetune.parity.distributions import Comparison, compare
from edgetune.parity.sequences import choose_sequences, threshold_length
from edgetune.parity.texts import random_texts, stress_texts
from edgetune.parity.verdict import require_passed
from edgetune.quantize import quantize
from tests.checkpoints import edit_json, write_checkpoint

slow = pytest.mark.slow

Edit = Callable[[str, NDArray[Any]], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama checkpoint in `hf`, its GGUF in f32 and f16, an rsLoRA adapter in `peft` and its GGUF."""
    folder = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(folder / "home"))
        base = write_checkpoint(folder / "hf", "llama")
        write_peft(folder / "peft", base)
        export_base(base, folder / "f32.gguf", outtype="f32")
        export_base(base, folder / "f16.gguf", outtype="f16")
        export_adapter(folder / "peft", folder / "lora.gguf", base_dir=base)
        yield folder


def write_peft(directory: Path, base_dir: Path, *, use_rslora: bool = True) -> Path:
    """An adapter whose B is not zero, as PEFT saves it."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = peft.LoraConfig(r=16, lora_alpha=16, use_rslora=use_rslora, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(str(directory))
    return directory


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of the GGUF `source` with its tensors edited in place."""
    shutil.copy(source, target)
    header = read_gguf_header(target)
    data = np.memmap(target, mode="r+", dtype=np.uint8)
    for tensor in header.tensors:
        start = header.data_start + tensor.offset
        dtype = {"F32": np.float32, "F16": np.float16}[tensor.type]
        edit(tensor.name, data[start : start + tensor.nbytes].view(dtype).reshape(tensor.shape[::-1]))
    data.flush()
    return target


def replace_bytes(source: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy of `source` with the first `old` replaced by `new` of the same length."""
    content = source.read_bytes()
    assert len(old) == len(new)
    assert old in content
    target.write_bytes(content.replace(old, new, 1))
    return target


def failed_check(report: ParityReport) -> str:
    return next((check.name for check in report.checks if not check.passed), "logits" if not report.passed else "")


def test_a_right_file_passes_with_room(files: Path) -> None:
    report = verify(files / "hf", files / "f16.gguf")
    assert report.passed
    assert report.logits is not None
    assert report.logits.max_kl < report.logits.bound / 20
    assert report.logits.positions > 200
    assert {check.name for check in report.checks} == {"tokenizer", "template", "stop", "structure"}
    assert report.not_checked == ()


@pytest.mark.parametrize(
    "quant_type", ["Q4_K_M", *(pytest.param(name, marks=slow) for name in ("Q8_0", "Q2_K", "BF16"))]
)
def test_right_files_of_coarse_types_pass(files: Path, tmp_path: Path, quant_type: str) -> None:
    quantize(files / "f32.gguf", tmp_path / "q.gguf", quant_type)
    report = verify(files / "hf", tmp_path / "q.gguf")
    assert report.passed, report
    assert report.logits is not None
    assert report.logits.bounded == "mean_kl"
    assert report.logits.mean_kl < report.logits.bound / 1.4


def swap_two_heads(name: str, weight: NDArray[Any]) -> None:
    if name == "blk.1.attn_q.weight":
        weight[:64] = np.roll(weight[:64], 32, axis=0)


def undo_the_rope_permutation(name: str, weight: NDArray[Any]) -> None:
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        rows = weight.reshape(-1, 16, 2, weight.shape[1])
        weight[:] = rows.swapaxes(1, 2).reshape(weight.shape).copy()


def zero_a_matrix(name: str, weight: NDArray[Any]) -> None:
    if name == "blk.1.ffn_down.weight":
        weight[:] = 0


def scale_a_norm(name: str, weight: NDArray[Any]) -> None:
    if name == "blk.1.ffn_norm.weight":
        weight *= 1.1


def shift_the_embedding(name: str, weight: NDArray[Any]) -> None:
    if name == "token_embd.weight":
        weight[:] = np.roll(weight, 1, axis=0)


def put_nan(name: str, weight: NDArray[Any]) -> None:
    if name == "output_norm.weight":
        weight[0] = np.nan


@pytest.mark.parametrize(
    "fault",
    [
        swap_two_heads,
        put_nan,
        *(
            pytest.param(fault, marks=slow)
            for fault in (undo_the_rope_permutation, zero_a_matrix, scale_a_norm, shift_the_embedding)
        ),
    ],
)
def test_a_wrong_tensor_fails(files: Path, tmp_path: Path, fault: Edit) -> None:
    report = verify(files / "hf", edited(files / "f16.gguf", tmp_path / "wrong.gguf", fault))
    assert failed_check(report) == "logits"
    with pytest.raises(ParityError, match="not what was trained: next-token"):
        require_passed(report)


@slow
@pytest.mark.parametrize("fault", [undo_the_rope_permutation, zero_a_matrix, shift_the_embedding])
@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_K_M"])
def test_a_wrong_tensor_fails_in_a_quantized_file(files: Path, tmp_path: Path, fault: Edit, quant_type: str) -> None:
    quantize(edited(files / "f32.gguf", tmp_path / "wrong.gguf", fault), tmp_path / "q.gguf", quant_type)
    assert failed_check(verify(files / "hf", tmp_path / "q.gguf")) == "logits"


def test_a_right_adapter_passes(files: Path) -> None:
    report = verify(files / "hf", files / "f16.gguf", adapter_dir=files / "peft", lora_path=files / "lora.gguf")
    assert report.passed, report
    assert report.lora_path == files / "lora.gguf"


@pytest.mark.parametrize(
    ("base_type", "scale", "seen"),
    [
        ("F16", 0.25, "logits"),
        pytest.param("Q4_K_M", 0.25, "adapter_effect", marks=slow),
        pytest.param("Q4_K_M", 2.0, "adapter_effect", marks=slow),
    ],
)
def test_a_wrongly_scaled_adapter_fails(files: Path, tmp_path: Path, base_type: str, scale: float, seen: str) -> None:
    def rescale(name: str, weight: NDArray[Any]) -> None:
        if name.endswith("lora_b"):
            weight *= scale

    lora = edited(files / "lora.gguf", tmp_path / "lora.gguf", rescale)
    base = files / "f16.gguf"
    if base_type != "F16":
        quantize(files / "f32.gguf", base := tmp_path / "q.gguf", base_type)
        assert verify(files / "hf", base, adapter_dir=files / "peft", lora_path=files / "lora.gguf").passed
    assert failed_check(verify(files / "hf", base, adapter_dir=files / "peft", lora_path=lora)) == seen


@slow
def test_a_merged_file_is_compared_with_both(files: Path, tmp_path: Path) -> None:
    export_base(files / "hf", tmp_path / "merged.gguf", outtype="f16", merge=files / "peft")
    assert verify(files / "hf", tmp_path / "merged.gguf", adapter_dir=files / "peft", merged=True).passed
    assert not verify(files / "hf", files / "f16.gguf", adapter_dir=files / "peft", merged=True).passed


def test_another_base_is_seen_before_anything_heavy(files: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llama", seed=5)
    report = verify(other, files / "f16.gguf")
    assert failed_check(report) == "structure"
    assert report.logits is None
    assert "another base" in next(check.first_difference for check in report.checks if not check.passed)


@slow
def test_an_adapter_of_another_base_is_seen(files: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llama", seed=5)
    lora = tmp_path / "lora.gguf"
    export_adapter(write_peft(tmp_path / "peft", other), lora, base_dir=other)
    report = verify(files / "hf", files / "f16.gguf", adapter_dir=tmp_path / "peft", lora_path=lora)
    assert failed_check(report) == "structure"


def test_a_wrong_pre_tokenizer_fails(files: Path, tmp_path: Path) -> None:
    wrong = replace_bytes(
        files / "f16.gguf", tmp_path / "w.gguf", b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0gpt-2"
    )
    report = verify(files / "hf", wrong)
    assert failed_check(report) == "tokenizer"
    check = report.checks[0]
    assert check.equal < check.checked
    assert "instead of" in check.first_difference


def test_another_template_fails_and_names_the_place(files: Path, tmp_path: Path) -> None:
    wrong = replace_bytes(files / "f16.gguf", tmp_path / "w.gguf", b"assistant\n", b"Assistant\n")
    report = verify(files / "hf", wrong)
    assert failed_check(report) == "template"
    assert "Assistant" in report.checks[1].first_difference


def test_a_stop_token_that_llama_cpp_would_miss_fails(files: Path, tmp_path: Path) -> None:
    base = shutil.copytree(files / "hf", tmp_path / "hf")
    edit_json(base / "generation_config.json", eos_token_id=[17, 18])
    report = verify(base, files / "f16.gguf")
    assert failed_check(report) == "stop"
    assert "17" in report.checks[2].first_difference


def test_metadata_that_contradicts_the_config_fails(files: Path, tmp_path: Path) -> None:
    base = shutil.copytree(files / "hf", tmp_path / "hf")
    edit_json(base / "config.json", rms_norm_eps=0.001)
    report = verify(base, files / "f16.gguf")
    assert failed_check(report) == "structure"
    assert "layer_norm_rms_epsilon" in report.checks[3].first_difference


@slow
def test_held_out_rows_are_what_is_predicted(files: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": "of and to"}]}
        for n in range(3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    with_data = verify(files / "hf", files / "f16.gguf", data_path=data).logits
    without = verify(files / "hf", files / "f16.gguf").logits
    assert with_data is not None
    assert without is not None
    assert with_data.positions != without.positions
    assert with_data.passed


def test_arguments_that_make_no_sense(files: Path) -> None:
    with pytest.raises(UsageError, match="--adapter without --lora"):
        verify(files / "hf", files / "f16.gguf", adapter_dir=files / "peft")
    with pytest.raises(UsageError, match="--lora without --adapter"):
        verify(files / "hf", files / "f16.gguf", lora_path=files / "lora.gguf")
    with pytest.raises(UsageError, match="merged"):
        verify(files / "hf", files / "f16.gguf", merged=True)


def test_the_command_prints_json_and_a_table(files: Path) -> None:
    arguments = [str(files / "hf"), str(files / "f16.gguf")]
    values = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).stdout)
    assert values["passed"] is True
    assert values["tokenizer"]["checked"] == values["tokenizer"]["equal"] > 200
    assert values["template"]["passed"] is True
    assert set(values["logits"]) >= {"mean_kl", "max_kl", "top1", "bound"}
    assert values["not_checked"] == []
    table = CliRunner().invoke(command, arguments)
    assert "token ids" in table.stdout
    assert "at most" in table.stdout


def test_the_command_exits_with_4(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = edited(files / "f16.gguf", tmp_path / "wrong.gguf", zero_a_matrix)
    assert run(["verify", str(files / "hf"), str(wrong), "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "Traceback" not in captured.err
    assert "not what was trained" in captured.err


_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from edgetune.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("missing", [("torch", "transformers", "peft"), pytest.param(("torch",), marks=slow)])
def test_without_torch_the_rest_is_checked(files: Path, missing: tuple[str, ...]) -> None:
    code = _WITHOUT.format(names=repr(missing))
    arguments = ["verify", str(files / "hf"), str(files / "f16.gguf"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["passed"] is True
    assert values["logits"] is None
    assert values["tokenizer"]["equal"] > 200
    assert values["structure"]["checked"] > 5
    assert any("edgetune[train]" in line for line in values["not_checked"])


def test_without_torch_a_wrong_tokenizer_still_fails(files: Path, tmp_path: Path) -> None:
    wrong = replace_bytes(
        files / "f16.gguf", tmp_path / "w.gguf", b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0gpt-2"
    )
    code = _WITHOUT.format(names=("torch", "transformers", "peft"))
    arguments = [sys.executable, "-c", code, "verify", str(files / "hf"), str(wrong)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "token ids" in done.stderr


def test_kl_is_what_it_should_be() -> None:
    p, q = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)), np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    result = compare([p, p], [p + 3, q])
    assert result.positions == 2
    assert result.max_kl == pytest.approx(0.25 * np.log(2), rel=1e-6)
    assert result.mean_kl == pytest.approx(result.max_kl / 2, rel=1e-6)
    assert result.top1 == 0.5


def test_nan_never_passes() -> None:
    result = Comparison()
    good = np.zeros((2, 4), np.float32)
    bad = good.copy()
    bad[1, 0] = np.nan
    result.add(good, bad)
    result.add(good, good)
    assert np.isnan(result.max_kl)
    assert np.isnan(result.mean_kl)


def test_bounds_follow_the_coarsest_type(files: Path) -> None:
    assert coarsest_type(read_gguf_header(files / "f16.gguf")) == "F16"
    assert fixed_bound("F16", is_moe=False, torch_dtype="float32") == (1e-3, "max_kl")
    assert fixed_bound("F16", is_moe=False, torch_dtype="bfloat16") is None
    assert fixed_bound("Q8_0", is_moe=False, torch_dtype="float32") is None
    assert noise_bound(0.01, is_moe=False)[0] == pytest.approx(0.04)
    assert ROUNDING["Q8_0"] < ROUNDING["Q6_K"] < ROUNDING["Q4_K"] < ROUNDING["Q2_K"]


def test_one_sequence_passes_the_window(tmp_path: Path) -> None:
    config = {"vocab_size": 300, "max_position_embeddings": 2048, "sliding_window": 700}
    sequences = choose_sequences(None, config, parameters=10**6, base_dir=tmp_path)
    assert threshold_length(config) == 700
    assert max(map(len, sequences)) > 700
    large = choose_sequences(None, config, parameters=7 * 10**9, base_dir=tmp_path)
    assert sum(map(len, large)) <= 512
    assert threshold_length({**config, "use_sliding_window": False}) == 0


def test_the_stress_set_is_the_same_every_time() -> None:
    tokens = ["<|im_start|>", "</s>"]
    assert stress_texts(tokens) == stress_texts(tokens)
    assert "" in stress_texts([])
    assert any("<|im_start|>" in text for text in stress_texts(tokens))
    assert len(stress_texts([f"<|reserved_{n}|>" for n in range(5000)])) < 400
    assert all(text.encode() for text in random_texts(200, seed=3))


@slow
def test_the_report_in_json_has_no_surprises(files: Path) -> None:
    values = report_values(verify(files / "hf", files / "f16.gguf"))
    assert json.loads(json.dumps(values)) == values
