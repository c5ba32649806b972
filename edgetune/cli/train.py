"""`edgetune train`: flags to settings, then the run under a dashboard. The run's path goes to stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from edgetune.artifacts import SWEEP_RECORD, Run
from edgetune.cli.attribute_docs import attribute_docs
from edgetune.cli.dashboard import duration, show_preview, show_training
from edgetune.cli.progress import amount, say
from edgetune.errors import EdgetuneError, InterruptedRun, UsageError
from edgetune.training.processes import leads, world_size
from edgetune.training.settings import TrainSettings, find_recipe, flag_name, merge_settings, read_recipe

PREVIEWED = 2
"""Sequences that `--dry-run` shows."""

PREVIEWED_TOKENS = 400
"""Tokens of each that a person is shown."""

_MORE_FLAGS = {"model": ["-m"], "data": ["-d"], "out": ["-o"], "grad_checkpointing": ["--gradient-checkpointing"]}
_METAVARS = {
    "model": "MODEL",
    "data": "PATH",
    "out": "RUN",
    "target_modules": "NAMES",
    "modules_to_save": "NAMES",
    "report_to": "NAMES",
    "chat_template": "FILE",
    "rank_pattern": "PATTERN=RANK",
    "alpha_pattern": "PATTERN=ALPHA",
    "option": "NAME=VALUE",
    "task": "TASK",
    "method": "METHOD",
    "metric": "NAME",
    "src_lang": "LANG",
    "tgt_lang": "LANG",
    "prefix": "TEXT",
}


_RECIPE_HELP = (
    "Settings from a TOML file, or one of chat, classification, dpo, embedding, qlora, small-memory, translation; "
    "flags override it."
)


def _setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for every setting. Its default is None, so that a flag not given leaves the recipe's value."""
    docs, hints = attribute_docs(TrainSettings), get_type_hints(TrainSettings)
    for item in reversed(fields(TrainSettings)):
        hint, name = hints[item.name], item.name
        flags = [*_MORE_FLAGS.get(name, []), flag_name(name)]
        options: dict[str, Any] = {"default": None, "help": docs[name] + _default_text(name)}
        if hint is bool:
            flags = [f"{flag_name(name)}/--no-{name.replace('_', '-')}"]
        elif hint in (int, float, str):
            options |= {"type": hint, "metavar": _METAVARS.get(name)}
        elif get_origin(hint) is Literal:
            options["type"] = click.Choice(get_args(hint))
            if "on" in get_args(hint):
                options |= {"is_flag": False, "flag_value": "on"}
        else:
            options |= {"multiple": True, "metavar": _METAVARS[name]}
        function = click.option(*flags, name, **options)(function)
    return function


def _default_text(name: str) -> str:
    default = getattr(TrainSettings(), name)
    if default in ("", (), {}, False, 0) or default in ("auto", "none", -1) or name in ("method", "device", "dtype"):
        return ""
    return f"  [default: {' '.join(default) if isinstance(default, tuple) else default}]"


@click.command("train", short_help="Train an adapter on your data.")
@_setting_options
@click.option("--no-grad-checkpointing", "no_checkpointing", is_flag=True, hidden=True)
@click.option("--recipe", metavar="NAME|FILE", help=_RECIPE_HELP)
@click.option(
    "--sweep",
    multiple=True,
    metavar="NAME=A,B [NAME=C,D]...",
    help="Try every combination of values and rank the runs, under OUT/.",
)
@click.argument("more", nargs=-1, metavar="")
@click.option("--find-lr", is_flag=True, help="Try learning rates in a short run and suggest one; write nothing.")
@click.option("--resume", is_flag=False, flag_value="", metavar="[RUN]", help="Go on with an unfinished run.")
@click.option("--dry-run", is_flag=True, help="Show the plan and which tokens are learned; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Write the result to stdout as JSON.")
def command(
    recipe: str | None,
    sweep: Sequence[str],
    more: Sequence[str],
    find_lr: bool,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a LoRA adapter for MODEL on your data and write a run: a PEFT directory with a record.

    The format of the data is detected: chat messages, ShareGPT, Alpaca, prompt/completion, question/answer or plain
    text, in JSONL, JSON, CSV, Parquet or .txt files. Only what the assistant says is learned. Other tasks read
    text, label; text_a, text_b, label; text, score; source, target; anchor, positive, negative; prompt, chosen,
    rejected; prompt, completion, label; and their usual names.

    \b
    edgetune train -m pocket -d tickets/            train/valid/test files in a directory
    edgetune train -m pocket -d chat.jsonl --recipe chat --dry-run
    edgetune train -m pocket -d tickets/ --sweep lr=1e-3,3e-3 rank=8,16
    edgetune train --resume                         after Ctrl-C, a crash or a power cut
    """
    if more and not sweep:
        raise UsageError(f"{more[0]!r} is not expected here.", hint="A model is given with -m, data with -d.")
    given = {**(read_recipe(find_recipe(recipe)) if recipe else {}), **_given(options)}
    if find_lr:
        from edgetune.cli.find_lr import show_search

        if sweep or dry_run or resume is not None:
            raise UsageError("--find-lr goes with neither --sweep, --resume nor --dry-run.")
        show_search(merge_settings(given, {}), as_json=as_json)
        return
    if sweep or (resume and Path(resume, SWEEP_RECORD).is_file()):
        from edgetune.cli.train_sweep import train_sweep

        if world_size() > 1:
            raise UsageError("A sweep's runs are trained by one process.", hint="Start it without the launcher.")
        train_sweep(given, [*sweep, *more], resume, dry_run=dry_run, as_json=as_json)
        return
    if dry_run and resume is None:
        if leads():
            show_plan(merge_settings(given, {}), as_json=as_json)
        return
    try:
        result = _train(given) if resume is None else _resume(Path(resume or options["out"] or ""), given)
    except InterruptedRun as error:
        if leads():
            raise
        raise SystemExit(error.exit_code) from error
    if not leads():
        return
    tell_run(result)
    click.echo(json.dumps(result.record(), ensure_ascii=False) if as_json else str(result.path))


def _chosen_text(settings: TrainSettings) -> str:
    """The settings that are not the defaults, beside their defaults; those told elsewhere left out."""
    default, told = TrainSettings().record(), {"model", "data", "out", "task", "method"}
    texts = [
        f"{flag_name(name)} {value} (default {default[name] if default[name] not in ('', [], {}) else 'none'})"
        for name, value in settings.chosen().items()
        if name not in told
    ]
    return ", ".join(texts) or "every setting is the default"


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as settings."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if given.pop("no_checkpointing", False):
        given["grad_checkpointing"] = "off"
    for name in ("target_modules", "modules_to_save", "report_to"):
        if name in given:
            given[name] = tuple(part for value in given[name] for part in _names(value))
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if name in given:
            given[name] = dict(_pattern(name, value, kind) for value in given[name])
    if "option" in given:
        given["option"] = dict(_option(value) for value in given["option"])
    return given


def _names(value: str) -> list[str]:
    """A list of names may be given as one word; a regular expression stays as it is."""
    return re.split(r"[,\s]+", value.strip()) if re.fullmatch(r"[\w.,\s-]+", value) else [value]


def _pattern(name: str, value: str, number: Callable[[str], float]) -> tuple[str, float]:
    pattern, _, text = value.rpartition("=")
    try:
        return pattern, number(text)
    except ValueError as error:
        raise UsageError(f"{flag_name(name)} is {value!r}, expected {_METAVARS[name]}.") from error


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--option is {text!r}, expected NAME=VALUE.")
    return name.replace("-", "_"), value


def _train(given: Mapping[str, Any]) -> Run:
    from edgetune.training.run import train

    settings = merge_settings(given, {})
    with show_training() as sink:
        return train(settings, sink=sink)


def _resume(run_dir: Path, given: Mapping[str, Any]) -> Run:
    from edgetune.training.run import resume
    from edgetune.training.run_dirs import newest_unfinished_run

    if run_dir == Path():
        run_dir = newest_unfinished_run()
    if not run_dir.is_dir():
        raise UsageError(f"There is no run at {run_dir}.")
    settings = merge_settings(TrainSettings.from_record(Run.load(run_dir).settings).record(), given)
    with show_training() as sink:
        return resume(run_dir, settings=settings, sink=sink)


def tell_run(run: Run) -> None:
    """What came of `run`, and what to do with it; it is in the library from now on."""
    from edgetune.library import register

    register(run.path)
    metrics, valid = run.metrics, ""
    if "valid_loss" in run.metrics:
        valid = f", validation loss {metrics['valid_before_loss']:.4f} → {metrics['valid_loss']:.4f}"
    before, after = metrics.get("valid_before", {}), metrics.get("valid", {})
    for name in list(after)[:2]:
        valid += f", {name} {before.get(name, float('nan')):.4f} → {after[name]:.4f}"
    took = f"{metrics['step']} steps in {duration(metrics['seconds'])}"
    say(f"{took}, {metrics['tokens_per_second']:,.0f} tokens/s{valid}.")
    if (run.path / "report.html").is_file():
        say(f"Report: {run.path / 'report.html'}")
    say(f"Next: edgetune {_next(run)}")


def _next(run: Run) -> str:
    """The command to go on with: what no GGUF file holds is used as it is."""
    from edgetune.export import check_convertible
    from edgetune.library import purpose_of

    purpose = purpose_of(run.path, "run")
    used = f"{'generate' if purpose == 'chat' else purpose} {run.path}"
    config = run.path / "adapter_config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("peft_type") != "LORA":
        return f"{used} --engine torch"
    try:
        if run.base_path.is_dir():
            check_convertible(run.base_path)
    except EdgetuneError:
        return used
    return f"convert {run.path}"


def show_plan(settings: TrainSettings, *, as_json: bool) -> None:
    """What a run would do, and which tokens it would learn; trains nothing."""
    from edgetune.training.prepare import Prepared, plan, prepare

    with show_training() as sink:
        prepared: Prepared = prepare(settings, sink=sink)
        planned = plan(settings, prepared, sink=sink)
    shown = []
    for sequence in prepared.train[:PREVIEWED]:
        ids = sequence.ids.tolist()
        shown.append((ids, prepared.tokenizer.pieces(ids), sequence.learned.tolist()))
    if as_json:
        preview = [{"ids": ids, "pieces": pieces, "learned": learned} for ids, pieces, learned in shown]
        record = {
            "plan": asdict(planned),
            "data": prepared.data_record(),
            "settings": settings.record(),
            "chosen": settings.chosen(),
        }
        click.echo(json.dumps({**record, "preview": preview}, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(stderr=True)
    for _, pieces, learned in shown:
        console.rule("what is learned", style="dim")
        show_preview(console, list(zip(pieces, learned, strict=True)), most=PREVIEWED_TOKENS)
    console.rule(style="dim")
    for name, split in prepared.splits.items():
        cut = f", {split.truncated} cut at {prepared.max_length}" if split.truncated else ""
        dropped = f", {split.dropped} left out" if split.dropped else ""
        say(
            f"{name}: {split.rows:,} rows, {len(split.sequences):,} sequences, {split.tokens:,} tokens, "
            f"{split.learned_tokens:,} of them learned{cut}{dropped}"
        )
    for part in prepared.mix.record():
        say("{data}: weight {weight:g}, {in_an_epoch:,} of its {sequences:,} sequences an epoch".format(**part))
    say(f"task {prepared.task.name}, method {settings.method}; {_chosen_text(settings)}")
    trainable, every = planned.trainable_parameters, planned.all_parameters
    say(f"adapter: {trainable:,} of {every:,} parameters are trained ({trainable / every:.2%})")
    say(f"steps: {planned.steps:,} ({planned.steps_per_epoch:,} an epoch)")
    free, taken = amount(planned.free_memory_bytes, "bytes"), planned.memory_bytes
    memory = f"about {amount(taken, 'bytes')} of memory" if taken else "memory cannot be foretold for this model"
    say(f"on {planned.device} in {planned.dtype}: {memory}, {free} are free")
