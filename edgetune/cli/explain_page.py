"""An explanation on the terminal: the six steps, as wide as the screen is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgetune.explain.page import BlockRun, Explanation, Part, Run, Stack, StackRun, Step
from edgetune.explain.words import (
    ADDED_BEFORE_NORM,
    counted,
    grouped,
    head_text,
    lengths,
    number,
    percent,
    readable,
    titles,
    visible,
    with_whole,
)

_BAR = 12
_NAME = 18
"""Letters of an adapter's name above a column."""
_MOST_BLOCKS = 48
"""Blocks that are listed; of a deeper stack, every second or third."""


def print_page(explanation: Explanation) -> None:
    """Show `explanation` on stdout."""
    console = Console(highlight=False)
    anatomy = explanation.anatomy
    console.print(Text(anatomy.name, style="bold"), markup=False)
    console.print(
        f"{anatomy.architecture}, {anatomy.parameters:,} parameters, stored as {anatomy.file_type}, "
        f"computed by {explanation.engine}",
        markup=False,
        style="dim",
    )
    for note in explanation.notes:
        console.print(note, markup=False, style="yellow")
    steps = (_prompt, _tokens, _embedding, _blocks, _head, _choice)
    for index, (title, show) in enumerate(zip(titles(explanation), steps, strict=True), 1):
        console.print()
        console.print(Text.assemble((f"{index} ", "bold cyan"), (title, "bold")))
        show(console, explanation)


def _prompt(console: Console, explanation: Explanation) -> None:
    console.print(Text(readable(explanation.rendered)))


def _tokens(console: Console, explanation: Explanation) -> None:
    for stack in explanation.runs[0].stacks:
        line = Text()
        for token in stack.tokens:
            line.append(
                f" {with_whole(token.piece, token.completes)} ", style="reverse dim" if token.control else "reverse"
            )
            line.append(f" {token.id}  ", style="dim")
        if len(explanation.runs[0].stacks) > 1:
            console.print(f"the {stack.name} reads:", style="dim")
        console.print(line)


def _embedding(console: Console, explanation: Explanation) -> None:
    for stack, run in zip(explanation.anatomy.stacks, explanation.runs[0].stacks, strict=True):
        norms = [token.norm for token in run.tokens]
        console.print(
            f"Each token of the {stack.name} becomes {stack.hidden_size:,} numbers: "
            f"({len(run.tokens)}, {stack.hidden_size}); {lengths(norms)}."
        )
        _print_parts(console, stack.embedding)


def _blocks(console: Console, explanation: Explanation) -> None:
    for index, stack in enumerate(explanation.anatomy.stacks):
        _one_block(console, stack)
        write = readable if explanation.runs[0].scores else visible
        _work(console, [run.name for run in explanation.runs], [run.stacks[index] for run in explanation.runs], write)


def _one_block(console: Console, stack: Stack) -> None:
    heads = f"{counted(stack.heads, 'head')} of {stack.head_size}"
    if stack.kv_heads != stack.heads:
        heads += f" ({stack.kv_heads} for keys and values)"
    inside = sum(part.parameters for block in stack.blocks for part in block)
    console.print(f"{counted(stack.layers, 'block')} in the {stack.name}, {heads}, {inside:,} parameters. One of them:")
    adapted = {part.name: part.adapted for block in stack.blocks for part in block if part.adapted}
    _print_parts(console, stack.blocks[0] if stack.blocks else (), adapted)
    if stack.rope is not None:
        waves = stack.rope.wavelengths
        console.print(
            f"RoPE turns {stack.rope.dimensions} numbers of each query and key in pairs by their position: the fastest "
            f"pair goes round in {grouped(waves[0])} tokens, the slowest in {grouped(waves[-1])}; at the last token "
            f"they stand at {stack.rope.angles[0]:.0f}° and {stack.rope.angles[-1]:.2g}°."
        )
        if stack.rope.scaling:
            console.print(f"Their speeds are scaled: {stack.rope.scaling}.")
    else:
        console.print(f"Positions are {stack.positions}.")
    if stack.window:
        turn = stack.rope.window_base if stack.rope is not None else 0
        base = f", and turn positions by base {turn:,.0f}" if turn else ""
        console.print(f"Blocks with a sliding window look at {stack.window:,} tokens{base}.")


def _print_parts(console: Console, parts: Iterable[Part], adapted: dict[str, tuple[int, ...]] | None = None) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for part in parts:
        ranks = (adapted or {}).get(part.name, part.adapted)
        shape = " × ".join(f"{size:,}" for size in part.shape)
        mark = f"+ rank {', '.join(map(str, ranks))}" if ranks else ""
        table.add_row(f"  {part.role}", Text(shape), Text(part.type, style="dim"), Text(mark, style="magenta"))
    if table.row_count:
        console.print(table)


def _work(console: Console, names: Sequence[str], runs: Sequence[StackRun], write: Callable[[str], str]) -> None:
    compared = len(runs) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if compared else (0, 1), header_style="dim")
    table.add_column("block", justify="right", min_width=5)
    table.add_column("state", justify="right", min_width=6)
    parts = any(block.attention_share is not None for block in runs[0].blocks)
    crosses = any(block.cross_share is not None for block in runs[0].blocks)
    if parts:
        # In two lines, so that the guesses have room.
        for what in ("attention", *(["source"] if crosses else []), "MLP"):
            table.add_column(f"{what}\nadds", justify="right", min_width=max(7, len(what)))
    told = any(block.lens.guesses for block in runs[0].blocks)
    taken = sum((column.min_width or 0) + 1 for column in table.columns)
    if told and not compared:
        table.add_column("it would say now", no_wrap=True)
    elif told:
        for name in (names[0], _shortened(names[-1])):
            table.add_column(f"{name}\nwould say", no_wrap=True, max_width=max(12, (console.width - taken - 9) // 2))
        table.add_column("KL", justify="right", min_width=7)
    step = -(-len(runs[0].blocks) // _MOST_BLOCKS)
    for layer, block in enumerate(runs[0].blocks):
        if layer % step and layer != len(runs[0].blocks) - 1:
            continue
        cells: list[Text | str] = [str(layer), number(block.norm)]
        if parts:
            cells += [_share(block.attention_share), *([_share(block.cross_share)] if crosses else [])]
            cells.append(_share(block.mlp_share))
        if told:
            cells.append(_guess(block, write))
        if compared and told:
            other = runs[-1].blocks[layer]
            differs = _best(other) != _best(block)
            guess = _guess(other, write)
            guess.stylize("bold magenta" if differs else "")
            cells += [guess, number(other.lens.kl_from_base)]
        table.add_row(*cells)
    console.print(table)
    if parts and runs[0].blocks[0].is_normed:
        console.print(ADDED_BEFORE_NORM, style="dim")


def _best(block: BlockRun) -> int | None:
    return block.lens.guesses[0].id if block.lens.guesses else None


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _guess(block: BlockRun, write: Callable[[str], str]) -> Text:
    text = Text()
    for index, guess in enumerate(block.lens.guesses[:2]):
        text.append(f"{write(guess.piece)} ", style="" if index == 0 else "dim")
        text.append(f"{percent(guess.probability)}  ", style="dim")
    return text


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _head(console: Console, explanation: Explanation) -> None:
    if text := head_text(explanation):
        console.print(text)
    _print_parts(console, explanation.anatomy.stacks[-1].head)


def _choice(console: Console, explanation: Explanation) -> None:
    for run in explanation.runs:
        if len(explanation.runs) > 1:
            console.print(Text(run.name, style="bold"))
        if run.scores:
            _print_scores(console, run)
            _print_effects(console, run)
        elif run.vector:
            shown = ", ".join(number(value) for value in run.vector[:6])
            console.print(f"A vector of {len(run.vector):,} numbers: {shown}, …")
        elif run.steps:
            _print_choice(console, run, explanation)
        elif run.gap >= 0 and run.stacks[0].blocks:
            piece = visible(run.stacks[0].tokens[run.gap].piece)
            filled = _guess(run.stacks[0].blocks[-1], visible)
            console.print(Text(f"In the place of {piece} (token {run.gap}) it would put: ").append_text(filled))
        else:
            console.print("This model has no next token to choose.", style="dim")


def _print_scores(console: Console, run: Run) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for label, value in run.scores.items():
        logit = run.logits.get(label)
        told = "" if logit is None or logit == value else f"from {logit:.3g}"
        table.add_row(Text(label), _bar(value), number(value), Text(told, style="dim"))
    console.print(table)


def _print_effects(console: Console, run: Run) -> None:
    """By how much each token raises the answer, where that was tried."""
    if not run.effects:
        return
    line = Text("each token's doing: ", style="dim")
    for token, effect in zip(run.stacks[0].tokens, run.effects, strict=True):
        if not token.control:
            line.append(f"{visible(token.piece)} ", style="bold" if effect > 0 else "")
            line.append(f"{effect:+.2g}  ", style="dim")
    console.print(line)


def _print_choice(console: Console, run: Run, explanation: Explanation) -> None:
    _print_options(console, run.steps[0])
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("setting", "value", "tokens left", "of the probability"):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for one in run.filters:
        table.add_row(one.name, f"{one.setting:g}", f"{one.kept:,}", percent(one.mass))
    console.print(table)
    line = Text("chosen, and the loop goes round: ", style="dim")
    for step in run.steps:
        line.append(with_whole(step.piece, step.completes), style="reverse dim" if step.ends else "reverse")
        line.append(f" {percent(step.probability)}  ", style="dim")
    console.print(line)


def _print_options(console: Console, step: Step) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("token", "", "by the model", "", "after the settings"):
        table.add_column(title, justify="right" if title.startswith(("by", "after")) else "left")
    for option in step.options:
        style = "" if option.sampled else "dim"
        chosen = "bold" if option.id == step.id else style
        table.add_row(
            Text(visible(option.piece), style=chosen),
            _bar(option.probability),
            percent(option.probability),
            _bar(option.sampled, style="magenta"),
            percent(option.sampled),
            style=style,
        )
    console.print(table)


def _bar(share: float, *, style: str = "cyan") -> Text:
    eighths = round(max(0.0, min(share, 1.0)) * _BAR * 8)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style=style)
