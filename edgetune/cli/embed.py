"""`edgetune embed`: texts become vectors, on stdout or in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.encoder_options import CHUNK, encoder_options, open_model, say_what_was_cut, shown_progress
from edgetune.cli.progress import say, show_progress
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.cli.text_rows import TextRow
    from edgetune.engine.encoder import Encoder
    from edgetune.head import Array

_BY_SUFFIX = {".npy": "npy", ".parquet": "parquet"}
_NOT_WRITTEN = (".csv", ".tsv", ".npz", ".safetensors")
"""Names that promise another format than there is."""


@click.command("embed", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("texts", nargs=-1, metavar="[TEXT|FILE|-]…")
@click.option(
    "--pooling", type=click.Choice(["auto", "mean", "cls", "last", "max"]), default="auto", show_default=True,
    help="What is made of the last hidden states; auto is what the model was made for.",
)  # fmt: skip
@click.option("--normalize/--no-normalize", default=None, help="Vectors of length 1. [default: as the model says]")
@click.option("--prompt-name", help="Put the model's own prompt of this name before each text, e.g. query.")
@click.option(
    "--format", "output_format", type=click.Choice(["json", "npy", "parquet"]),
    help='json is one object a text: {"text": …, "embedding": […]}. [default: by -o\'s name, else json]',
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write here instead of stdout.")
@encoder_options
def command(
    model: str,
    texts: tuple[str, ...],
    pooling: str,
    normalize: bool | None,
    prompt_name: str | None,
    output_format: str | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Turn texts into vectors.

    MODEL is a path or a name: a GGUF, a Hugging Face or sentence-transformers directory, or a run. A FILE has a text a
    line (.txt) or rows with a column text (.jsonl, .csv, .parquet); `-` reads lines of standard input.

    \b
    edgetune embed minilm "a text" "another text"
    edgetune embed minilm corpus.jsonl -o corpus.npy
    """
    from edgetune.cli.text_rows import read_rows

    kind = output_format or _BY_SUFFIX.get(output.suffix.lower() if output else "", "json")
    if output_format is None and output and output.suffix.lower() in _NOT_WRITTEN:
        raise UsageError(f"Vectors are not written as {output.suffix}.", hint="Take .jsonl, .npy or .parquet.")
    if kind != "json" and output is None and (kind == "parquet" or sys.stdout.isatty()):
        raise UsageError(f"{kind} is for a file.", hint=f"Name one: -o vectors.{kind}")
    if kind == "parquet":
        _require_pyarrow()
    rows = read_rows(texts, skip_bad=options.pop("skip_bad"))
    long = options.pop("long")
    with show_progress() as sink:
        encoder = open_model(model, options, sink=sink)
        from edgetune.engine.encoder import notice_of_decoder

        notice_of_decoder(encoder.profile, sink)
    with encoder:
        settings = {"pooling": pooling, "normalize": normalize, "prompt_name": prompt_name, "long": long}
        chunks = _embed(encoder, rows, settings)
        if output is not None:
            _write_file(output, kind, rows, chunks)
            say(f"{len(rows)} vectors in {output}")
        elif kind == "npy":
            _write_npy(sys.stdout.buffer, rows, chunks)
        else:
            for part, vectors in chunks:
                click.echo(_json_lines(part, vectors), nl=False)
        say_what_was_cut(encoder)


def _embed(
    encoder: Encoder, rows: Sequence[TextRow], settings: dict[str, Any]
) -> Iterator[tuple[Sequence[TextRow], Array]]:
    with shown_progress(len(rows)) as sink_of:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            yield part, encoder.embed([row.text for row in part], **settings, sink=sink_of(start))


def _write_file(
    path: Path, kind: str, rows: Sequence[TextRow], chunks: Iterator[tuple[Sequence[TextRow], Array]]
) -> None:
    from edgetune.paths import whole_file

    with whole_file(path) as partial:
        if kind == "parquet":
            _write_parquet(partial, rows, chunks)
        elif kind == "npy":
            with partial.open("wb") as file:
                _write_npy(file, rows, chunks)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for part, vectors in chunks:
                    file.write(_json_lines(part, vectors))


def _json_lines(rows: Sequence[TextRow], vectors: Array) -> str:
    """With as many digits as tell a float32 from its neighbours: Python would print those of a float64."""
    lines: list[str] = []
    for row, digits in zip(rows, vectors.astype(str), strict=True):
        values = json.dumps(row.values(), ensure_ascii=False)
        lines.append(f'{values[:-1]}, "embedding": [{", ".join(digits)}]}}\n')
    return "".join(lines)


def _write_npy(file: Any, rows: Sequence[TextRow], chunks: Iterator[tuple[Sequence[TextRow], Array]]) -> None:
    """As numpy's `save` would, a chunk at a time."""
    from numpy.lib import format as npy

    for number, (_, vectors) in enumerate(chunks):
        if not number:
            shape = (len(rows), vectors.shape[1])
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(vectors.astype("<f4").tobytes())


def _write_parquet(path: Path, rows: Sequence[TextRow], chunks: Iterator[tuple[Sequence[TextRow], Array]]) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    for part, vectors in chunks:
        names = list(part[0].values())
        columns = {name: [row.values()[name] for row in part] for name in names}
        flat = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
        columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pyarrow.table(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _require_pyarrow() -> None:
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise UsageError("Parquet files need pyarrow.", hint="pip install 'edgetune[train]'; or --format npy")
