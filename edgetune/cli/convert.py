"""`edgetune convert`: a checkpoint or an adapter becomes a GGUF file, and is proved to be the same.

Parses, calls `export` and `parity`, renders. A file that fails its proof is not left under the name that was asked for.
"""

from __future__ import annotations

import glob
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from edgetune.artifacts import Fingerprint, Gguf, ParityReport, VectorParity
from edgetune.cli.progress import amount, say, show_progress
from edgetune.cli.terminal import typed_path
from edgetune.errors import EdgetuneError, ParityError, UsageError
from edgetune.events import Notice, Progress, Sink
from edgetune.export import (
    ADAPTER_OUTTYPES,
    ADAPTER_WEIGHTS,
    OUTTYPES,
    export_adapter,
    export_base,
    find_base_dir,
    load_run,
    model_name,
    require_trained_on,
    resolve_outtype,
)
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf, read_gguf_header
from edgetune.library import classify, find_model, list_models, register
from edgetune.paths import check_replaceable, hidden_path
from edgetune.quantize import find_quant_type

_FULL_PRECISION = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class _Job:
    """What to make of what."""

    source: Path
    """A checkpoint, or a PEFT directory."""
    base_dir: Path
    """The checkpoint; of an adapter, the one it was trained on."""
    out_path: Path
    outtype: str
    quant: str | None = None
    merge: Path | None = None

    @property
    def is_adapter(self) -> bool:
        return self.source != self.base_dir

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter that torch has to run with, to compare."""
        return self.source if self.is_adapter else self.merge


@click.command("convert")
@click.argument("source", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here. [default: named by model and type]")
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="auto",
    help="Number format; auto keeps a model's own 16-bit type, and is f16 for adapters.",
)
@click.option("-q", "--quantize", "quant", metavar="TYPE", help="Quantize the model as well, e.g. Q4_K_M.")
@click.option("--merge", metavar="ADAPTER", help="Merge this adapter (a directory or a run) into the model.")
@click.option(
    "--dequantized", is_flag=True, help="Merge a QLoRA run into the weights it was trained beside: 4 bits and back."
)
@click.option("--base", metavar="MODEL", help="The base model an adapter was trained on. [default: as it recorded]")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Rows to compare on. [default: built-in text]"
)
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the original.")
@click.option("--threads", "-t", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is all of them.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the path.")
def command(
    source: str | None,
    output: Path | None,
    outtype: str,
    quant: str | None,
    merge: str | None,
    dequantized: bool,
    base: str | None,
    data: Path | None,
    no_verify: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Convert SOURCE to GGUF and prove that it answers the same.

    SOURCE is a Hugging Face model directory or a model of the library (a GGUF model comes out), or a run or another
    PEFT adapter directory (a GGUF adapter comes out). Without SOURCE it is the newest run in ./runs not converted yet.

    \b
    edgetune convert path/to/Qwen2.5-0.5B-Instruct -q Q4_K_M    a model, quantized
    edgetune convert runs/mine                                  an adapter, for the model it was trained on
    edgetune convert path/to/model --merge runs/mine            both in one file
    """
    started = time.monotonic()
    with ExitStack() as stack:
        if dequantized:
            given = (source, output)
            planned = _plan_dequantized(given, outtype=outtype, quant=quant, merge=merge, base=base, stack=stack)
        else:
            planned = _plan(source, output, outtype=outtype, quant=quant, merge=merge, base=base)
        _convert(planned, started, data=data, no_verify=no_verify, threads=threads, as_json=as_json)


def _convert(job: _Job, started: float, *, data: Path | None, no_verify: bool, threads: int, as_json: bool) -> None:
    with show_progress() as sink, _unproven(job.out_path) as unproven:
        _tell_of_four_bits(job, sink)
        gguf = _export(job, unproven, threads=threads, sink=sink)
        seconds = round(time.monotonic() - started, 2)
        report = None if no_verify else _verify(job, gguf, data=data, sink=sink)
        unproven.replace(job.out_path)
    register(job.out_path)
    size = job.out_path.stat().st_size
    say(f"{gguf.file_type or 'GGUF'}, {amount(size, 'bytes')} in {seconds:.1f} s" + _proof(report, no_verify=no_verify))
    say(f"Next: edgetune {_next_command(job, shlex.quote(typed_path(job.out_path)))}")
    if as_json:
        values = {
            "path": str(job.out_path),
            "kind": gguf.kind,
            "type": gguf.file_type,
            "bytes": size,
            "seconds": seconds,
            "parity": _parity_values(report),
        }
        click.echo(json.dumps(values))
    else:
        click.echo(job.out_path)


def _next_command(job: _Job, path: str) -> str:
    """How the file is used: a model that writes text is chatted with, others turn texts into labels or vectors."""
    header = read_gguf_header(job.out_path)
    task = header.metadata.get("edgetune.task", "embedding" if "bert" in header.architecture else None)
    if job.is_adapter and header.architecture.startswith("t5"):
        task = "seq2seq"
    if task in (None, "seq2seq"):
        return f"{'chat' if task is None else 'generate'} {'--lora ' if job.is_adapter else ''}{path}"
    verb = "embed" if task == "embedding" else "classify"
    return f"{verb} {f'{shlex.quote(str(job.base_dir))} --lora ' if job.is_adapter else ''}{path}"


def _plan(
    source: str | None, output: Path | None, *, outtype: str, quant: str | None, merge: str | None, base: str | None
) -> _Job:
    path = find_model(source) if source else _newest_run()
    kind = classify(path)
    if kind in ("model", "adapter"):
        raise UsageError(f"{path} is a GGUF file already.", hint=f"To quantize it: edgetune quantize {path} Q4_K_M")
    if path.is_file():
        raise UsageError(f"{path} is a file; convert takes a directory.", hint=f"Its own directory is {path.parent}.")
    if kind == "run":
        return _plan_adapter(path, output, outtype=outtype, quant=quant, merge=merge, base=base)
    merge_dir = _adapter_dir(merge) if merge else None
    if base is not None:
        raise UsageError("--base is for adapters; the source is a model itself.", hint="Leave --base away.")
    if quant and outtype != "auto":
        raise UsageError("-q and --outtype both name the output's type.", hint="Give one of them.")
    type_name = find_quant_type(quant).name if quant else resolve_outtype(path, outtype)
    name = model_name(path) + (f"-{merge_dir.resolve().name}" if merge_dir else "")
    out_path = _output(output, Path.cwd() / f"{name}-{type_name}.gguf")
    return _Job(path, path, out_path, outtype, quant, merge_dir)


def _plan_adapter(
    path: Path, output: Path | None, *, outtype: str, quant: str | None, merge: str | None, base: str | None
) -> _Job:
    base_dir = find_model(base) if base else find_base_dir(path)
    if classify(base_dir) not in ("checkpoint", "model"):
        raise UsageError(
            f"{base_dir} is not a Hugging Face model directory.", hint="Name the base's directory with --base."
        )
    if quant:
        raise UsageError(
            f"{path} is an adapter; adapters are not quantized like models.",
            hint="--outtype q8_0 makes it smaller. To quantize base and adapter in one: "
            f"edgetune convert {base_dir} --merge {path} -q {quant}",
        )
    if merge:
        raise UsageError(
            f"{path} is an adapter itself.", hint=f"Merge into its base: edgetune convert {base_dir} --merge {path}"
        )
    if outtype not in ADAPTER_OUTTYPES:
        raise UsageError(f"Adapters are not written as {outtype}.", hint=f"Use one of {', '.join(ADAPTER_OUTTYPES)}.")
    type_name = "F16" if outtype == "auto" else outtype.upper()
    return _Job(path, base_dir, _output(output, path / f"adapter-{type_name}.gguf"), outtype)


def _adapter_dir(name: str) -> Path:
    path = find_model(name)
    if classify(path) != "run":
        raise UsageError(f"{path} is not an adapter directory.", hint="--merge takes a run or another PEFT directory.")
    return path


def _plan_dequantized(
    given: tuple[str | None, Path | None],
    *,
    outtype: str,
    quant: str | None,
    merge: str | None,
    base: str | None,
    stack: ExitStack,
) -> _Job:
    """A checkpoint of the run in SOURCE merged into its 4-bit base; it lies beside the output until `stack` ends."""
    source, output = given
    path = find_model(source) if source else _newest_run()
    run = load_run(path) if classify(path) == "run" else None
    if run is None or merge:
        raise UsageError("--dequantized is for a QLoRA run.", hint="edgetune convert RUN --dequantized")
    base_dir = find_model(base) if base else find_base_dir(path)
    name = f"{model_name(base_dir)}-{path.resolve().name}"
    type_name = find_quant_type(quant).name if quant else "F16" if outtype == "auto" else outtype.upper()
    out_path = _output(output, Path.cwd() / f"{name}-{type_name}.gguf")
    place = hidden_path(out_path, "dequantized")
    stack.callback(shutil.rmtree, place, ignore_errors=True)
    require_trained_on(run, base_dir)
    from edgetune.training.dequantize import write_dequantized

    say("Merging into the dequantized base…")
    write_dequantized(run, base_dir, place / name)
    return _Job(place / name, place / name, out_path, outtype, quant)


def _tell_of_four_bits(job: _Job, sink: Sink) -> None:
    run = load_run(job.adapter_dir) if job.adapter_dir else None
    if run is not None and run.method == "qlora":
        text = (
            f"{run.path} was trained beside weights of 4 bits and meets the original ones here, so it answers a little "
            f"differently. To merge it into what it was trained beside: edgetune convert {run.path} --dequantized"
        )
        sink(Notice(text, "warning"))


def _output(output: Path | None, default: Path) -> Path:
    path = default if output is None else output / default.name if output.is_dir() else output
    check_replaceable(path)
    return path


def _newest_run() -> Path:
    runs = Path("runs")
    found = {path: left for path in sorted(runs.glob("*/")) if (left := _trained_weights(path))}
    waiting = [path for path, left in found.items() if not _is_converted(path, left)]
    if not waiting:
        state = "Every run in ./runs is converted already" if found else "There is no finished run in ./runs"
        raise UsageError(f"{state}, and no SOURCE was given.", hint="Name a model or run: edgetune convert SOURCE")
    return max(waiting, key=lambda path: found[path].stat().st_mtime)


def _trained_weights(run_dir: Path) -> Path | None:
    """What the run left that a GGUF file can hold: an adapter, or a whole model (of which this is one file)."""
    if (adapter := run_dir / ADAPTER_WEIGHTS).is_file():
        config = json.loads((run_dir / "adapter_config.json").read_text(encoding="utf-8"))
        return adapter if config.get("peft_type") == "LORA" else None
    return next(iter(sorted(run_dir.glob("model*.safetensors"))), None)


def _is_converted(run_dir: Path, weights: Path) -> bool:
    trained = weights.stat().st_mtime
    made = [*run_dir.glob("*.gguf"), *Path.cwd().glob(f"{glob.escape(model_name(run_dir))}-*.gguf")]
    return any(path.stat().st_mtime >= trained for path in made)


def _export(job: _Job, out_path: Path, *, threads: int, sink: Sink) -> Gguf:
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


def _verify(job: _Job, gguf: Gguf, *, data: Path | None, sink: Sink) -> ParityReport:
    from edgetune.cli.verify import require_passed
    from edgetune.parity import verify

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
def _base_gguf(job: _Job, adapter: Gguf, sink: Sink) -> Iterator[Path]:
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


def _proof(report: ParityReport | None, *, no_verify: bool) -> str:
    if report is None:
        return ", not compared with the original (--no-verify)" if no_verify else ""
    if vectors := report.vectors:
        return _vector_proof(vectors)
    if report.logits is None:
        return f", proved in part; not compared: {', '.join(report.not_checked)}"
    logits = report.logits
    kind = "mean" if logits.bounded == "mean_kl" else "max"
    measured = f"{kind} KL {getattr(logits, logits.bounded):.2g}, at most {logits.bound:.2g} was allowed"
    return f", proved: {measured}; same top token at {logits.top1:.1%} of positions"


def _vector_proof(vectors: VectorParity) -> str:
    scores = "" if vectors.score_difference is None else f"; scores at most {vectors.score_difference:.2g} apart"
    return f", proved: vectors with a cosine of at least {vectors.min_cosine:.6f} on {vectors.texts} texts{scores}"


def _parity_values(report: ParityReport | None) -> dict[str, Any] | None:
    from edgetune.cli.verify import report_values

    return report_values(report) if report else None
