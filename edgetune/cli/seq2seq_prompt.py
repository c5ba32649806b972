"""The flags that say what an encoder-decoder does with a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from edgetune.opening.prompting import TASKS, Prompting


def prompting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --task, --src-lang, --tgt-lang and --context; `take_prompting` consumes them."""
    for decorate in reversed(
        (
            click.option(
                "--task", type=click.Choice(TASKS),
                help="Put the words before the text that the model's family learned for this task (T5).",
            ),
            click.option("--src-lang", default="", metavar="CODE", help="Language of the text, e.g. de or de_DE."),
            click.option("--tgt-lang", default="", metavar="CODE", help="Language to answer in, e.g. en or en_XX."),
            click.option("--context", default="", metavar="TEXT", help="With --task qa: what the question is about."),
        )
    ):  # fmt: skip
        function = decorate(function)
    return function


def take_prompting(options: dict[str, Any]) -> Prompting:
    """Remove what `prompting_options` added from `options`."""
    return Prompting(options.pop("task"), options.pop("src_lang"), options.pop("tgt_lang"), options.pop("context"))
