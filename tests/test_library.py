"""The library: names and paths, deleted files, runs, an adapter's base, and which adapter fits which base."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune import library
from edgetune.artifacts import RUN_RECORD, RUN_RECORD_KEY, BaseModel, Fingerprint, Gguf, Run
from edgetune.cli.models import command
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError, UsageError
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf
from edgetune.library.index import Entry, entry_name
from tests.gguf_files import BASE, MODEL_SHAPES, OTHER_BASE, write_adapter, write_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries if not entry.embedded]


def write_run(directory: Path, base: Path, *, fingerprint: Fingerprint = BASE) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    run = Run(path=directory, base_path=base, base_name="base", fingerprint=fingerprint)
    (directory / RUN_RECORD).write_text(json.dumps(run.record()))
    return directory


def write_safetensors_dir(directory: Path, *, architecture: str = "LlamaForCausalLM") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": 8}))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" * 8)
    return directory


def test_a_registered_file_is_found_by_name(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base-F16.gguf")
    library.register(path)
    assert names(library.list_models()) == ["base-F16"]
    assert library.find_model("base-F16") == path


def test_the_newest_of_two_with_one_name_wins(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        library.register(write_model(tmp_path / folder / "base.gguf"))
    assert library.find_model("base") == tmp_path / "b" / "base.gguf"


def test_registering_twice_lists_once(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    library.register(path)
    assert names(library.list_models()) == ["base"]


def test_deleted_files_are_dropped(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    path.unlink()
    assert names(library.list_models()) == []


def test_files_in_the_librarys_folder_are_listed() -> None:
    write_model(Path(os.environ["EDGETUNE_HOME"]) / "models" / "dropped.gguf")
    assert names(library.list_models()) == ["dropped"]


def test_damaged_entries_do_not_break_the_list(tmp_path: Path) -> None:
    folder = Path(os.environ["EDGETUNE_HOME"]) / "library"
    folder.mkdir()
    (folder / "broken.json").write_text("{")
    damaged = write_model(tmp_path / "damaged.gguf")
    library.register(damaged)
    damaged.write_bytes(b"GGUF")
    assert names(library.list_models()) == []


def test_a_read_only_home_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGETUNE_HOME", str(blocked / "home"))
    library.register(write_model(tmp_path / "base.gguf"))
    assert names(library.list_models()) == []


def test_a_typo_names_the_nearest(tmp_path: Path) -> None:
    path = write_model(tmp_path / "support-F16.gguf")
    library.register(path)
    with pytest.raises(UsageError, match="suport-F16") as caught:
        library.find_model("suport-F16")
    assert "Did you mean 'support-F16'?" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        library.find_model(str(tmp_path / "suport-F16.gguf"))
    assert f"Did you mean {str(path)!r}?" in caught.value.hint


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without config\.json"):
        library.find_model(str(tmp_path))


def test_a_name_wins_over_a_directory_that_is_no_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    Path("base").mkdir()
    assert library.find_model("base") == path


def test_remove_forgets_and_deletes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    library.remove("base")
    assert path.exists()
    assert names(library.list_models()) == []
    library.register(path)
    library.remove(str(path), delete=True)
    assert not path.exists()
    with pytest.raises(UsageError):
        library.remove("base")


def test_a_run_resolves_to_its_base_and_newest_adapter(tmp_path: Path) -> None:
    base = write_model(tmp_path / "models" / "base.gguf")
    run = write_run(tmp_path / "runs" / "one", tmp_path / "models")
    old = write_adapter(run / "adapter-F16.gguf")
    new = write_adapter(run / "adapter-Q8_0.gguf")
    os.utime(old, (1, 1))
    assert library.resolve_model(str(run)) == library.Resolved(base, new)
    assert library.resolve_model(str(old)) == library.Resolved(base, old)


def test_a_run_without_an_adapter_file_says_how_to_make_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path / "nowhere")
    with pytest.raises(UsageError) as caught:
        library.resolve_model(str(run))
    assert "edgetune convert" in caught.value.hint


def test_the_base_is_found_by_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    adapter = read_gguf(write_adapter(tmp_path / "runs" / "one" / "adapter-F16.gguf"))
    write_model(tmp_path / "runs" / "one" / "other.gguf", fingerprint=OTHER_BASE)
    assert library.find_base_for(adapter) is None
    for place in (Path.cwd() / "b.gguf", tmp_path / "runs" / "b.gguf", tmp_path / "runs" / "one" / "b.gguf"):
        model = write_model(place)
        found = library.find_base_for(adapter)
        assert found is not None
        assert found.path == model.resolve()
        model.unlink()
    library.register(write_model(tmp_path / "far" / "away.gguf"))
    assert isinstance(library.find_base_for(adapter.fingerprint), Gguf)


def test_of_several_bases_the_newest_file_wins(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a", "c")):
        path = write_model(Path.cwd() / f"{name}.gguf")
        os.utime(path, (number, number))
    found = library.find_base_for(BASE)
    assert found is not None
    assert found.path.name == "c.gguf"


def test_a_checkpoint_is_the_base_when_there_is_no_gguf(tmp_path: Path) -> None:
    model_dir = write_safetensors_dir(tmp_path / "hf")
    fingerprint = fingerprint_checkpoint(model_dir)
    found = library.find_base_for(fingerprint, search=[model_dir])
    assert isinstance(found, BaseModel)
    assert found.architecture == "LlamaForCausalLM"
    assert library.find_base_for(Fingerprint(), search=[model_dir]) is None


def test_a_pair_that_belongs_together_passes(tmp_path: Path) -> None:
    base = read_gguf(write_model(tmp_path / "base.gguf"))
    library.check_pair(base, read_gguf(write_adapter(tmp_path / "a.gguf", targets=MODEL_SHAPES)))


def test_another_base_is_named(tmp_path: Path) -> None:
    base = read_gguf(write_model(tmp_path / "base.gguf", fingerprint=OTHER_BASE))
    adapter = read_gguf(write_adapter(tmp_path / "a.gguf"))
    with pytest.raises(MismatchError, match=r"trained on 'base'.*the weights differ"):
        library.check_pair(base, adapter)


def test_another_template_alone_is_no_other_base(tmp_path: Path) -> None:
    changed = Fingerprint(BASE.weights, BASE.tokenizer, "4" * 64)
    base = read_gguf(write_model(tmp_path / "base.gguf", fingerprint=changed))
    library.check_pair(base, read_gguf(write_adapter(tmp_path / "a.gguf")))


def test_another_tokenizer_is_another_base(tmp_path: Path) -> None:
    changed = Fingerprint(BASE.weights, "4" * 64, "5" * 64)
    base = read_gguf(write_model(tmp_path / "base.gguf", fingerprint=changed))
    with pytest.raises(MismatchError, match="tokenizer and template differ"):
        library.check_pair(base, read_gguf(write_adapter(tmp_path / "a.gguf")))


def test_without_fingerprints_names_and_shapes_decide(tmp_path: Path) -> None:
    base = read_gguf(write_model(tmp_path / "base.gguf", fingerprint=Fingerprint()))
    library.check_pair(base, read_gguf(write_adapter(tmp_path / "ok.gguf", fingerprint=Fingerprint())))
    wrong_shape = write_adapter(tmp_path / "a.gguf", targets={"blk.0.attn_q.weight": (16, 24)})
    with pytest.raises(MismatchError, match=r"16 × 24; in .* it is 16 × 16"):
        library.check_pair(base, read_gguf(wrong_shape))
    wrong_name = write_adapter(tmp_path / "b.gguf", targets={"blk.7.attn_q.weight": (16, 16)})
    with pytest.raises(MismatchError, match="does not have"):
        library.check_pair(base, read_gguf(wrong_name))
    wrong_arch = write_adapter(tmp_path / "c.gguf", arch="qwen2")
    with pytest.raises(MismatchError, match="'qwen2' model"):
        library.check_pair(base, read_gguf(wrong_arch))


@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
def test_adapters_of_a_tied_embedding_never_reach_llama_cpp(tmp_path: Path, name: str) -> None:
    base = read_gguf(write_model(tmp_path / "base.gguf", tied=True))
    adapter = read_gguf(write_adapter(tmp_path / "a.gguf", targets={name: (40, 16)}))
    with pytest.raises(UnsupportedError, match="embedding and as head") as caught:
        library.check_pair(base, adapter)
    assert "--merge" in caught.value.hint


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CorruptFileError, match="one half"):
        library.check_pair(read_gguf(write_model(tmp_path / "base.gguf")), read_gguf(tmp_path / "a.gguf"))


def test_model_and_adapter_exchanged(tmp_path: Path) -> None:
    base, adapter = read_gguf(write_model(tmp_path / "b.gguf")), read_gguf(write_adapter(tmp_path / "a.gguf"))
    with pytest.raises(UsageError, match="is an adapter"):
        library.check_pair(adapter, adapter)
    with pytest.raises(UsageError, match="is a model"):
        library.check_pair(base, base)


def test_models_list_and_path(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    listed = CliRunner().invoke(command, ["list", "--json"])
    rows = [row for row in json.loads(listed.stdout) if not row["embedded"]]
    assert [(row["name"], row["kind"], row["path"]) for row in rows] == [("base", "model", str(path))]
    assert CliRunner().invoke(command, ["path", "base"]).stdout.strip() == str(path)
    assert "base" in CliRunner().invoke(command, []).stdout


def test_models_show_describes_a_gguf_and_its_adapters(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    adapter = write_adapter(tmp_path / "run" / "adapter-F16.gguf")
    library.register(adapter)
    shown = json.loads(CliRunner().invoke(command, ["show", str(path), "--json"]).stdout)
    assert shown["architecture"] == "llama"
    assert shown["parameters"] == 40 * 16 * 2 + 16 * 16 + 32 * 16
    assert (shown["layers"], shown["context"]) == (1, 128)
    assert shown["adapters"] == [str(adapter)]
    assert shown["fingerprint"]["weights"] == BASE.weights
    assert "none known" not in CliRunner().invoke(command, ["show", str(path)]).stdout


def test_models_show_describes_a_checkpoint(tmp_path: Path) -> None:
    model_dir = write_safetensors_dir(tmp_path / "hf")
    shown = json.loads(CliRunner().invoke(command, ["show", str(model_dir), "--json"]).stdout)
    assert (shown["kind"], shown["parameters"], shown["hidden_size"]) == ("checkpoint", 2, 8)
    assert shown["types"] == {"F32": 2}


def test_models_rm(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    library.register(path)
    assert CliRunner().invoke(command, ["rm", "base", "--delete"]).exit_code == 0
    assert not path.exists()


def test_rm_of_a_name_that_two_have_asks_which(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / folder / "same.gguf") for folder in ("a", "b")]
    for path in paths:
        library.register(path)
    with pytest.raises(UsageError, match="2 entries") as caught:
        library.remove("same")
    assert all(str(path) in caught.value.hint for path in paths)
    assert library.remove(str(paths[0])).path == paths[0]
    assert library.remove("same").path == paths[1]


def test_adapters_are_described_by_rank_targets_and_training(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", tmp_path)
    (run_dir / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}')
    record = json.dumps({"created": "2026-01-02T03:04:05", "data": {"paths": ["/data/rows.jsonl"]}})
    path = write_adapter(run_dir / "adapter-F32.gguf", metadata={RUN_RECORD_KEY: record})
    of_file, of_run = library.describe(path), library.describe(run_dir)
    assert (of_file.rank, of_file.alpha, of_file.targets) == (4, 4.0, ("attn_q",))
    assert of_file.trained == "2026-01-02 on rows.jsonl"
    assert (of_run.rank, of_run.alpha, of_run.targets) == (8, 16.0, ("q_proj", "v_proj"))
    write_adapter(path, metadata={RUN_RECORD_KEY: "{broken"})
    assert library.describe(path).trained == ""


def test_what_is_being_written_is_no_model_yet(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / ".base.gguf.host-1.unproven.gguf")
    adapter = read_gguf(write_adapter(tmp_path / "models" / "tuned.gguf"))
    assert library.find_base_for(adapter) is None
    write_model(tmp_path / "models" / "base.gguf")
    assert library.find_base_for(adapter) is not None


def test_piped_lists_have_one_line_an_entry(tmp_path: Path) -> None:
    path = write_model(tmp_path / ("long" * 20) / "base.gguf")
    library.register(path)
    lines = CliRunner().invoke(command, ["list"]).stdout.splitlines()
    assert lines[0].split() == ["name", "kind", "size", "changed", "path"]
    assert [line for line in lines if line.endswith(str(path))]
    assert all(line == line.rstrip() for line in lines)


def test_a_sentence_model_whose_transformer_has_its_own_directory(tmp_path: Path) -> None:
    model = tmp_path / "sentences"
    write_safetensors_dir(model / "0_Transformer", architecture="BertModel")
    assert library.classify(model) is None
    (model / "modules.json").write_text('[{"path": "0_Transformer", "type": "models.Transformer"}]')
    assert library.classify(model) == "checkpoint"
    assert library.describe(model).architecture == "BertModel"
    assert library.describe(model).fingerprint.weights == fingerprint_checkpoint(model / "0_Transformer").weights
    (model / "modules.json").write_text('[{"path": "../elsewhere", "type": "models.Transformer"}]')
    write_safetensors_dir(tmp_path / "elsewhere")
    assert library.classify(model) is None


def test_an_adapter_file_goes_by_its_run_but_not_by_the_librarys_own_folder(tmp_path: Path) -> None:
    folder = Path(os.environ["EDGETUNE_HOME"]).resolve() / "models"
    assert entry_name(folder / "adapter-F16.gguf", "adapter") == "adapter-F16"
    assert entry_name(tmp_path / "mine" / "adapter-F16.gguf", "adapter") == "mine"
