"""`edgetune verify`: the parity gate by itself, as a table for people or JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgetune import library
from edgetune.artifacts import ParityCheck, ParityReport, VectorParity
from edgetune.cli.progress import show_progress
from edgetune.parity import verify
from edgetune.parity.verdict import WHAT, require_passed


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base_dir", metavar="BASE_DIR")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.option("--adapter", "adapter_dir", type=click.Path(path_type=Path), help="PEFT adapter or run directory.")
@click.option("--lora", "lora_path", type=click.Path(path_type=Path), help="The adapter's GGUF file.")
@click.option("--merged", is_flag=True, help="GGUF holds base and adapter merged; give --adapter, not --lora.")
@click.option("--data", "data_path", type=click.Path(path_type=Path), help="Predict held-out rows of this dataset.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    base_dir: str,
    gguf: Path,
    adapter_dir: Path | None,
    lora_path: Path | None,
    merged: bool,
    data_path: Path | None,
    as_json: bool,
) -> None:
    """Prove that GGUF computes what the Hugging Face model in BASE_DIR does; exit code 4 if it does not.

    \b
    edgetune verify path/to/model model-Q4_K_M.gguf
    edgetune verify path/to/model model-F16.gguf --adapter runs/mine --lora runs/mine/adapter-F16.gguf
    """
    with show_progress() as sink:
        report = verify(
            library.find_model(base_dir),
            gguf,
            adapter_dir=adapter_dir,
            lora_path=lora_path,
            merged=merged,
            data_path=data_path,
            sink=sink,
        )
    if as_json:
        click.echo(json.dumps(report_values(report), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    require_passed(report)


def report_values(report: ParityReport) -> dict[str, Any]:
    """The report in the shape that scripts rely on."""
    logits = report.logits
    values: dict[str, Any] = {"passed": report.passed, "gguf": str(report.gguf_path)}
    values["lora"] = str(report.lora_path) if report.lora_path else None
    for check in report.checks:
        values[check.name] = _check_values(check)
    values["logits"] = logits and {
        "passed": logits.passed,
        "positions": logits.positions,
        "mean_kl": _finite(logits.mean_kl),
        "max_kl": _finite(logits.max_kl),
        "top1": logits.top1,
        "bound": logits.bound,
        "bounded": logits.bounded,
    }
    if vectors := report.vectors:
        values["embeddings"] = {
            "passed": vectors.passed,
            "texts": vectors.texts,
            "min_cosine": _finite(vectors.min_cosine),
            "mean_distance": _finite(vectors.mean_distance),
            "max_difference": _finite(vectors.max_difference),
            "bound": vectors.bound,
            "bounded": vectors.bounded,
        }
        if vectors.score_difference is not None:
            measured = _finite(vectors.score_difference)
            values["scores"] = {"max_difference": measured, "bound": vectors.score_bound}
    values["not_checked"] = list(report.not_checked)
    return values


def print_report(report: ParityReport) -> None:
    """The report as a table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for check in report.checks:
        mark = "[dim]–[/]" if check.skipped else _mark(check.passed)
        counted = "" if check.skipped else f"{check.equal} of {check.checked} equal"
        table.add_row(mark, WHAT.get(check.name, check.name), counted, escape(check.skipped or check.first_difference))
    if logits := report.logits:
        kind = "mean" if logits.bounded == "mean_kl" else "max"
        measured = f"{kind} KL {getattr(logits, logits.bounded):.2g}"
        table.add_row(_mark(logits.passed), "next tokens", measured, f"at most {logits.bound:.2g} for this file type")
        other = f"max KL {logits.max_kl:.2g}" if kind == "mean" else f"mean KL {logits.mean_kl:.2g}"
        table.add_row("", "", other, f"top-1 {logits.top1:.1%} at {logits.positions} positions")
    if vectors := report.vectors:
        for row in _vector_rows(vectors):
            table.add_row(*row)
    for missing in report.not_checked:
        table.add_row("[yellow]![/]", "not checked", "", escape(missing))
    Console().print(table)


def _vector_rows(vectors: VectorParity) -> Iterator[tuple[str, str, str, str]]:
    measured, bound = f"least cosine {vectors.min_cosine:.6f}", f"at least {vectors.bound:.6f}"
    if vectors.bounded == "mean_distance":
        measured = f"1 - cosine {vectors.mean_distance:.2g}"
        bound = f"at most {vectors.bound:.2g} on average for this file type"
        near = vectors.mean_distance <= vectors.bound
    else:
        near = vectors.min_cosine >= vectors.bound
    yield _mark(near), "vectors", measured, bound
    yield "", "", f"largest difference {vectors.max_difference:.2g}", f"{vectors.texts} texts"
    if (scores := vectors.score_difference) is not None:
        yield (
            _mark(scores <= vectors.score_bound),
            "scores",
            f"{scores:.2g} apart",
            f"at most {vectors.score_bound:.2g}",
        )


def _check_values(check: ParityCheck) -> dict[str, Any]:
    values: dict[str, Any] = {"passed": check.passed, "checked": check.checked, "equal": check.equal}
    if check.first_difference:
        values["first_difference"] = check.first_difference
    if check.skipped:
        values["skipped"] = check.skipped
    return values


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _mark(passed: bool) -> str:
    return "[green]✔[/]" if passed else "[red]✘[/]"
