"""`edgetune quantize`: a GGUF model file in any of llama.cpp's quant types."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import click

from edgetune.cli.progress import amount, say, show_progress
from edgetune.cli.terminal import typed_path
from edgetune.errors import UsageError
from edgetune.paths import check_replaceable
from edgetune.quantize import ALIASES, QUANT_TYPES, find_quant_type, quantize


@click.command("quantize")
@click.argument("files", nargs=-1, metavar="IN.gguf [OUT.gguf] TYPE")
@click.option("--list", "list_types", is_flag=True, help="Show every quant type and stop.")
@click.option("--threads", "-t", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is all of them.")
@click.option("--allow-requantize", is_flag=True, help="Take a file that is quantized already, at a further loss.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the path.")
def command(files: tuple[str, ...], list_types: bool, threads: int, allow_requantize: bool, as_json: bool) -> None:
    """Quantize IN.gguf, an F16, BF16 or F32 model, to TYPE (Q4_K_M, Q8_0, …).

    OUT.gguf is IN's name with TYPE in place of its own type, beside IN, unless given.

    \b
    edgetune quantize model-F16.gguf Q4_K_M       writes model-Q4_K_M.gguf
    edgetune quantize --list                      every type, with its size
    """
    if list_types:
        _show_types(as_json=as_json)
        return
    in_path, out_path, type_name = _parse(files)
    started = time.monotonic()
    with show_progress() as sink:
        gguf = quantize(in_path, out_path, type_name, sink=sink, threads=threads, allow_requantize=allow_requantize)
    seconds = round(time.monotonic() - started, 2)
    size, source = gguf.path.stat().st_size, in_path.stat().st_size
    say(f"{gguf.file_type}, {amount(size, 'bytes')} ({size / source:.0%} of {in_path.name}) in {seconds:.1f} s")
    say(f"Next: edgetune {_register(gguf.path)} {shlex.quote(typed_path(gguf.path))}")
    if as_json:
        values = {"path": str(gguf.path), "type": gguf.file_type, "bytes": size, "seconds": seconds}
        click.echo(json.dumps(values))
    else:
        click.echo(gguf.path)


def _parse(files: tuple[str, ...]) -> tuple[Path, Path, str]:
    if len(files) not in (2, 3):
        raise UsageError(
            f"quantize takes an input file, perhaps an output file, and a type; got {len(files)} arguments.",
            hint="For example: edgetune quantize model-F16.gguf Q4_K_M",
        )
    in_path, type_name = Path(files[0]), find_quant_type(files[-1]).name
    if not in_path.is_file():
        raise UsageError(
            f"{in_path} does not exist.", hint="`edgetune convert` makes a GGUF file from a model directory."
        )
    out_path = Path(files[1]) if len(files) == 3 else default_output(in_path, type_name)
    if out_path.is_dir():
        out_path = out_path / default_output(in_path, type_name).name
    check_replaceable(out_path)
    return in_path, out_path, type_name


def default_output(in_path: Path, type_name: str) -> Path:
    """`in_path` with the quant type at the end of its name replaced by `type_name`, or that added."""
    names = "|".join(sorted([*QUANT_TYPES, *ALIASES], key=len, reverse=True))
    stem = re.sub(rf"[-._]({names})$", "", in_path.stem, flags=re.IGNORECASE)
    return in_path.with_name(f"{stem}-{type_name}.gguf")


def _show_types(*, as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": row.name, "bits_per_weight": row.bits, "needs_imatrix": row.needs_imatrix, "note": row.note}
            for row in QUANT_TYPES.values()
        ]
        click.echo(json.dumps(rows))
        return
    for row in QUANT_TYPES.values():
        bits = f"{row.bits:5.2f}" if row.bits else "    -"
        note = f"{row.note}; needs an importance matrix, not supported yet" if row.needs_imatrix else row.note
        click.echo(f"{row.name:<10} {bits} bits/weight  {note}")
    click.echo(f"Short names: {', '.join(f'{short} is {name}' for short, name in ALIASES.items())}.")


def _register(path: Path) -> str:
    """Note where the model lies; returns the verb that uses it."""
    from edgetune.library import purpose_of, register

    register(path)
    return purpose_of(path, "model")
