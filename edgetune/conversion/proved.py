"""A job done: the file written under a hidden name, proved, and only then given the name that was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from edgetune.artifacts import Fingerprint, Gguf, ParityReport
from edgetune.conversion.jobs import Job, plan, plan_dequantized
from edgetune.errors import EdgetuneError, ParityError
from edgetune.events import Notice, Progress, Sink, ignore
from edgetune.export import export_adapter, export_base, load_run
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf
from edgetune.library import list_models, register
from edgetune.paths import hidden_path

_FULL_PRECISION = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Converted:
    """What came out."""

    job: Job
    gguf: Gguf
    """The file, under the name it has now."""
    report: ParityReport | None
    """The proof; None when none was wanted."""
    seconds: float
    """What writing took, without the proof."""


def convert(
    source: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    *,
    outtype: str = "auto",
    quant: str | None = None,
    merge: str | PathLike[str] | None = None,
    dequantized: bool = False,
    base: str | PathLike[str] | None = None,
    data: str | PathLike[str] | None = None,
    verify: bool = True,
    threads: int = 0,
    sink: Sink = ignore,
) -> Converted:
    """Convert a Hugging Face directory, a run or another PEFT directory to GGUF and prove it, as `edgetune convert`.

    `source` None is the newest run in ./runs not converted yet. `outtype` is f32, f16, bf16, q8_0 or auto; `quant` a
    type of llama.cpp, of models alone; `merge` an adapter that goes into the model; `dequantized` merges a QLoRA run
    into the weights it was trained beside; `base` names the model of an adapter that does not know it; `data` holds
    rows to compare on.

    Raises `ParityError` when the file is not what was trained: it is then beside `output`, its name ending in .failed.
    `UnsupportedError` says what GGUF cannot hold, and the way out; `UsageError` what makes no sense together.
    """
    started = time.monotonic()
    source, merge, base = (None if one is None else fspath(one) for one in (source, merge, base))
    output = None if output is None else Path(output)
    with ExitStack() as stack:
        if dequantized:
            job = plan_dequantized(
                (source, output), outtype=outtype, quant=quant, merge=merge, base=base, stack=stack, sink=sink
            )
        else:
            job = plan(source, output, outtype=outtype, quant=quant, merge=merge, base=base)
        unproven = stack.enter_context(_unproven(job.out_path))
        _tell_of_four_bits(job, sink)
        gguf = _export(job, unproven, threads=threads, sink=sink)
        seconds = round(time.monotonic() - started, 2)
        report = _verify(job, gguf, data=Path(data) if data else None, sink=sink) if verify else None
        unproven.replace(job.out_path)
    register(job.out_path)
    return Converted(job, replace(gguf, path=job.out_path), report, seconds)


def _tell_of_four_bits(job: Job, sink: Sink) -> None:
    run = load_run(job.adapter_dir) if job.adapter_dir else None
    if run is not None and run.method == "qlora":
        text = (
            f"{run.path} was trained beside weights of 4 bits and meets the original ones here, so it answers a little "
            f"differently. To merge it into what it was trained beside: edgetune convert {run.path} --dequantized"
        )
        sink(Notice(text, "warning"))


def _export(job: Job, out_path: Path, *, threads: int, sink: Sink) -> Gguf:
    if job.is_adapter:
        outtype = "f16" if job.outtype == "auto" else job.outtype
        return export_adapter(job.source, out_path, base_dir=job.base_dir, outtype=outtype, sink=sink)
    return export_base(
        job.source, out_path, outtype=job.outtype, quant=job.quant, merge=job.merge, threads=threads, sink=sink
    )


@contextmanager
def _unproven(out_path: Path) -> Iterator[Path]:
    """Where the file waits, hidden, for its proof; removed when it never comes."""
    path = hidden_path(out_path, "unproven.gguf")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _verify(job: Job, gguf: Gguf, *, data: Path | None, sink: Sink) -> ParityReport:
    from edgetune.parity import verify
    from edgetune.parity.verdict import require_passed

    sink(Progress("torch", 0, 0, label="loading"))
    if job.base_dir.is_file():
        from edgetune.training.gguf_base.proof import prove_adapter

        report = prove_adapter(job.base_dir, job.source, gguf.path, sink=sink)
    elif not job.is_adapter:
        report = verify(
            job.base_dir, gguf.path, adapter_dir=job.merge, merged=job.merge is not None, data_path=data, sink=sink
        )
    else:
        with _base_gguf(job, gguf, sink) as base_path:
            report = verify(
                job.base_dir, base_path, adapter_dir=job.source, lora_path=gguf.path, data_path=data, sink=sink
            )
    # The file waits under a hidden name; what is said about it uses the one it will have.
    report = replace(report, lora_path=job.out_path) if job.is_adapter else replace(report, gguf_path=job.out_path)
    try:
        require_passed(report)
    except ParityError as error:
        # Not a .gguf any more: nothing must take it for a model or a run's adapter.
        failed = job.out_path.with_name(f"{job.out_path.name}.failed")
        gguf.path.replace(failed)
        error.hint = f"It was not written. For a look at it, what was made is in {failed}."
        raise
    return report


@contextmanager
def _base_gguf(job: Job, adapter: Gguf, sink: Sink) -> Iterator[Path]:
    """A GGUF of the adapter's base in full precision: one the library has, or one made for the moment."""
    # Sentence models of equal weights may differ in pooling, prompts and layers beside them: one is made anew.
    run = load_run(job.source)
    writes = run is None or run.task not in ("classification", "regression", "embedding")
    if writes and (found := _known_base(fingerprint_checkpoint(job.base_dir))):
        yield found
        return
    sink(Notice("Making a 16-bit GGUF of the base to compare with, and removing it afterwards."))
    with _unproven(job.out_path.with_name("base.gguf")) as path:
        export_base(job.base_dir, path, sink=sink)
        yield path


def _known_base(fingerprint: Fingerprint) -> Path | None:
    for entry in list_models():
        if entry.kind != "model":
            continue
        try:
            gguf = read_gguf(entry.path)
        except (EdgetuneError, OSError):
            continue
        if gguf.fingerprint == fingerprint and gguf.file_type in _FULL_PRECISION:
            return gguf.path
    return None
