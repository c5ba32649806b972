"""`edgetune classify`: texts get labels with probabilities, or a number."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgetune.cli.encoder_options import CHUNK, encoder_options, open_model, say_what_was_cut, shown_progress
from edgetune.cli.progress import say, show_progress
from edgetune.cli.terminal import aligned, plain
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.cli.text_rows import TextRow
    from edgetune.engine.encoder import Classification


@click.command("classify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("texts", nargs=-1, metavar="[TEXT|FILE|-]…")
@click.option("--pair", is_flag=True, help="Two texts at a time: two arguments, two columns, a tab within a line.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1),
    help="Least probability of a label that is given. [default: 0.5 where a text may have several, else none]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help='Print an object a text: {"text": …, "label": …, "scores": {…}}.')
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the objects here.")
@encoder_options
def command(
    model: str,
    texts: tuple[str, ...],
    pair: bool,
    threshold: float | None,
    as_json: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Give texts their labels, or numbers, by a classifier or regression model.

    MODEL is a path or a name: a GGUF, a Hugging Face directory, or a run. A FILE has a text a line (.txt) or rows with
    a column text, or two of a pair (.jsonl, .csv, .parquet); `-` reads lines of standard input.

    \b
    edgetune classify sentiment "a film worth its time"
    edgetune classify bert-base --lora runs/mine reviews.csv -o labels.jsonl
    """
    from edgetune.cli.text_rows import read_rows

    if options["long"] == "window":
        raise UsageError("Only vectors can be averaged over windows.", hint="Take --long truncate or error.")
    rows = read_rows(texts, pair=pair, skip_bad=options.pop("skip_bad"))
    long = options.pop("long")
    with show_progress() as sink:
        encoder = open_model(model, options, sink=sink)
    with encoder:
        if not encoder.scores_texts:
            encoder.classify([])  # says what is lacking, and the way out
        with _target(output) as file, shown_progress(len(rows)) as sink_of:
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                found = encoder.classify(
                    [row.text for row in part], threshold=threshold, long=long, sink=sink_of(start)
                )
                write = _json_lines if as_json or output else _table if len(rows) == 1 else _lines
                task = encoder.profile.head.task if encoder.profile.head else ""
                file.write(write(part, found, task))
        if output:
            say(f"{len(rows)} rows in {output}")
        say_what_was_cut(encoder)


def result_values(row: TextRow, found: Classification, task: str) -> dict[str, Any]:
    """A text's result in the shape that scripts rely on."""
    if found.values:
        return {**row.values(), "value": found.values[0] if len(found.values) == 1 else list(found.values)}
    label: Any = list(found.labels) if task == "multilabel" else next(iter(found.labels), None)
    return {**row.values(), "label": label, "scores": dict(found.scores)}


@contextmanager
def _target(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    from edgetune.paths import whole_file

    with whole_file(output) as partial, partial.open("w", encoding="utf-8") as file:
        yield file


def _json_lines(rows: Sequence[TextRow], found: Sequence[Classification], task: str) -> str:
    lines = (
        json.dumps(result_values(row, one, task), ensure_ascii=False) for row, one in zip(rows, found, strict=True)
    )
    return "".join(f"{line}\n" for line in lines)


def _table(rows: Sequence[TextRow], found: Sequence[Classification], task: str) -> str:
    """Every label of the one text, the likeliest first."""
    if found[0].values:
        return "".join(f"{value:.6g}\n" for value in found[0].values)
    ranked = sorted(found[0].scores.items(), key=lambda item: -item[1])
    marked = [(f"{'*' if label in found[0].labels else ' '} {label}", f"{score:.4f}") for label, score in ranked]
    return "".join(f"{line}\n" for line in aligned(marked, on_terminal=False))


def _lines(rows: Sequence[TextRow], found: Sequence[Classification], task: str) -> str:
    """A line a text: label, probability, text."""
    lines: list[str] = []
    for row, one in zip(rows, found, strict=True):
        text = plain(" | ".join(row.values().values()).replace("\n", " ").replace("\t", " "))
        if one.values:
            lines.append(f"{' '.join(f'{value:.6g}' for value in one.values)}\t{text}\n")
            continue
        labels = ", ".join(one.labels) or "-"
        score = max((one.scores[label] for label in one.labels), default=0.0)
        lines.append(f"{plain(labels)}\t{score:.4f}\t{text}\n")
    return "".join(lines)
