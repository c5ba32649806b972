"""The home screen: what is on this machine, what is offered, and stages that run, fail and are stopped, for real."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.widgets import OptionList, Static

from edgetune.cli.home import open_chat
from edgetune.cli.main import run
from edgetune.export import export_base
from edgetune.library import Entry, Kind, embedded_model_dir, register
from edgetune.paths import write_json
from edgetune.tui.app import EdgetuneApp
from edgetune.tui.chat import ChatScreen
from edgetune.tui.dialogs import AskDialog, LineDialog
from edgetune.tui.home import HomeScreen
from edgetune.tui.stages import (
    StageEnd,
    actions_for,
)
from tests.drawn import text_of
from tests.encoders import LABELS, write_encoder
from tests.gguf_files import write_adapter, write_model
from tests.ggufs import base_gguf
from tests.tui_pilot import Hands, write_run


def on_screen(scenario: Callable[[Hands, HomeScreen], Awaitable[None]], *, size: tuple[int, int] = (80, 24)) -> None:
    async def go() -> None:
        app = EdgetuneApp(lambda: HomeScreen(open_chat))
        async with app.run_test(size=size, notifications=True) as pilot:
            hands = Hands(app, pilot)
            home = await hands.opens(HomeScreen)
            await hands.until(lambda: home.chosen)
            await scenario(hands, home)
        app.engine_worker.close()

    asyncio.run(go())


def shown(home: HomeScreen, selector: str) -> str:
    return text_of(home.query_one(selector, Static).content)


async def choose(hands: Hands, home: HomeScreen, path: Path) -> None:
    await hands.until(lambda: path in [entry.path for entry in home._entries])
    home.query_one("#entries", OptionList).highlighted = [entry.path for entry in home._entries].index(path)
    await hands.settle()


@pytest.mark.parametrize("size", [(80, 24), (40, 20), (20, 5), (160, 50)])
def test_everything_there_is_is_listed_and_described(tmp_path: Path, size: tuple[int, int]) -> None:
    model = write_model(tmp_path / "tiny-F32.gguf")
    adapter, trained = write_adapter(tmp_path / "mine.gguf"), write_run(tmp_path / "runs")
    for path in (model, adapter, trained):
        register(path)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        assert {entry.name for entry in home._entries} == {"pocket", "tiny-F32", "mine", "runs"}
        await choose(hands, home, trained)
        await hands.until(lambda: "rows.jsonl" in shown(home, "#about"))
        assert "4.0000 → 2.9000" in shown(home, "#about")
        assert any(0x2800 < ord(char) <= 0x28FF for char in shown(home, "#about"))  # the curve
        await choose(hands, home, adapter)
        await hands.until(lambda: "rank 4" in shown(home, "#about"))
        await choose(hands, home, model)
        await hands.until(lambda: "128 tokens" in shown(home, "#about"))

    on_screen(scenario, size=size)


def test_a_description_that_comes_while_the_screen_goes_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gone = threading.Event(), threading.Event()

    def late(*_: object, **__: object) -> str:
        asked.set()
        gone.wait(60)
        return "too late"

    class GoesSlowly(Static):
        async def on_unmount(self) -> None:
            gone.set()
            await asyncio.sleep(0.3)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await home.mount(GoesSlowly())
        monkeypatch.setattr("edgetune.tui.home.details", late)
        home.action_reload()
        await hands.until(asked.is_set)

    on_screen(scenario)
    assert gone.is_set()


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    model = write_model(tmp_path / "evil\x1b]0;gotcha\x07\x1b[31m.gguf")
    register(model)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, model)
        await hands.until(lambda: "GGUF model" in shown(home, "#about"))
        assert "\x1b" not in shown(home, "#about")
        assert "␛]0;gotcha" in shown(home, "#about")
        prompts = "".join(text_of(option.prompt) for option in home.query_one("#entries", OptionList).options)
        assert "\x1b" not in prompts

    on_screen(scenario)


def test_only_what_can_be_done_is_offered(tmp_path: Path) -> None:
    def names(entry: Entry) -> list[str]:
        return [action.name for action in actions_for(entry)]

    model = write_model(tmp_path / "tiny.gguf")
    assert names(Entry("a", tmp_path, "checkpoint", 0)) == ["chat", "convert", "quantize", "train"]
    assert names(Entry("a", model, "model", 0)) == ["chat", "quantize", "verify"]
    assert names(Entry("a", tmp_path / "a.gguf", "adapter", 0)) == ["chat", "verify"]
    assert names(Entry("a", write_run(tmp_path / "done"), "run", 0)) == ["chat", "convert", "verify", "train"]
    assert names(Entry("a", write_run(tmp_path / "cut", finished=False), "run", 0)) == ["train"]
    register(model)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, model)
        await hands.until(lambda: "Quantize" in shown(home, "#offers"))
        assert "Train" not in shown(home, "#offers")
        await hands.press("t", "x")
        await hands.settle()
        assert hands.app.screen is home
        assert not home.is_busy

    on_screen(scenario)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    directory = write_encoder(root / "bert", "bert", "ForSequenceClassification", overrides=LABELS)
    export_base(directory, root / "labels.gguf", outtype="f16")
    return root / "labels.gguf"


def test_models_that_do_not_chat_are_offered_for_what_they_are_made_for(tmp_path: Path, classifier: Path) -> None:
    def offered(path: Path, kind: Kind) -> list[str]:
        return [action.name for action in actions_for(Entry("a", path, kind, 0))]

    assert offered(classifier, "model") == ["classify", "quantize", "verify"]
    assert offered(classifier.parent / "bert", "checkpoint") == ["classify", "convert", "quantize", "train"]
    for name, architectures, more, use in (
        ("plain", "BertModel", {}, "embed"),
        ("t5", "T5ForConditionalGeneration", {"is_encoder_decoder": True}, "generate"),
        ("writes", "LlamaForCausalLM", {}, "chat"),
        ("scores", "LlamaForSequenceClassification", {}, "classify"),
    ):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"architectures": [architectures], **more})
        assert offered(tmp_path / name, "checkpoint")[0] == use
    (tmp_path / "writes" / "modules.json").write_text("[]")
    assert offered(tmp_path / "writes", "checkpoint")[0] == "embed"
    adapter = write_adapter(tmp_path / "a.gguf", metadata={"edgetune.task": "regression"})
    assert offered(adapter, "adapter") == ["classify", "verify"]
    assert offered(write_run(tmp_path / "run", task="embedding"), "run")[0] == "embed"


@pytest.mark.slow
def test_a_classifier_labels_a_text_here_and_refuses_to_chat(classifier: Path) -> None:
    register(classifier)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, classifier)
        await hands.until(lambda: "made for edgetune classify" in " ".join(shown(home, "#about").split()))
        assert "l Classify" in shown(home, "#offers")
        await hands.press("c")
        await hands.until(lambda: f"{classifier.stem} does not chat.\nPress l: Classify." in hands.told)
        await hands.press("l")
        await hands.opens(LineDialog)
        await hands.press(*"good food", "enter")
        await hands.until(lambda: "done" in shown(home, "#stage"))
        assert "0." in shown(home, "#stage")
        assert home.chosen is not None
        assert home.chosen.path == classifier

    on_screen(scenario)


def test_flags_follow_the_data_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(HomeScreen, "_run_stage", lambda home, arguments: started.append(arguments))

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await hands.press("t")
        await hands.opens(LineDialog)
        await hands.press("space", *"--epochs", "space", "2", "enter")
        await hands.until(lambda: bool(started))
        assert started[0][-3:] == [str(embedded_model_dir() / "demos" / "tickets"), "--epochs", "2"]

    on_screen(scenario)


def test_a_stage_runs_and_its_result_is_chosen(tmp_path: Path) -> None:
    model = tmp_path / "tiny-F32.gguf"
    model.write_bytes(base_gguf().read_bytes())
    register(model)
    made = tmp_path / "tiny-Q8_0.gguf"

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, model)
        await hands.press("u")
        await hands.opens(LineDialog)
        await hands.press(*"Q8_0", "enter")
        await hands.until(lambda: "done" in shown(home, "#stage"))
        assert "edgetune quantize" in shown(home, "#stage")
        assert made.name in shown(home, "#stage")
        assert made.is_file()
        await hands.until(lambda: home.chosen is not None and home.chosen.path == made)
        # What names nothing that was made leaves the cursor where it is.
        await home.action_reload(Path("passed")).wait()
        assert home.chosen is not None
        assert home.chosen.path == made

    on_screen(scenario)


def test_a_stage_that_fails_says_why_and_the_screen_stays(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny-F32.gguf")
    register(model)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, model)
        await hands.press("u")
        await hands.opens(LineDialog)
        await hands.press(*"Q99", "enter")
        await hands.until(lambda: "failed" in shown(home, "#stage"))
        assert "Q99" in shown(home, "#stage")
        # What it would be compared with is not there: said at once, nothing is started.
        await hands.press("v")
        await hands.until(lambda: "is not in the library" in hands.told)
        assert not home.is_busy

    on_screen(scenario)


def test_one_stage_at_a_time_and_it_can_be_stopped(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny-F32.gguf")
    register(model)

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        # Repetitions without end; a stage as any other.
        home._run_stage(["bench", str(base_gguf()), "-c", "64", "-p", "16", "-n", "4", "-d", "0", "-r", "1000000"])
        await hands.until(lambda: "measure" in shown(home, "#stage"))
        await choose(hands, home, model)
        await hands.press("v")
        await hands.until(lambda: "running already" in hands.told)
        assert "bench" in shown(home, "#stage")
        await hands.press("x")
        await hands.until(lambda: "stopped" in shown(home, "#stage"))
        assert not home.is_busy

    on_screen(scenario)


def test_leaving_asks_when_something_runs_and_stops_it() -> None:
    ended: list[StageEnd] = []

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        home._run_stage(["bench", str(base_gguf()), "-c", "64", "-p", "16", "-n", "4", "-d", "0", "-r", "1000000"])
        await hands.until(lambda: "measure" in shown(home, "#stage"))
        await hands.press("q")
        await hands.opens(AskDialog)
        await hands.press("n")
        await hands.opens(HomeScreen)
        assert home.is_busy
        assert home._stage is not None
        stage = home._stage
        await hands.press("q")
        await hands.opens(AskDialog)
        await hands.press("y")
        assert stage._process is not None
        ended.append(StageEnd(await stage._process.wait(), ""))

    on_screen(scenario)
    assert ended[0].was_stopped


def test_chatting_with_an_entry_opens_the_chat_and_comes_back() -> None:
    register(base_gguf())

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, base_gguf())
        await hands.press("c")
        await hands.opens(ChatScreen)

    on_screen(scenario)


def test_a_model_that_cannot_be_opened_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unconverted, said = write_run(tmp_path / "mine"), list[Exception]()
    register(unconverted)
    monkeypatch.setattr(EdgetuneApp, "say_error", lambda app, error: said.append(error))

    async def scenario(hands: Hands, home: HomeScreen) -> None:
        await choose(hands, home, unconverted)
        await hands.press("enter")
        await hands.until(lambda: bool(said))
        assert "has no GGUF adapter" in str(said[0])
        await hands.until(lambda: hands.app.screen is home)

    on_screen(scenario)


def test_without_a_command_a_terminal_gets_the_screen_and_a_pipe_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[bool] = []
    monkeypatch.setattr("edgetune.cli.home.show_home", lambda: opened.append(True))
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err
    assert not opened
    monkeypatch.setattr("edgetune.cli.terminal.is_full_screen", lambda: True)
    assert run([]) == 0
    assert opened == [True]


def test_the_screen_never_imports_torch() -> None:
    code = (
        "import sys, edgetune.cli.home, edgetune.tui.home; sys.exit(' '.join({'torch', 'peft'} & {*sys.modules}) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""
