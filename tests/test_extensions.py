"""Another package's task: found by its entry point, told by an option of its own, by recipe and on the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import Run
from edgetune.cli.main import run as edgetune
from edgetune.data.formats import Pair
from edgetune.errors import DataError, UsageError
from edgetune.training import TrainSettings, merge_settings, prepare, read_recipe
from edgetune.training.run import resume
from edgetune.training.tasks import TASKS
from tests.checkpoints import write_checkpoint
from tests.facts_package import facts
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

TRIPLES = "fox\tis\tan animal\nfox\thas\ta tail\ndog\tis\ta pet\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("extension") / "tiny", "llama")


def test_it_is_not_there_uninstalled() -> None:
    with pytest.raises(UsageError, match="task is 'with-facts', expected one of auto, chat"):
        merge_settings({"task": "with-facts"}, {})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as pip would leave it."""
    site = tmp_path / "site"
    info = site / "facts-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copyfile(facts.__file__, site / "facts.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: facts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgetune.tasks]\nwith-facts = facts:WithFacts\nbroken = facts:Nothing\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    monkeypatch.delitem(sys.modules, "facts", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is a {word}?", "completion": " Nobody knows."} for word in ("Fox", "dog", "stone")]
    (tmp_path / "facts.tsv").write_text(TRIPLES)
    return write_rows(tmp_path / "data", {"train": rows, "valid": rows[:1]})


def told(base: Path, data: Path, **values: Any) -> TrainSettings:
    given = {"model": str(base), "data": (str(data),), "task": "with-facts", "device": "cpu", "dtype": "f32"}
    return merge_settings({}, {**given, "steps": 2, **values})


def texts(settings: TrainSettings) -> list[str]:
    prepared = prepare(settings)
    return ["".join(prepared.tokenizer.pieces(row.ids.tolist())) for row in prepared.train]


@pytest.mark.usefixtures("installed")
def test_a_broken_package_is_told(base: Path, data: Path) -> None:
    assert TASKS.names()[-2:] == ["broken", "with-facts"]
    with pytest.raises(UsageError, match="cannot be loaded"):
        prepare(told(base, data, task="broken"))


@pytest.mark.usefixtures("installed")
def test_facts_stand_in_front_of_what_names_them(base: Path, data: Path) -> None:
    fox, dog, stone = texts(told(base, data, option={"facts": str(data.parent / "facts.tsv")}))
    assert "user\nfox is an animal. fox has a tail.\nWhat is a Fox?<|im_end|>" in fox
    assert "dog is a pet.\nWhat is a dog?" in dog
    assert "What is a stone?" in stone
    assert "fox" not in dog + stone


def test_facts_stand_in_front_of_a_bare_prompt(data: Path) -> None:
    known, _ = facts.read_facts(data.parent / "facts.tsv")
    assert facts.inform(Pair("The dog", " runs."), known) == Pair("dog is a pet.\nThe dog", " runs.")
    unknown = Pair("A stone", " lies.")
    assert facts.inform(unknown, known) is unknown


@pytest.mark.usefixtures("installed")
def test_the_option_comes_from_a_recipe_or_a_flag(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "facts.toml"
    recipe.write_text('task = "with-facts"\ndata = "data"\nsteps = 2\noption = { facts = "facts.tsv" }\n')
    assert read_recipe(recipe)["option"] == {"facts": str(tmp_path / "facts.tsv")}
    words = ["train", "-m", str(base), "--device", "cpu", "--dtype", "f32", "--recipe", str(recipe)]
    assert edgetune([*words, "-o", str(tmp_path / "by-recipe")]) == 0
    other = tmp_path / "other.tsv"
    other.write_text("stone\tis\thard\n")
    assert edgetune([*words, "--option", f"facts={other}", "-o", str(tmp_path / "by-flag")]) == 0
    first, second = (Run.load(tmp_path / name) for name in ("by-recipe", "by-flag"))
    assert first.task == second.task == "with-facts"
    assert second.settings["option"] == {"facts": str(other)}
    assert first.data["splits"]["train"]["tokens"] != second.data["splits"]["train"]["tokens"]


@pytest.mark.usefixtures("installed")
def test_other_facts_are_other_data(base: Path, data: Path, tmp_path: Path) -> None:
    words = ["--option", f"facts={tmp_path / 'facts.tsv'}", "--task", "with-facts", "--device", "cpu", "--steps", "2"]
    assert edgetune(["train", "-m", str(base), "-d", str(data), *words, "-o", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "edgetune.json").read_text())
    (tmp_path / "run" / "edgetune.json").write_text(json.dumps({**record, "finished": False}))
    (tmp_path / "facts.tsv").write_text(TRIPLES.replace("a pet", "a wolf"))
    with pytest.raises(UsageError, match=r"The data of .* changed"):
        resume(tmp_path / "run")


@pytest.mark.usefixtures("installed")
def test_wrong_options_are_told(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="takes a file of triples"):
        prepare(told(base, data))
    with pytest.raises(UsageError, match="cannot be read"):
        prepare(told(base, data, option={"facts": str(tmp_path / "none.tsv")}))
    with pytest.raises(UsageError, match="--option fact is not known to the task with-facts") as caught:
        prepare(told(base, data, option={"fact": "x"}))
    assert "facts: a file of triples" in caught.value.hint
    with pytest.raises(UsageError, match="--option facts is not known to the task completion"):
        prepare(told(base, data, task="completion", option={"facts": "x"}))
    with pytest.raises(UsageError, match="option is"):
        merge_settings({"option": {"facts": 3}}, {})
    (tmp_path / "facts.tsv").write_text("fox is an animal\n")
    with pytest.raises(DataError, match=r"facts\.tsv:1: expected subject TAB"):
        prepare(told(base, data, option={"facts": str(tmp_path / "facts.tsv")}))
    assert edgetune(["train", "-m", str(base), "-d", str(data), "--option", "facts"]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err
