"""What a finished run says for itself: predictions.jsonl and report.html, a page that needs nothing but itself.

Everything from data or models is escaped. Draws on the run record, the curve beside it and the last measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgetune.artifacts import Run
from edgetune.paths import whole_file
from edgetune.training.confusion import MOST_LABELS, confusion_svg
from edgetune.training.tasks import Measured

PREDICTIONS, REPORT, CONFUSION = "predictions.jsonl", "report.html", "confusion.svg"

_SHOWN = 20
"""Predictions on the page; all of them are in the file."""
_LONGEST = 400

_STYLE = """\
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #8884; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
td { white-space: pre-wrap; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }"""


def write_predictions(run_dir: Path, measured: Measured) -> None:
    """What the model said of the measured validation rows, one JSON object a row."""
    if not measured.predictions:
        return
    with whole_file(run_dir / PREDICTIONS) as partial:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in measured.predictions)
        partial.write_text("".join(lines), encoding="utf-8")


def write_report(run: Run, measured: Measured | None, *, curve: str) -> None:
    """The page, and the confusion matrix as a picture of its own. `curve` is the loss curve, an SVG."""
    title = f"{run.base_name}: {run.task}"
    parts = [f"<h1>{escape(title)}</h1>", _before_and_after(run.metrics), "<h2>Loss</h2>", curve]
    labels: Sequence[str] = run.data.get("labels", ())
    if measured is not None and measured.confusion and len(labels) <= MOST_LABELS:
        picture = confusion_svg(measured.confusion, labels, title="validation rows")
        with whole_file(run.path / CONFUSION) as partial:
            partial.write_text(picture, encoding="utf-8")
        parts += ["<h2>Confusion matrix</h2>", picture]
    if measured is not None and measured.predictions:
        parts += ["<h2>Predictions</h2>", _predictions(measured.predictions)]
    parts += ["<h2>Data</h2>", _pairs(_data(run.data)), "<h2>Settings</h2>", _pairs(run.settings)]
    parts += ["<h2>Environment</h2>", _pairs(run.versions)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
    with whole_file(run.path / REPORT) as partial:
        partial.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")


def _before_and_after(metrics: Mapping[str, Any]) -> str:
    before, after = dict(metrics.get("valid_before") or {}), dict(metrics.get("valid") or {})
    if "valid_loss" in metrics:
        after = {"loss": metrics["valid_loss"], **after}
    if "valid_before_loss" in metrics:
        before = {"loss": metrics["valid_before_loss"], **before}
    if not after:
        return "<p>No validation rows were measured.</p>"
    rows = [
        f'<tr><th>{escape(name)}</th><td class="n">{_number(before.get(name))}</td>'
        f'<td class="n">{_number(value)}</td></tr>'
        for name, value in after.items()
    ]
    head = "<tr><th>validation rows</th><th>before</th><th>after</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "scores"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>" for row in rows[:_SHOWN])
    more = f"<p>{len(rows) - _SHOWN} more in {PREDICTIONS}.</p>" if len(rows) > _SHOWN else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    splits = data.get("splits", {})
    flat = {name: value for name, value in data.items() if name != "splits"}
    return {**flat, **{f"{split} {name}": value for split, counts in splits.items() for name, value in counts.items()}}


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
