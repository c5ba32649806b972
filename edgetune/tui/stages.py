"""Stages of the command line as child processes: what can be done with a model, an adapter or a run, and doing it.

A child hears nothing from the terminal and tells its progress as events; torch is imported there and never here.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import CorruptFileError, EdgetuneError, ExitCode, UnsupportedError, UsageError
from edgetune.event_lines import EVENTS_VARIABLE, read_event
from edgetune.events import Event, Notice
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf
from edgetune.library import Entry, Kind, Purpose, classify, find_base_for, list_models, purpose_of

_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Action:
    """Something that can be done with an entry."""

    name: str
    """"chat", or the verb of the command line."""
    title: str


_USES: dict[Purpose, Action] = {
    "chat": Action("chat", "Chat"),
    "classify": Action("classify", "Classify"),
    "embed": Action("embed", "Embed"),
    "generate": Action("generate", "Generate"),
}


def list_entries() -> list[Entry]:
    """What the library knows, and the runs in `runs/` here that it does not: those that were stopped."""
    known = list_models()
    paths = {entry.path for entry in known}
    runs = [record.parent.resolve() for record in Path("runs").glob(f"*/{RUN_RECORD}")]
    others = [Entry(run.name, run, "run", (run / RUN_RECORD).stat().st_mtime) for run in runs if run not in paths]
    found = [*known, *sorted(others, key=lambda entry: -entry.added)]
    for entry in found:
        purpose(entry)
    return found


def purpose(entry: Entry) -> Purpose:
    """What `entry` is made for; its files are looked into when `list_entries` meets it first, or they have changed."""
    try:
        changed = entry.path.stat().st_mtime_ns
    except OSError:
        return "chat"
    return _read_purpose(entry.path, entry.kind, changed)


@lru_cache(maxsize=1024)
def _read_purpose(path: Path, kind: Kind, changed: int) -> Purpose:
    return purpose_of(path, kind)


def actions_for(entry: Entry) -> tuple[Action, ...]:
    """What can be done with `entry`, first what it is made for."""
    use, convert = _USES[purpose(entry)], Action("convert", "Convert")
    quantize, verify = Action("quantize", "Quantize"), Action("verify", "Verify")
    if entry.kind == "checkpoint":
        return use, convert, quantize, Action("train", "Train")
    if entry.kind == "model":
        return use, quantize, verify
    if entry.kind == "adapter":
        return use, verify
    if is_unfinished(entry.path):
        return (Action("train", "Go on"),)
    return use, convert, verify, Action("train", "Train further")


def is_unfinished(run_dir: Path) -> bool:
    """Whether the run was stopped before its end, or still works."""
    try:
        return (run_dir / RUN_RECORD).is_file() and not Run.load(run_dir).finished
    except CorruptFileError:
        return False


def quantize_arguments(entry: Entry, type_name: str) -> list[str]:
    """Quantize a GGUF; of a checkpoint, convert it on the way."""
    path = str(entry.path)
    return ["convert", path, "-q", type_name] if entry.kind == "checkpoint" else ["quantize", path, type_name]


def train_arguments(entry: Entry, answer: str) -> list[str]:
    """Train on what `answer` names, data and perhaps flags as on the command line. Raises `UsageError`.

    A checkpoint is the base itself; a run's base is trained anew, a run that was stopped goes on.
    """
    if entry.kind == "run" and is_unfinished(entry.path):
        return ["train", "--resume", str(entry.path)]
    try:
        words = shlex.split(answer, posix=os.name != "nt")
    except ValueError:
        words = []
    if not words or words[0].startswith("-"):
        raise UsageError(f"No data is named by {answer!r}.", hint="For example: rows.jsonl --epochs 2")
    data, *flags = words
    base = entry.path if entry.kind == "checkpoint" else Run.load(entry.path).base_path
    return ["train", "-m", str(base), "-d", data, *flags]


def use_arguments(name: str, entry: Entry, answer: str) -> list[str]:
    """Use `entry` with the verb `name` on a text, or on what a file holds; flags may follow. Raises `UsageError`."""
    text = answer.strip()
    if not text or text.startswith("-"):
        raise UsageError(f"No text is named by {answer!r}.", hint="Type a text, or a file and the flags for it.")
    try:
        words = shlex.split(text, posix=os.name != "nt")
    except ValueError:
        words = []
    # A sentence needs no quotes; what begins with a file is read as on the command line.
    is_file = bool(words) and Path(words[0]).is_file()
    return [name, str(entry.path), *(words if is_file else [text])]


def known_data(entry: Entry) -> str:
    """What a run was trained on, as it would be typed; of the embedded model, data that come with it; else empty."""
    demo_dir = entry.path / "demos" / "tickets"
    if entry.embedded and demo_dir.is_dir():
        return shlex.quote(str(demo_dir))
    try:
        paths = Run.load(entry.path).data["paths"] if entry.kind == "run" else []
    except (CorruptFileError, KeyError):
        return ""
    return " ".join(shlex.quote(str(path)) for path in paths[:1])


def verify_arguments(entry: Entry) -> list[str]:
    """Prove a GGUF, an adapter's with its run and its base. Looks into files: not for the thread that draws.

    Raises `UnsupportedError` when what it would be compared with is not on this machine.
    """
    if entry.kind == "model":
        return ["verify", str(_checkpoint_of(entry.path)), str(entry.path)]
    run_dir = entry.path if entry.kind == "run" else entry.path.parent
    lora = _newest_adapter(run_dir) if entry.kind == "run" else entry.path
    if classify(run_dir) != "run":
        raise UnsupportedError(
            f"{lora} lies in no run, so there is nothing to compare it with.",
            hint="Name its PEFT directory: edgetune verify BASE_DIR GGUF --adapter DIR --lora FILE",
        )
    base = find_base_for(read_gguf(lora))
    if base is None or classify(base.path) != "model":
        raise UnsupportedError(f"There is no GGUF of the base of {lora}.", hint="Convert the base first.")
    return ["verify", str(_checkpoint_of(base.path)), str(base.path), "--adapter", str(run_dir), "--lora", str(lora)]


def _newest_adapter(run_dir: Path) -> Path:
    files = [path for path in run_dir.glob("*.gguf") if classify(path) == "adapter"]
    if not files:
        raise UnsupportedError(f"The run {run_dir} has no GGUF adapter yet.", hint="Convert it first.")
    return max(files, key=lambda path: path.stat().st_mtime)


def _checkpoint_of(gguf_path: Path) -> Path:
    wanted = read_gguf(gguf_path).fingerprint.weights
    for entry in list_models():
        if not wanted or entry.kind != "checkpoint":
            continue
        try:
            if fingerprint_checkpoint(entry.path).weights == wanted:
                return entry.path
        except (EdgetuneError, OSError):
            continue
    raise UnsupportedError(
        f"The Hugging Face directory that {gguf_path} was made from is not in the library.",
        hint=f"Name it: edgetune verify BASE_DIR {gguf_path}",
    )


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended."""

    code: int
    output: str
    """What it wrote to stdout; its last line names what was made."""
    error: str = ""
    hint: str = ""

    @property
    def was_stopped(self) -> bool:
        """Whether the user ended it."""
        return self.code in (ExitCode.INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)


class Stage:
    """One command in a child process."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopped = False

    @property
    def title(self) -> str:
        """The command as it would be typed."""
        return f"edgetune {shlex.join(self.arguments)}"

    async def run(self, sink: Callable[[Event], None]) -> StageEnd:
        """Run it to its end; `sink` hears its events, and its other words as notices."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "edgetune", *self.arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE, env={**os.environ, EVENTS_VARIABLE: "json"},
            # Keys pressed here are for the screen alone.
            start_new_session=True,
        )  # fmt: skip
        if self._is_stopped:
            self.stop()
        assert self._process.stdout is not None
        try:
            output, (error, hint) = await asyncio.gather(self._process.stdout.read(), self._listen(sink))
            code = await self._process.wait()
        except asyncio.CancelledError:
            # The screen is gone: nothing goes on unseen.
            self.stop()
            raise
        return StageEnd(code, output.decode(errors="replace").strip(), error, hint)

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does: training keeps a checkpoint, half-written files are removed."""
        self._is_stopped = True
        if self._process is None or self._process.returncode is not None:
            return
        if sys.platform == "win32":
            self._process.terminate()
        else:
            self._process.send_signal(signal.SIGINT)

    async def _listen(self, sink: Callable[[Event], None]) -> tuple[str, str]:
        """Hand on what comes on stderr; returns the error and the hint it ends with."""
        error = hint = ""
        assert self._process is not None
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            line = raw.decode(errors="replace").rstrip()
            event = read_event(line)
            if event is not None:
                sink(event)
            elif line.startswith("error: "):
                error = line.removeprefix("error: ")
            elif error and line.startswith("hint: "):
                hint = line.removeprefix("hint: ").strip()
            elif line:
                level = "warning" if line.startswith("warning: ") else "info"
                sink(Notice(line.removeprefix("warning: "), "warning" if level == "warning" else "info"))
        return error, hint
