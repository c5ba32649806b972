"""The bridge to the converters: what a file says about its origin, which base is meant, whole files or none."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import BASE_NAME_KEY, RUN_RECORD, RUN_RECORD_KEY, Fingerprint, Run
from edgetune.errors import CorruptFileError, MismatchError, ResourceError, UnsupportedError, UsageError
from edgetune.events import Event, Notice, Progress
from edgetune.export import export_adapter, export_base, find_base_dir, model_name, resolve_outtype
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf_header
from edgetune.library import register
from tests.adapters import write_adapter
from tests.checkpoints import CHATML, edit_json, write_checkpoint


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "tiny", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def peft_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("peft") / "mine", base_dir, target_modules=["q_proj"])


def make_run(peft_dir: Path, base_dir: Path, run_dir: Path, **changes: Any) -> Run:
    """A run directory: the adapter with a record of the base it was trained on."""
    shutil.copytree(peft_dir, run_dir)
    run = Run(run_dir, base_dir, base_dir.name, fingerprint_checkpoint(base_dir), finished=True)
    run = dataclasses.replace(run, **changes)
    (run_dir / RUN_RECORD).write_text(json.dumps(run.record()), encoding="utf-8")
    return run


def test_a_model_says_where_it_came_from(base_dir: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    gguf = export_base(base_dir, tmp_path / "tiny.gguf", sink=events.append)
    assert (gguf.kind, gguf.architecture, gguf.file_type, gguf.base_name) == ("model", "llama", "BF16", "tiny")
    assert gguf.fingerprint == fingerprint_checkpoint(base_dir)
    written = [event for event in events if isinstance(event, Progress) and event.stage == "write"]
    assert written[-1].done == written[-1].total
    assert any("blk.0.attn_q.weight [256 × 256]" in event.label for event in written)


@pytest.mark.parametrize("name", ["Q4_K_M", "q8_0", "Q5_K"])
def test_quantizing_in_one_go_leaves_nothing_else(base_dir: Path, tmp_path: Path, name: str) -> None:
    gguf = export_base(base_dir, tmp_path / "tiny.gguf", quant=name, threads=1)
    assert gguf.file_type == {"Q5_K": "Q5_K_M"}.get(name, name.upper())
    assert gguf.fingerprint == fingerprint_checkpoint(base_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_types_are_told_before_anything_is_written(base_dir: Path, tmp_path: Path) -> None:
    assert resolve_outtype(base_dir) == "BF16"
    assert resolve_outtype(base_dir, "q8_0") == "Q8_0"
    assert resolve_outtype(write_checkpoint(tmp_path / "wide", "llama")) == "F16"


def test_an_adapter_carries_base_template_and_record(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    run = make_run(peft_dir, base_dir, tmp_path / "run")
    gguf = export_adapter(run.path, tmp_path / "adapter.gguf")
    assert (gguf.kind, gguf.file_type, gguf.base_name) == ("adapter", "F16", "tiny")
    assert gguf.fingerprint == run.fingerprint
    metadata = read_gguf_header(gguf.path).metadata
    assert metadata["tokenizer.chat_template"] == CHATML
    assert json.loads(str(metadata[RUN_RECORD_KEY])) == run.record()
    assert metadata[BASE_NAME_KEY] == metadata["general.base_model.0.name"] == "tiny"


def test_a_merged_model_is_another_base(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    gguf = export_base(base_dir, tmp_path / "merged.gguf", merge=peft_dir)
    base = fingerprint_checkpoint(base_dir)
    assert gguf.fingerprint.differences(base) == ["weights"]
    assert gguf.base_name == "tiny+mine"


def test_a_plain_peft_directory_finds_its_base(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    assert find_base_dir(peft_dir) == base_dir
    copied = Path(shutil.copytree(peft_dir, tmp_path / "copied"))
    edit_json(copied / "adapter_config.json", base_model_name_or_path="someone/tiny")
    with pytest.raises(UsageError, match=r"someone/tiny.*not on this machine") as caught:
        find_base_dir(copied)
    assert "--base" in caught.value.hint
    edit_json(copied / "adapter_config.json", base_model_name_or_path="tiny")
    register(base_dir)
    assert find_base_dir(copied) == base_dir


def test_a_base_in_the_hugging_face_cache_is_found(
    base_dir: Path, peft_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(base_dir, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    copied = Path(shutil.copytree(peft_dir, tmp_path / "copied"))
    edit_json(copied / "adapter_config.json", base_model_name_or_path="someone/tiny")
    found = find_base_dir(copied)
    assert (found.name, model_name(found)) == ("abc123", "tiny")


def test_a_run_finds_a_base_that_moved(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    run = make_run(peft_dir, base_dir, tmp_path / "run", base_path=tmp_path / "gone", base_name="gone")
    with pytest.raises(UsageError, match="not on this machine"):
        find_base_dir(run.path)
    register(base_dir)
    assert find_base_dir(run.path) == base_dir


def test_a_run_of_another_base_is_refused(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    run = make_run(peft_dir, base_dir, tmp_path / "run")
    other = write_checkpoint(tmp_path / "other", "llama", seed=1, dtype="bfloat16")
    with pytest.raises(MismatchError, match="weights differ"):
        export_adapter(run.path, tmp_path / "out.gguf", base_dir=other)
    with pytest.raises(MismatchError, match="weights differ"):
        export_base(other, tmp_path / "out.gguf", merge=run.path)
    assert not (tmp_path / "out.gguf").exists()


def test_a_changed_template_is_a_warning(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    fingerprint = dataclasses.replace(fingerprint_checkpoint(base_dir), template="0" * 64)
    run = make_run(peft_dir, base_dir, tmp_path / "run", fingerprint=fingerprint)
    events: list[Event] = []
    export_adapter(run.path, tmp_path / "out.gguf", sink=events.append)
    assert [event.level for event in events if isinstance(event, Notice)] == ["warning"]


def test_unknown_fingerprints_are_no_mismatch(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    run = make_run(peft_dir, base_dir, tmp_path / "run", fingerprint=Fingerprint())
    export_adapter(run.path, tmp_path / "out.gguf")


def test_the_converters_errors_become_ours(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base_dir, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CorruptFileError):
        export_base(broken, tmp_path / "out.gguf")
    strange = Path(shutil.copytree(base_dir, tmp_path / "strange"))
    edit_json(strange / "config.json", architectures=["FooForCausalLM"])
    with pytest.raises(UnsupportedError, match="FooForCausalLM"):
        export_base(strange, tmp_path / "out.gguf")
    dora = write_adapter(tmp_path / "dora", base_dir, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        export_adapter(dora, tmp_path / "out.gguf")
    with pytest.raises(UsageError):
        export_base(base_dir, tmp_path / "out.gguf", quant="Q9")
    with pytest.raises(UsageError, match="COPY"):
        export_base(base_dir, tmp_path / "out.gguf", quant="COPY")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "dora", "strange"]


def test_a_full_disk_is_said_before_writing(
    base_dir: Path, peft_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError):
        export_base(base_dir, tmp_path / "out.gguf", quant="Q4_K_M")
    with pytest.raises(ResourceError):
        export_adapter(peft_dir, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(base_dir: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_base(base_dir, tmp_path / "out.gguf", quant="Q4_K_M", sink=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_neither_torch_nor_transformers_is_imported(base_dir: Path, peft_dir: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from edgetune.export import export_adapter, export_base
export_base(Path({str(base_dir)!r}), Path({str(tmp_path / "a.gguf")!r}), quant="Q4_K_M")
export_adapter(Path({str(peft_dir)!r}), Path({str(tmp_path / "b.gguf")!r}))
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
