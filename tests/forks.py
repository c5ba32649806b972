"""Processes that start at once: forked from one that has imported what training imports, and has computed nothing.

A new Python needs seconds of the processor for torch, transformers and PEFT, each time.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PATIENCE = 400.0
"""Seconds after which a process is taken for one that waits for ever."""

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "bitsandbytes",
        "peft",
        "edgetune.cli.train",
        "edgetune.training.run",
    ]
)


def fork(
    job: Callable[..., Any], *values: Any, log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """`job(*values)`, a function of a module, in a process of its own that ends with what it returns as exit code.

    What it prints is added to `log`.
    """
    told = {**os.environ, **(environment or {})}
    process = _CONTEXT.Process(target=_work, args=(job, values, told, log))
    process.start()
    return process


def wait(process: ForkServerProcess) -> int:
    """The exit code; minus the signal's number where one ended it."""
    process.join(_PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the process does not end")
    return process.exitcode


def launch(
    words: Sequence[str], *, log: Path, processes: int = 2, job: Callable[[Sequence[str]], int] | None = None
) -> list[int]:
    """`edgetune words`, or `job` of them, in several processes as torchrun starts them; their exit codes."""
    from torch import distributed

    meeting: Any = distributed
    # As torchrun does: where they meet is there before they are, on a port that nobody else can take.
    store = meeting.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    started = [
        fork(job or edgetune, words, log=log, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    return [wait(process) for process in started]


def edgetune(words: Sequence[str]) -> int:
    """The command line."""
    from edgetune.cli.main import run

    return int(run(words))


def train_and_die(record: Mapping[str, Any], step: int, sleep: int | None = None) -> None:
    """Train as a run's `record` of its settings says, until a SIGKILL after `step`; stopped after `sleep`."""
    from edgetune.events import Event, Metrics
    from edgetune.training import TrainSettings, train

    ends = {sleep: signal.SIGSTOP, step: signal.SIGKILL}

    def sink(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and not event.extra and event.step in ends:
            os.kill(os.getpid(), ends[event.step])

    train(TrainSettings.from_record(record), sink=sink)


def _work(job: Callable[..., Any], values: Sequence[Any], environment: Mapping[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    warnings.simplefilter("ignore")
    sys.exit(job(*values))
