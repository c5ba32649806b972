"""Recipes on the command line: each that comes along fits its task, flags win, paths are seen from the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import run
from edgetune.training.settings import RECIPES
from tests.checkpoints import write_checkpoint
from tests.task_models import WORDS, write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
CHATS: Rows = [{"prompt": word, "completion": f" {word}!"} for word in WORDS]
DATA: dict[str, tuple[str, Rows]] = {
    "chat": ("llama", CHATS),
    "small-memory": ("llama", CHATS),
    "qlora": ("llama", CHATS),
    "dpo": ("llama", [{"prompt": word, "chosen": f" {word}!", "rejected": " no"} for word in WORDS]),
    "classification": ("bert", [{"text": f"the {word}", "label": word[0]} for word in WORDS]),
    "embedding": ("bert", [{"anchor": f"the {word}", "positive": word} for word in WORDS]),
    "translation": ("t5", [{"source": word, "target": f"{word} {word}"} for word in WORDS]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = write_checkpoint(directory / "llama", "llama", overrides=small)
    return {"llama": llama, **{name: write_model(directory / name, name) for name in ("bert", "t5")}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_recipe_has_a_plan_and_gives_way_to_flags(
    path: Path, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.stem == "qlora":
        pytest.importorskip("bitsandbytes")
    base, rows = DATA[path.stem]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[::4]})
    words = ["train", "-m", str(bases[base]), "-d", str(data), "--recipe", path.stem, "--dry-run", "--json"]
    assert run(words) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert run([*words, "--lr", "7e-4", "--rank", "3", "--batch-size", "5"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert {name: other["chosen"][name] for name in ("lr", "rank", "batch_size")} == {
        "lr": 7e-4, "rank": 3, "batch_size": 5
    }  # fmt: skip
    assert other["plan"]["trainable_parameters"] < resolved["plan"]["trainable_parameters"]


def test_a_recipe_elsewhere_finds_what_lies_beside_it_and_is_swept(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "there" / "rows", {"train": CHATS, "valid": CHATS[::4]})
    shutil.copytree(bases["llama"], tmp_path / "there" / "base")
    recipe = tmp_path / "there" / "mine.toml"
    recipe.write_text(
        'model = "./base"\ndata = "rows"\nout = "run"\nsteps = 2\nrank = 2\nsamples = 0\ndevice = "cpu"\n'
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(["train", "--recipe", "../there/mine.toml"]) == 0
    assert Path(capsys.readouterr().out.strip()).resolve() == tmp_path / "there" / "run"
    assert list((tmp_path / "here").iterdir()) == []

    words = ["train", "--recipe", "../there/mine.toml", "-o", "swept", "--sweep", "rank=2,3"]
    assert run([*words, "--json"]) == 0
    tried = json.loads((tmp_path / "here" / "swept" / "sweep.json").read_text())
    ranks = [json.loads(path.read_text())["settings"] for path in (tmp_path / "here").glob("swept/*/edgetune.json")]
    assert sorted((settings["rank"], settings["steps"]) for settings in ranks) == [(2, 2), (3, 2)]
    assert "rank" in json.dumps(tried)
