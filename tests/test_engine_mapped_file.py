"""A model's file that is cut, overwritten, removed or gone under a running engine: an error, and the process lives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import CorruptFileError, EdgetuneError, ExitCode
from tests.ggufs import base_gguf, lora_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)
needs_sigbus = pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are found through /proc")

REPLY = """
import os, signal, sys, time
from pathlib import Path
from edgetune.cli.last_words import speak_before_aborting
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError

speak_before_aborting()
path = Path(sys.argv[1])
with LlamaEngine.open(path, threads=2, ctx_size=256) as engine:
    generation = engine.generate([300, 301], Sampling(temp=0, ignore_eos=True), max_tokens=40)
    try:
        for number, _ in enumerate(generation):
            if number == 5:
                {happens}
    except EdgetuneError as error:
        print("error:", error)
    generation.close()
    print(len(generation.ids), "tokens,", generation.finish_reason)
    for _ in range(2):
        try:
            print(len(list(engine.generate([300], Sampling(temp=0), max_tokens=1))))
        except EdgetuneError as error:
            print("error:", error)
"""


def run_reply(path: Path, happens: str) -> subprocess.CompletedProcess[str]:
    script = REPLY.replace("{happens}", happens)
    return subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(base_gguf(), tmp_path / "model.gguf"))


@needs_sigbus
@pytest.mark.parametrize("happens", ["os.truncate(path, 5000)", "os.truncate(path, 0)"])
def test_a_file_cut_in_the_middle_of_a_reply_is_an_error_and_what_was_said_stays(model: Path, happens: str) -> None:
    done = run_reply(model, happens)
    assert done.returncode == 0, done.stderr
    first, said, *later = done.stdout.splitlines()
    assert "was changed while it was in use" in first
    assert said.endswith("tokens, interrupted")
    assert int(said.split()[0]) >= 6
    assert later == [first, first]


@needs_sigbus
def test_a_vanished_disk_is_an_error_and_what_is_no_page_of_a_model_ends_in_a_sentence(model: Path) -> None:
    done = run_reply(model, "os.kill(os.getpid(), signal.SIGBUS)")
    assert done.returncode == 0, done.stderr
    assert "was changed while it was in use" in done.stdout.splitlines()[0]
    done = run_reply(model, "[(os.kill(os.getpid(), signal.SIGBUS), time.sleep(1.1)) for _ in range(2)]")
    assert done.returncode == ExitCode.FAILED
    assert "cannot be read any more" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_removed_or_replaced_file_changes_nothing(model: Path) -> None:
    for happens in ("path.unlink()", "path.with_name('new').write_bytes(b'x'), path.with_name('new').replace(path)"):
        shutil.copy(base_gguf(), model)
        done = run_reply(model, happens)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["40 tokens, length", "1", "1"]


def test_a_file_written_to_between_replies_is_refused(model: Path) -> None:
    with LlamaEngine.open(model, threads=1, ctx_size=256) as engine:
        assert len(list(engine.generate([300], GREEDY, max_tokens=2))) <= 2
        os.utime(model, ns=(1, 1))
        with pytest.raises(CorruptFileError, match="was changed while it was in use"):
            engine.generate([300], GREEDY)


def test_a_cut_adapter_stays_as_it_was_read_and_is_not_read_again(tmp_path: Path) -> None:
    lora = Path(shutil.copy(lora_gguf(), tmp_path / "lora.gguf"))
    with LlamaEngine.open(base_gguf(), threads=1, ctx_size=256, lora=[LoraSpec(lora)]) as engine:

        def said() -> list[int]:
            generation = engine.generate([300, 301], GREEDY, max_tokens=8)
            list(generation)
            return generation.ids

        before = said()
        os.truncate(lora, 600)
        assert said() == before
        with pytest.raises(EdgetuneError):
            engine.set_adapters([LoraSpec(lora, 0.5)])
        assert said() == before


def test_faults_are_only_handled_where_that_was_asked_for() -> None:
    if not hasattr(signal, "SIGBUS"):
        pytest.skip("no such signal here")
    script = "import edgetune.engine.llama, os, signal; os.kill(os.getpid(), signal.SIGBUS)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGBUS
