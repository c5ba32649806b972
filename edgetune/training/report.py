"""What a run says for itself: predictions.jsonl and report.html, a page that needs nothing but itself.

One skeleton for all tasks: what came out, curves, samples before and after, what is learned of the rows, the data, the
settings, the machine. A part that a run has nothing for is left out. Everything from data or models is escaped, and the
page's own policy forbids it to load anything. Draws on the run record and on what the run wrote on its way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from edgetune.artifacts import Run
from edgetune.errors import EdgetuneError
from edgetune.events import Notice, Sink
from edgetune.paths import bytes_text, whole_file
from edgetune.training.confusion import MOST_LABELS, confusion_svg
from edgetune.training.curve import Line, chart_svg, histogram_svg, loss_svg
from edgetune.training.metrics_log import points, read_metrics
from edgetune.training.prepare import Prepared
from edgetune.training.samples import Said, read_samples
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks import Measured

PREDICTIONS, REPORT, CONFUSION, CURVE = "predictions.jsonl", "report.html", "confusion.svg", "loss.svg"

_SHOWN = 20
"""Predictions on the page; all of them are in the file."""
_PREVIEWED = 3
"""Training sequences whose tokens are shown."""
_PREVIEWED_TOKENS = 400
_LONGEST = 800
"""Characters of a cell."""

_LENGTHS = (("shortest", 0.0), ("median length", 0.5), ("95 % are no longer than", 0.95), ("longest", 1.0))
_CURVES = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens a second"}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    cells: Sequence[str]
    marked: bool = False


@dataclass(frozen=True)
class Part:
    """A piece of a section: whatever of these there is."""

    text: str = ""
    svg: str = ""
    tokens: Sequence[tuple[str, bool]] = ()
    """(piece, whether it is learned)."""
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    named: bool = True
    """Whether the first cell of a row is its name."""

    @property
    def numbers(self) -> frozenset[int]:
        """Columns of nothing but numbers."""
        columns = enumerate(zip(*(row.cells for row in self.rows), strict=False))
        return frozenset(index for index, cells in columns if all(map(_is_number, cells)))


@dataclass(frozen=True)
class Section:
    """A heading with its parts."""

    title: str
    parts: Sequence[Part]

    @property
    def id(self) -> str:
        """Where the page's own links lead."""
        return re.sub(r"\W+", "-", self.title.lower())

    @property
    def is_pictures(self) -> bool:
        """Whether there is nothing but pictures in it, which may stand beside each other."""
        return len(self.parts) > 1 and all(part.svg and not part.rows for part in self.parts)


@dataclass(frozen=True)
class Told:
    """What a report is made from, beside the run's directory."""

    prepared: Prepared
    environment: Mapping[str, str]
    """Device, cores, memory: what the run computed on."""
    measured: Measured = field(default_factory=Measured)
    """The last measurement."""


def write_predictions(run_dir: Path, measured: Measured) -> None:
    """What the model said of the measured validation rows, one JSON object a row."""
    if not measured.predictions:
        return
    with whole_file(run_dir / PREDICTIONS) as partial:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in measured.predictions)
        partial.write_text("".join(lines), encoding="utf-8")


def write_report(run: Run, told: Told, *, sink: Sink) -> None:
    """The page, the loss curve and the confusion matrix as pictures. A run is whole without: what fails is told."""
    try:
        entries = read_metrics(run.path)
        title = f"{run.base_name} on {run.data['format']}"
        curve = loss_svg(points(entries, "train", "loss"), points(entries, "valid", "loss"), title=title)
        _write(run.path / CURVE, curve)
        if confusion := _confusion(run, told.measured):
            _write(run.path / CONFUSION, confusion)
        _write(run.path / REPORT, _page(run, told, entries, confusion))
    except (EdgetuneError, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        sink(Notice(f"{run.path / REPORT} was not written: {error}. The run itself is whole.", "warning"))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _page(run: Run, told: Told, entries: Sequence[Mapping[str, Any]], confusion: str) -> str:
    from jinja2 import Environment

    measured = told.measured
    sections = [
        Section("Result", [_before_and_after(run.metrics)]),
        Section("Curves", _curves(run, entries)),
        Section("Samples", _samples(read_samples(run.path))),
        Section("Confusion matrix", [Part(svg=confusion)] if confusion else []),
        Section("Predictions", _predictions(measured.predictions)),
        Section("What is learned", _learned(told.prepared)),
        Section("Data", _data(run, told.prepared)),
        Section("Settings", [_settings(run.settings)]),
        Section("Environment", [_pairs({**told.environment, **run.versions})]),
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("edgetune.training").joinpath("report.html").read_text(encoding="utf-8")
    state = "" if run.finished else ", not finished"
    return environment.from_string(template).render(
        title=f"{run.base_name}: {run.task}",
        subtitle=f"{run.method} on {run.data['format']}, {run.created}{state}",
        facts=_facts(run, entries),
        sections=[section for section in sections if section.parts],
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?|–", text) is not None


# --- what came out


def _facts(run: Run, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    metrics, peak = run.metrics, max((entry.get("memory_bytes", 0) for entry in entries), default=0)
    seconds = int(metrics.get("seconds", 0))
    facts = [
        ("steps", f"{metrics.get('step', 0):,}"),
        ("time in steps", f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"),
        ("tokens", f"{metrics.get('tokens', 0):,}"),
        ("tokens/s", f"{metrics.get('tokens_per_second', 0):,.0f}"),
        ("peak memory", bytes_text(peak)),
        ("seed", str(run.settings.get("seed", 0))),
    ]
    if best := metrics.get("best"):
        facts.append(("kept", f"step {int(best['step'])}"))
    return facts


def _before_and_after(metrics: Mapping[str, Any]) -> Part:
    before, after = dict(metrics.get("valid_before") or {}), dict(metrics.get("valid") or {})
    for values, name in ((after, "valid_loss"), (before, "valid_before_loss")):
        if name in metrics:
            values["loss"] = metrics[name]
    if not after:
        return Part(text="No validation rows were measured.")
    names = sorted(after, key=lambda name: name != "loss")
    rows = [Row([name, _number(before.get(name)), _number(after[name])]) for name in names]
    return Part(head=["validation rows", "before", "after"], rows=rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def _curves(run: Run, entries: Sequence[Mapping[str, Any]]) -> list[Part]:
    def chart(title: str, *lines: Line) -> Part:
        return Part(svg=chart_svg(lines, title=title))

    train, valid = points(entries, "train", "loss"), points(entries, "valid", "loss")
    measured = dict.fromkeys(name for entry in entries if entry["split"] == "valid" for name in entry)
    memory = [(step, size / 1e9) for step, size in points(entries, "train", "memory_bytes")]
    return [
        Part(svg=loss_svg(train, valid, title="loss")),
        *(
            chart(name, Line("validation rows", points(entries, "valid", name), measured=True))
            for name in measured
            if name not in ("step", "split", "loss")
        ),
        *(
            chart(title, Line("", points(entries, "train", name), smooth=name != "lr"))
            for name, title in _CURVES.items()
        ),
        chart("memory in GB", Line("", memory)),
    ]


def _confusion(run: Run, measured: Measured) -> str:
    labels: Sequence[str] = run.data.get("labels", ())
    if not measured.confusion or len(labels) > MOST_LABELS:
        return ""
    return confusion_svg(measured.confusion, labels, title="validation rows")


# --- what the model says


def _samples(said: Mapping[str, Sequence[Said]]) -> list[Part]:
    before, after = said.get("before", ()), said.get("after", ())
    if not (before or after):
        return []
    names = [name for name in (after or before)[0] if name != "scores"]
    paired = list(zip(before, after, strict=False))
    changing = {name for name in names if name == "predicted" or any(a.get(name) != b.get(name) for a, b in paired)}
    asked = [name for name in names if name not in changing]
    head = [*asked]
    for name in (name for name in names if name in changing):
        head += [f"{name} before"] * bool(before) + [f"{name} after"] * bool(after)
    rows = []
    for index, row in enumerate(after or before):
        cells = [_cell(row.get(name)) for name in asked]
        for name in (name for name in names if name in changing):
            cells += [_said(rows_of[index], name) for rows_of in (before, after) if rows_of]
        rows.append(Row(cells))
    return [
        Part(
            text="The same held-out rows, before the first step and with what was saved.",
            head=head,
            rows=rows,
            named=False,
        )
    ]


def _said(row: Said, name: str) -> str:
    """What the model says, and how sure it is where it says that."""
    scores = row.get("scores") if name == "predicted" else None
    sure = f" ({scores[row[name]]:.2f})" if isinstance(scores, dict) and row[name] in scores else ""
    return _cell(row.get(name)) + sure


def _predictions(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    if not rows:
        return []
    names = [name for name in rows[0] if name != "scores"]
    more = f"{len(rows) - _SHOWN} more in {PREDICTIONS}." if len(rows) > _SHOWN else ""
    shown = [Row([_cell(row.get(name)) for name in names]) for row in rows[:_SHOWN]]
    return [Part(head=names, rows=shown, named=False), *([Part(text=more)] if more else [])]


def _learned(prepared: Prepared) -> list[Part]:
    shown = prepared.train[:_PREVIEWED]
    written = any(sequence.learned.any() for sequence in shown)
    text = "What is shaded is learned; the rest is what it follows on."
    parts = [Part(text=text if written else "The tokens that are read; learned is what the row says of them.")]
    for sequence in shown:
        ids = sequence.ids[:_PREVIEWED_TOKENS].tolist()
        pieces = list(zip(prepared.tokenizer.pieces(ids), sequence.learned.tolist(), strict=False))
        more = len(sequence.ids) - len(ids)
        parts.append(Part(tokens=[*pieces, *([(f" … {more:,} more", False)] if more else [])]))
    return parts


# --- what it came from


def _data(run: Run, prepared: Prepared) -> list[Part]:
    splits, overlap = prepared.splits, prepared.dataset.overlap
    names = list(splits)
    counts = {name: split.summary() for name, split in splits.items()}
    lengths = {name: sorted(len(sequence.ids) for sequence in split.sequences) for name, split in splits.items()}
    rows = [Row([key.replace("_", " "), *(f"{counts[name][key]:,}" for name in names)]) for key in counts[names[0]]]
    for title, share in _LENGTHS:
        rows.append(Row([title, *(f"{_at(lengths[name], share):,}" for name in names)]))
    rows.append(Row(["repeat another row", *(f"{overlap.repeated:,}" if n == "train" else "–" for n in names)]))
    rows.append(
        Row(["are training rows too", *(f"{overlap.leaked[n]:,}" if n in overlap.leaked else "–" for n in names)])
    )
    table = Part(head=["", *names], rows=rows)
    title = "rows by tokens" + (" (validation: orange)" if lengths.get("valid") else "")
    picture = histogram_svg(lengths["train"], lengths.get("valid", ()), title=title, across="tokens of a sequence")
    return [table, Part(svg=picture), _pairs({key: value for key, value in run.data.items() if key != "splits"})]


def _at(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def _settings(settings: Mapping[str, Any]) -> Part:
    default = TrainSettings().record()
    rows = [Row([name, _cell(value)], marked=value != default.get(name)) for name, value in settings.items()]
    return Part(text="Those in bold are not the defaults.", rows=rows)


def _pairs(values: Mapping[str, Any]) -> Part:
    return Part(rows=[Row([name.replace("_", " "), _cell(value)]) for name, value in values.items()])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (text if len(text) <= _LONGEST else text[:_LONGEST] + "…") or "–"
