"""Directories of runs: the name of a new one, the newest that is not finished, and one process at a time in each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import UsageError
from edgetune.training.bases import base_name
from edgetune.training.prepare import Prepared


@contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` until the block, or the process, ends. Raises `UsageError` when another process holds it."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    # The directory itself is locked: no file is left behind, and a kill lets go of it.
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is training in {run_dir}.", hint="Wait for it, or choose another directory with -o."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def default_run_dir(prepared: Prepared) -> Path:
    """`runs/<base>-<data>-<time>` in the current directory."""
    first = next(iter(prepared.dataset.files["train"]))
    stem, folder = first.name.split(".")[0], first.parent.resolve()
    if stem.startswith("train"):
        stem = folder.parent.name if folder.name == "data" else folder.name
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{base_name(prepared.model_dir)}-{stem}-{now}"


def newest_unfinished_run(runs_dir: Path = Path("runs")) -> Path:
    """The run that `--resume` without a name means. Raises `UsageError` when there is none."""
    records = sorted(runs_dir.glob(f"*/{RUN_RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for record in records:
        if not Run.load(record.parent).finished:
            return record.parent
    raise UsageError(f"There is no unfinished run in {runs_dir}/.", hint="Name it: --resume RUN.")
