"""`edgetune convert`: a checkpoint or an adapter becomes a GGUF file, and is proved to be the same.

Parses, calls `conversion`, renders.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from edgetune.artifacts import ParityReport, VectorParity
from edgetune.cli.progress import amount, say, show_progress
from edgetune.cli.terminal import typed_path
from edgetune.conversion import Job, convert
from edgetune.export import OUTTYPES
from edgetune.gguf_header import read_gguf_header


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
    with show_progress() as sink:
        made = convert(
            source,
            output,
            outtype=outtype,
            quant=quant,
            merge=merge,
            dequantized=dequantized,
            base=base,
            data=data,
            verify=not no_verify,
            threads=threads,
            sink=sink,
        )
    job, gguf, report = made.job, made.gguf, made.report
    size = job.out_path.stat().st_size
    what = f"{gguf.file_type or 'GGUF'}, {amount(size, 'bytes')} in {made.seconds:.1f} s"
    say(what + _proof(report, no_verify=no_verify))
    say(f"Next: edgetune {next_command(job, shlex.quote(typed_path(job.out_path)))}")
    if as_json:
        values = {
            "path": str(job.out_path),
            "kind": gguf.kind,
            "type": gguf.file_type,
            "bytes": size,
            "seconds": made.seconds,
            "parity": _parity_values(report),
        }
        click.echo(json.dumps(values))
    else:
        click.echo(job.out_path)


def next_command(job: Job, path: str) -> str:
    """How the file is used: a model that writes text is chatted with, others turn texts into labels or vectors."""
    header = read_gguf_header(job.out_path)
    task = header.metadata.get("edgetune.task", "embedding" if "bert" in header.architecture else None)
    if job.is_adapter and header.architecture.startswith("t5"):
        task = "seq2seq"
    if task in (None, "seq2seq"):
        return f"{'chat' if task is None else 'generate'} {'--lora ' if job.is_adapter else ''}{path}"
    verb = "embed" if task == "embedding" else "classify"
    return f"{verb} {f'{shlex.quote(str(job.base_dir))} --lora ' if job.is_adapter else ''}{path}"


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
