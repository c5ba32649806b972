"""`edgetune bench`: a model's speed on this machine, as a table or JSON. Parses, opens and renders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.model_options import model_options, open_chosen
from edgetune.cli.progress import amount, show_progress
from edgetune.errors import UsageError
from edgetune.hardware import physical_cores

if TYPE_CHECKING:
    from edgetune.bench import Replies, Speed
    from edgetune.chat import Session

_TIMES = ("first_token_cold", "first_token_warm", "adapter_switch", "adapter_switch_back")


@click.command("bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option(
    "-p",
    "--n-prompt",
    "prompt",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Prompt tokens evaluated in one test.",
)
@click.option(
    "-n",
    "--n-gen",
    "generated",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Tokens generated in one test.",
)
@click.option(
    "-d",
    "--n-depth",
    "depths",
    default="0,512,2048",
    show_default=True,
    metavar="N,N,…",
    help="Tokens in the context before a test begins.",
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="How often each test is run."
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one a test.")
@model_options
def command(
    model: str | None, prompt: int, generated: int, depths: str, repetitions: int, as_json: bool, **options: Any
) -> None:
    """Measure MODEL, with its adapters, on the path chat uses: pp is evaluating a prompt, tg is generating.

    Behind a history of each depth, besides: the time to the first token of a reply when nothing of it is known (cold)
    and when the history is (warm), and, with --lora, from changing an adapter's scale to the next token, there and
    back. --draft adds what guessing ahead gains. Speeds and times are medians.

    \b
    edgetune bench pocket
    edgetune bench model-Q4_K_M.gguf --lora runs/mine -d 0,4096 --json
    """
    from edgetune.bench import BenchPlan, measure, measure_replies, peak_memory

    plan = BenchPlan(prompt=prompt, generated=generated, depths=_numbers(depths), repetitions=repetitions)
    plan.check()
    draft = options["draft"]
    with open_chosen(model, {**options, "draft": ""}) as session, show_progress() as sink:
        speeds = list(measure(session.engine, plan, sink=sink))
        facts = _facts(session, threads=options["threads"])
        plain = measure_replies(session.engine, tokens=max(generated, 2), repetitions=repetitions) if draft else {}
    facts["peak_bytes"] = peak_memory()
    drafted: dict[str, Replies] = {}
    if draft:
        with open_chosen(model, options) as session:
            drafted = measure_replies(session.engine, tokens=max(generated, 2), repetitions=repetitions)
    gains = [_gain(name, plain[name], drafted[name], draft) for name in plain]
    if as_json:
        rows = [{**speed.record(), "draft": ""} for speed in speeds] + gains
        click.echo(json.dumps([{**row, **facts} for row in rows], indent=2, ensure_ascii=False))
    else:
        _print(speeds, gains, facts)


def _numbers(value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.replace(" ", ",").split(",") if part)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise UsageError(f"-d is {value!r}, expected numbers of tokens.", hint="For example: -d 0,512,2048")
    return numbers


def _facts(session: Session, *, threads: int) -> dict[str, Any]:
    """What stands in every row of the JSON."""
    engine = session.engine
    return {
        "model": str(engine.path),
        "adapters": [{"path": str(spec.path), "scale": spec.scale} for spec in engine.adapters],
        "context": engine.context_size,
        "threads": threads or physical_cores(),
        "on_gpu": engine.is_on_gpu,
        "weights_bytes": engine.memory.weights,
        "kv_bytes": engine.memory.context,
        "kv_bytes_per_token": engine.memory.per_token,
    }


def _gain(name: str, plain: Replies, drafted: Replies, draft: str) -> dict[str, Any]:
    """A row about guessing ahead in a reply that is quoting, or free."""
    return {
        "test": f"tg{len(drafted.ids)}",
        "depth": 0,
        "tokens": len(drafted.ids),
        "tokens_per_second": drafted.tokens_per_second,
        "samples": list(drafted.samples),
        "draft": draft,
        "reply": name,
        "plain_tokens_per_second": plain.tokens_per_second,
        "gain": drafted.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 1.0,
        "guessed": drafted.drafted.proposed,
        "guessed_right": drafted.drafted.accepted,
        "same_tokens": drafted.ids == plain.ids,
    }


def _print(speeds: list[Speed], gains: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    times = [name for name in _TIMES if any(name in speed.seconds for speed in speeds)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("test")
    for title in ("depth", "tokens/s", "±", *(name.replace("_", " ") for name in times)):
        table.add_column(title, justify="right")
    for speed in speeds:
        record = speed.record()
        cells = [_duration(record.get(f"{name}_seconds")) for name in times]
        spread = f"{record['stddev']:.1f}"
        table.add_row(speed.test, f"{speed.depth:,}", f"{speed.tokens_per_second:,.1f}", spread, *cells)
    console = Console()
    console.print(table)
    weights, cache = amount(facts["weights_bytes"], "bytes"), amount(facts["kv_bytes"], "bytes")
    per_token, peak = amount(facts["kv_bytes_per_token"], "bytes"), amount(facts["peak_bytes"], "bytes")
    console.print(
        f"memory: weights {weights}, context of {facts['context']:,} tokens {cache} ({per_token} a token); "
        f"the process had {peak} at most",
        highlight=False,
    )
    for row in gains:
        console.print(
            f"--draft {row['draft']}, {row['reply']} reply: {row['tokens_per_second']:.1f} tokens/s against "
            f"{row['plain_tokens_per_second']:.1f}, {row['gain']:.2f} ×; {row['guessed_right']} of {row['guessed']} "
            "guesses right" + ("" if row["same_tokens"] else "; the replies differ"),
            markup=False,
            highlight=False,
        )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
