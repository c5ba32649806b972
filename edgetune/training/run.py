"""One training run, from settings to a PEFT directory with its record: prepare, load, loop, save.

The run directory holds the record from the start (unfinished), `metrics.jsonl` and the newest checkpoints while it
works, and at the end the adapter, tokenizer files and `loss.svg`. `resume` continues it after Ctrl-C or a kill.
"""

from __future__ import annotations

import errno
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from edgetune import __version__
from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import InterruptedRun, MismatchError, ResourceError, UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.fingerprint import file_sha256, text_sha256
from edgetune.gguf_header import read_gguf
from edgetune.paths import remove_leftovers as remove_abandoned
from edgetune.paths import whole_dir, write_json
from edgetune.training.assembly import assemble
from edgetune.training.bases import base_name, copy_base_tokenizer, fingerprint_base, is_gguf
from edgetune.training.checkpoint import (
    Position,
    last_settled,
    list_checkpoints,
    load_best,
    load_checkpoint,
    remove_leftovers,
    save_best,
    save_checkpoint,
)
from edgetune.training.device import describe_machine, is_out_of_memory
from edgetune.training.evaluate import Evaluation
from edgetune.training.loop import Loop
from edgetune.training.methods.base import Method
from edgetune.training.metrics_log import MetricsLog, without_metrics
from edgetune.training.prepare import Plan, Prepared, plan, prepare
from edgetune.training.processes import World, is_process_lost, join_processes, process_lost
from edgetune.training.report import Told, write_predictions, write_report
from edgetune.training.reporters import check_reporters, report_to
from edgetune.training.run_dirs import default_run_dir, only_process
from edgetune.training.samples import take_samples
from edgetune.training.settings import TrainSettings


def train(settings: TrainSettings, *, sink: Sink = ignore) -> Run:
    """Train an adapter and return the finished run.

    Where a launcher started several processes, all of them call this, and the first one alone writes and tells.
    Raises `InterruptedRun` when stopped (the checkpoint is saved), `ResourceError` when memory does not suffice, and
    what `prepare` raises.
    """
    with join_processes(settings.device, split=settings.fsdp) as world:
        return _train(settings, sink if world.leads else ignore, world)


def _train(settings: TrainSettings, sink: Sink, world: World) -> Run:
    run_dir = Path(settings.out).expanduser() if settings.out else None
    if world.leads and run_dir is not None and run_dir.is_dir():
        remove_abandoned(run_dir)  # a record that a killed process had not written yet is no run
    if world.leads and run_dir is not None and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        hint = f"To go on with it: edgetune train --resume {run_dir}" if (run_dir / RUN_RECORD).is_file() else ""
        raise UsageError(f"{run_dir} is there already.", hint=hint or "Choose another directory with -o.")
    settings = settings.absolute()
    check_reporters(settings.report_to)
    started = datetime.fromisoformat(world.text_of_leader(datetime.now(timezone.utc).isoformat()))
    prepared = prepare(settings, now=started.astimezone(), sink=sink)
    planned = plan(settings, prepared, sink=sink)  # refuses what does not fit the model, before anything is written
    _check_same_data(prepared, world)
    run_dir = Path(world.text_of_leader(str(run_dir or default_run_dir(prepared))))
    run = replace(_new_run(run_dir, settings, prepared, sink), created=started.isoformat(timespec="seconds"))
    if not world.leads:
        return _run(run, settings, prepared, planned, sink, world)
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_process(run_dir):
        if (run_dir / RUN_RECORD).is_file():
            raise UsageError(f"{run_dir} is there already.", hint="Choose another directory with -o.")
        write_json(run_dir / RUN_RECORD, run.record())
        return _run(run, settings, prepared, planned, sink, world)


def _check_same_data(prepared: Prepared, world: World) -> None:
    """Raise `UsageError` unless every process has read the same rows."""
    mine = [float(len(prepared.train)), float(int(prepared.dataset.sha256[:12] or "0", 16))]
    if world.any(world.numbers_of_leader(*mine) != mine):
        raise UsageError(
            "The processes of this run do not read the same data.", hint="Give all of them the same files."
        )


def resume(run_dir: Path, *, settings: TrainSettings | None = None, sink: Sink = ignore) -> Run:
    """Go on with an unfinished run from its last checkpoint and return it finished.

    `settings` are what the caller thinks the run's settings are; `UsageError` names where they, or the data, are not
    what they were, `MismatchError` where the base is not.
    """
    known = settings or TrainSettings.from_record(Run.load(run_dir).settings)
    with (
        join_processes(known.device, split=known.fsdp) as world,
        only_process(run_dir) if world.leads else nullcontext(),
    ):
        return _resume(run_dir, settings, sink if world.leads else ignore, world)


def _resume(run_dir: Path, settings: TrainSettings | None, sink: Sink, world: World) -> Run:
    old = Run.load(run_dir)
    if old.finished:
        raise UsageError(f"{run_dir} is finished.", hint=f"edgetune convert {run_dir}")
    known = replace(TrainSettings.from_record(old.settings), out=str(run_dir))
    if settings is not None and (changed := settings.absolute().differences(known.absolute())):
        raise UsageError(
            f"The settings are not those the run was started with: {'; '.join(changed)}.",
            hint=f"Resume without them (edgetune train --resume {run_dir}), or start a new run.",
        )
    check_reporters(known.report_to)
    if gone := [path for path in old.data["paths"] if not Path(path).exists()]:
        raise UsageError(f"{gone[0]} is no longer there: {run_dir} was started on it.", hint="Restore it.")
    # A template that writes the date writes the day the run began: a later one would be another prompt.
    prepared = prepare(known, now=datetime.fromisoformat(old.created).astimezone(), sink=sink)
    if prepared.dataset.sha256 != old.data["sha256"]:
        raise UsageError(
            f"The data of {run_dir} changed since it was started.", hint="Restore them, or start a new run."
        )
    run = replace(_new_run(run_dir, known, prepared, sink), created=old.created)
    differing = old.fingerprint.differences(run.fingerprint)
    # The fingerprint is the checkpoint's: of the files made from it, with these or those blocks, only one is the base.
    if old.data.get("base_sha256", run.data.get("base_sha256")) != run.data.get("base_sha256"):
        differing = [*differing, "blocks"]
    if differing:
        raise MismatchError(
            f"The base model {run.base_path} changed since {run_dir} was started: {', '.join(differing)} differ.",
            hint="Restore it, or start a new run.",
        )
    if last_settled(run_dir).get("checkpointing"):
        planned = plan(replace(known, grad_checkpointing="on"), prepared, sink=sink)
    else:
        planned = plan(known, prepared, sink=sink)
    _check_same_data(prepared, world)
    if world.leads:
        remove_leftovers(run_dir)
    return _run(run, known, prepared, planned, sink, world)


def _new_run(run_dir: Path, settings: TrainSettings, prepared: Prepared, sink: Sink) -> Run:
    fingerprint = fingerprint_base(prepared.model_dir, sink=sink)
    if prepared.chat_template is not None:
        fingerprint = replace(fingerprint, template=text_sha256(prepared.chat_template))
    names = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    return Run(
        path=run_dir,
        base_path=prepared.model_dir.resolve(),
        base_name=base_name(prepared.model_dir),
        fingerprint=fingerprint,
        task=prepared.task.name,
        method=settings.method,
        settings={**settings.record(), "out": str(run_dir)},
        data={**prepared.data_record(), **_base_file(prepared.model_dir)},
        versions={"edgetune": __version__, "python": platform.python_version(), **{n: version(n) for n in names}},
    )


def _base_file(model_dir: Path) -> dict[str, str]:
    """Which of the files made from one checkpoint a GGUF base is; one from elsewhere has a fingerprint of its own."""
    names_checkpoint = is_gguf(model_dir) and bool(read_gguf(model_dir).fingerprint.weights)
    return {"base_sha256": file_sha256(model_dir)} if names_checkpoint else {}


def _run(run: Run, settings: TrainSettings, prepared: Prepared, planned: Plan, sink: Sink, world: World) -> Run:
    task = prepared.task
    try:
        parts = assemble(settings, prepared, planned, split=world.splits, sink=sink)
        method, adapted, optimizer = parts.method, parts.adapted, parts.optimizer
        position = _restore(run.path, method, adapted, optimizer, sink)
        _start_together(adapted, position, run.path, world)
        names = settings.report_to if world.leads else ()
        with ExitStack() as stack:
            stopped = stack.enter_context(_interruptions(sink))
            log = stack.enter_context(report_to(names, run, position.step, sink))
            log = stack.enter_context(MetricsLog(run.path, position.step, log)) if world.leads else log
            loop = Loop(
                adapted=adapted,
                task=task,
                optimizer=optimizer,
                train=prepared.train,
                mix=prepared.mix,
                valid=prepared.valid,
                settings=settings,
                device=parts.device,
                sink=log,
                save=lambda at: _save(run.path, at, method, adapted, optimizer, settings.keep_checkpoints),
                keep_best=lambda at: save_best(run.path, at, method=method, adapted=adapted),
                should_stop=stopped.is_set,
                position=position,
                layout=parts.layout,
                dtype=parts.dtype,
                world=world,
                measured_before=lambda found: _sample(run, loop, "before", found),
            )
            finished = loop.run()
            if not world.leads:
                if not finished:
                    raise _interrupted(run, loop)
                if world.splits:
                    _final(run, loop, method, sink)
                return run
            told = Told(prepared, describe_machine(parts.device, parts.dtype, processes=world.size))
            if not finished:
                write_report(replace(run, metrics=_summary(position)), told, sink=sink)
                raise _interrupted(run, loop)
            final = _final(run, loop, method, sink)
            _sample(run, loop, "after", final)
        told = replace(told, measured=final.measured) if final is not None else told
        return _finish(run, position, method, adapted, told, sink)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(settings, prepared) from error
        if is_process_lost(error):
            raise process_lost() from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full_disk(run, f"The disk is full: {error.filename or run.path} was not written.") from error
        raise
    except ResourceError as error:
        raise _full_disk(run, error.message) from error
    except KeyboardInterrupt as error:
        raise _stopped_at_once(run) from error


def _interrupted(run: Run, loop: Loop) -> InterruptedRun:
    return InterruptedRun(
        f"Stopped at step {loop.position.step} of {loop.total}; the checkpoint is saved.",
        hint=f"To go on: edgetune train --resume {run.path}",
    )


def _stopped_at_once(run: Run) -> InterruptedRun:
    saved = list_checkpoints(run.path)
    where = f"its last checkpoint is {saved[-1].name}" if saved else "it has no checkpoint yet"
    return InterruptedRun(f"Stopped at once; {where}.", hint=f"To go on from there: edgetune train --resume {run.path}")


def _sample(run: Run, loop: Loop, when: Literal["before", "after"], found: Evaluation | None) -> None:
    take_samples(
        run.path,
        when,
        task=loop.task,
        model=loop.adapted,
        rows=loop.valid,
        found=found,
        count=0 if loop.world.splits else loop.settings.samples,
        autocast=loop.autocast(),
        sink=without_metrics(loop.sink),
    )


def _start_together(adapted: Any, position: Position, run_dir: Path, world: World) -> None:
    """Go on from the leading process's weights. Raises `UsageError` where another one restored another step."""
    if world.any(world.numbers_of_leader(position.step)[0] != position.step):
        raise UsageError(
            f"Not all processes of this run see the checkpoints in {run_dir}.",
            hint="Give a run directory that all machines share.",
        )
    world.copy_from_leader([parameter for parameter in adapted.parameters() if parameter.requires_grad])


def _restore(run_dir: Path, method: Method, adapted: Any, optimizer: Any, sink: Sink) -> Position:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return Position()
    position = load_checkpoint(checkpoints[-1], method=method, adapted=adapted, optimizer=optimizer)
    sink(Notice(f"Going on from step {position.step}."))
    return position


def _save(run_dir: Path, position: Position, method: Method, adapted: Any, optimizer: Any, keep: int) -> None:
    save_checkpoint(run_dir, position, method=method, adapted=adapted, optimizer=optimizer, keep=keep)


def _final(run: Run, loop: Loop, method: Method, sink: Sink) -> Evaluation | None:
    """Go back to the best adapter, where one was chosen, and measure what is going to be saved."""
    position = loop.position
    if position.best:
        load_best(run.path, position, method=method, adapted=loop.adapted)
        metric, step = loop.settings.metric or "loss", int(position.best["step"])
        sink(Notice(f"The adapter of step {step} is kept: {metric} {position.best['value']:.4g}."))
    elif not loop.task.metrics:
        return None
    # By itself: the log holds what was measured on the way.
    loop.sink = without_metrics(sink)
    return loop.evaluate("final")


def _finish(run: Run, position: Position, method: Method, adapted: Any, told: Told, sink: Sink) -> Run:
    prepared = told.prepared
    prepared.task.settle(adapted)
    copy_base_tokenizer(prepared.model_dir, run.path, chat_template=prepared.chat_template)
    with whole_dir(run.path / ".adapter") as partial:
        method.publish(adapted, partial, prepared.model_dir)
    for path in sorted((run.path / ".adapter").iterdir()):
        path.replace(run.path / path.name)
    (run.path / ".adapter").rmdir()
    done = replace(run, metrics=_summary(position), finished=True)
    write_predictions(run.path, told.measured)
    write_report(done, told, sink=sink)
    write_json(run.path / RUN_RECORD, done.record())
    return done


def _summary(position: Position) -> dict[str, Any]:
    values = asdict(position)
    found = values.pop("losses")
    measures = values.pop("measures")
    # What is saved was measured last.
    found["valid"] = found.pop("final", found.get("valid"))
    measures["valid"] = measures.pop("final", measures.get("valid"))
    losses = {f"{name}_loss": loss for name, loss in found.items() if loss is not None}
    losses |= {name: kept for name, kept in measures.items() if kept}
    speed = position.tokens / position.seconds if position.seconds else 0.0
    return {**values, **losses, "tokens_per_second": speed}


@contextmanager
def _interruptions(sink: Sink) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once. Only the main thread can listen."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        # From a thread of its own: the signal may have come in the middle of a line that is being written.
        threading.Thread(target=sink, args=(Notice("Stopping after this step; again: at once."),)).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _full_disk(run: Run, message: str) -> ResourceError:
    return ResourceError(message, hint=f"Free some space, then go on: edgetune train --resume {run.path}")


def _out_of_memory(settings: TrainSettings, prepared: Prepared) -> ResourceError:
    longest = max(len(sequence.ids) for sequence in prepared.train)
    return ResourceError(
        f"Out of memory with {settings.batch_size} sequences of up to {longest} tokens.",
        hint="Try a smaller --max-length or --rank, a smaller or quantized model, or --method qlora.",
    )
