"""An explanation as one HTML page that needs nothing else: no network, no fonts, no other file.

Everything that comes from a model or a prompt is escaped; the page's own policy forbids it to load anything. What the
page's script draws is in `widgets`; all the rest is readable without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from math import prod

from edgetune.explain.page import BlockRun, Explanation, Part, Run, Stack, StackRun, Step, Token
from edgetune.explain.spelling import segments
from edgetune.explain.widgets import attention_maps, bar, rope_dials, sampler
from edgetune.explain.words import (
    ADDED_BEFORE_NORM,
    counted,
    head_text,
    number,
    percent,
    readable,
    titles,
    visible,
)


def page(explanation: Explanation) -> str:
    """The whole page."""
    anatomy = explanation.anatomy
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    runs = " and ".join(run.name for run in explanation.runs)
    facts = ", ".join(
        (
            anatomy.architecture,
            f"{anatomy.parameters:,} parameters",
            f"stored as {anatomy.file_type}",
            f"computed by {explanation.engine}",
        )
    )
    sections = (_prompt, _tokens, _embedding, _blocks, _head, _choice)
    body = "".join(
        f"<h2 id=step{index}><span>{index}</span>{title}</h2>{section(explanation)}"
        for index, (title, section) in enumerate(zip(titles(explanation), sections, strict=True), 1)
    )
    steps = "".join(
        f"<a href=#step{index}><b>{index}</b>{title}</a>" for index, title in enumerate(titles(explanation), 1)
    )
    notes = "".join(f"<p class=dim>{escape(note)}</p>" for note in explanation.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(anatomy.name)}: a prompt\'s way'
        f" through the model</title><style>{_asset('page.css')}</style></head><body><main>"
        f"<h1>{escape(anatomy.name)}</h1><p class=dim>{escape(facts)}; {escape(runs)}</p>{notes}<nav>{steps}</nav>"
        f"{body}</main><script>{_asset('sampling.js')}{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("edgetune.explain").joinpath(name).read_text(encoding="utf-8")


def _prompt(explanation: Explanation) -> str:
    shown = f"<pre dir=auto>{escape(readable(explanation.rendered))}</pre>"
    if explanation.rendered == explanation.prompt:
        return f"<p>The text, as it was given.</p>{shown}"
    return f"<p>The text inside the model's chat template: this is what it reads.</p>{shown}"


def _tokens(explanation: Explanation) -> str:
    parts = []
    for stack in explanation.runs[0].stacks:
        chips = "".join(
            f'<span class="t{" c" if token.control else ""}">{_told(token)}<small>{token.id}</small></span>'
            for token in stack.tokens
        )
        what = f"The {stack.name} reads" if len(explanation.runs[0].stacks) > 1 else "The text becomes"
        count, known = counted(len(stack.tokens), "token"), explanation.anatomy.vocabulary
        parts.append(f"<p>{what} {count} of {known:,} known ones:</p>{chips}")
    return "".join(parts)


def _embedding(explanation: Explanation) -> str:
    parts = []
    for stack, run in zip(explanation.anatomy.stacks, explanation.runs[0].stacks, strict=True):
        longest = max((token.norm for token in run.tokens), default=1.0) or 1.0
        rows = "".join(
            f"<tr><td class=m>{_told(token)}</td><td>{bar(token.norm / longest)}</td>"
            f"<td class=n>{number(token.norm)}</td></tr>"
            for token in run.tokens
        )
        parts.append(
            f"<p>Each token of the {stack.name} becomes {stack.hidden_size:,} numbers: "
            f"({len(run.tokens)}, {stack.hidden_size}). The lengths of these vectors:</p>"
            f"{_parts(stack.embedding)}<details><summary>lengths</summary><table>{rows}</table></details>"
        )
    return "".join(parts)


def _blocks(explanation: Explanation) -> str:
    parts = []
    for index, stack in enumerate(explanation.anatomy.stacks):
        runs = [run.stacks[index] for run in explanation.runs]
        block = stack.blocks[0] if stack.blocks else ()
        adapted = {part.name: part.adapted for one in stack.blocks for part in one if part.adapted}
        inside = sum(part.parameters for one in stack.blocks for part in one)
        heads = f"{counted(stack.heads, 'head')} of {stack.head_size}"
        heads += f", {stack.kv_heads} for keys and values" if stack.kv_heads != stack.heads else ""
        parts.append(
            f"<p>{counted(stack.layers, 'block')} in the {stack.name}, {heads}; {inside:,} parameters. One block:</p>"
            f"{_parts(block, adapted)}{_positions(stack, len(runs[0].tokens))}{_work(explanation, runs)}"
        )
        fills = explanation.runs[0].gap >= 0
        parts += [_lens_grid(run, names, fills=fills) for run, names in zip(runs, _names(explanation), strict=True)]
        parts += [attention_maps(run, names, explanation) for run, names in zip(runs, _names(explanation), strict=True)]
    return "".join(parts)


def _names(explanation: Explanation) -> list[str]:
    """What tells the parts of each run apart, where there are two."""
    return [f", {run.name}" if len(explanation.runs) > 1 else "" for run in explanation.runs]


def _parts(parts: Iterable[Part], adapted: dict[str, tuple[int, ...]] | None = None) -> str:
    rows = []
    for part in parts:
        ranks = (adapted or {}).get(part.name, part.adapted)
        mark = f"adapter of rank {', '.join(map(str, ranks))}" if ranks else ""
        shape = " × ".join(f"{size:,}" for size in part.shape)
        rows.append(
            f"<tr><td>{escape(part.role)}</td><td class=m>{escape(part.name)}</td><td class=n>{shape}</td>"
            f"<td class=n>{prod(part.shape):,}</td><td>{escape(part.type)}</td><td>{mark}</td></tr>"
        )
    head = "<tr><th>what it does<th>name<th>shape<th>parameters<th>type<th></tr>"
    return f"<div class=s><table>{head}{''.join(rows)}</table></div>" if rows else ""


def _positions(stack: Stack, tokens: int) -> str:
    window = f"<p>Blocks with a sliding window look at {stack.window:,} tokens.</p>" if stack.window else ""
    if stack.rope is None:
        return f"<h3>Positions</h3><p>Positions are {stack.positions}.</p>{window}"
    rope = stack.rope
    scaling = f", scaling {escape(rope.scaling)}" if rope.scaling else ""
    local = f"; in blocks with a window base {rope.window_base:,.0f}" if rope.window_base else ""
    return (
        f"<h3>Positions</h3><p>RoPE turns {rope.dimensions} numbers of every query and key in pairs, each pair at its "
        f"own speed (base {rope.base:,.0f}{scaling}{local}): what attention then sees is the distance between two "
        f"tokens.</p>{rope_dials(rope, max(tokens - 1, 0))}{window}"
    )


def _work(explanation: Explanation, runs: Sequence[StackRun]) -> str:
    longest = max((block.norm for run in runs for block in run.blocks), default=1.0) or 1.0
    highest = max((block.lens.kl_from_base or 0.0 for block in runs[-1].blocks), default=0.0) or 1.0
    parts = [
        (title, field)
        for title, field in (
            ("attention adds", "attention_share"),
            ("attention to the source adds", "cross_share"),
            ("MLP adds", "mlp_share"),
        )
        if any(getattr(block, field) is not None for block in runs[0].blocks)
    ]
    speaks = any(block.lens.guesses for block in runs[0].blocks)
    write = _label if explanation.runs[0].scores else _piece
    compared = len(runs) > 1 and speaks
    rows = []
    for layer, block in enumerate(runs[0].blocks):
        cells = [f"<td class=n>{layer}</td>", f"<td>{bar(block.norm / longest)} {number(block.norm)}</td>"]
        cells += [f"<td class=n>{_change([run.blocks[layer] for run in runs], field)}</td>" for _, field in parts]
        cells += [f"<td>{_guesses(block, write)}</td>"] if speaks else []
        turns = ""
        if compared:
            other = runs[-1].blocks[layer]
            kl = other.lens.kl_from_base
            turns = " class=turns" if _best(block) != _best(other) else ""
            cells.append(
                f"<td>{_guesses(other, write)}</td><td>{bar((kl or 0) / highest, warm=True)} {number(kl)}</td>"
            )
        rows.append(f"<tr{turns}>{''.join(cells)}</tr>")
    names = [escape(run.name) for run in explanation.runs]
    columns = ["block", "length of the state", *(title for title, _ in parts)]
    columns += [f"it would say now ({names[0]})"] if speaks else []
    columns += [f"({names[-1]})", "KL from the base"] if compared else []
    head = "".join(f"<th>{title}" for title in columns)
    note = f"<p class=dim>{ADDED_BEFORE_NORM}</p>" if runs[0].blocks and runs[0].blocks[0].is_normed else ""
    return f"<h3>Block by block</h3>{note}<div class=s><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _best(block: BlockRun) -> int | None:
    return block.lens.guesses[0].id if block.lens.guesses else None


def _guesses(block: BlockRun, write: Callable[[str], str]) -> str:
    return "".join(
        f"<span class=t{_shade(guess.probability)}>{write(guess.piece)}"
        f"<small>{percent(guess.probability)}</small></span>"
        for guess in block.lens.guesses[:3]
    )


def _shade(share: float) -> str:
    """The background of what has a share of one, light enough to read what stands on it."""
    return f' style="background:rgba(var(--mark),{0.5 * max(0.0, min(share, 1.0)):.2f})"'


def _piece(piece: str) -> str:
    """A token's text, which may run from right to left, without a say in what is beside it."""
    parts = (f"<i>⟨{part}⟩</i>" if is_bytes else escape(visible(part)) for part, is_bytes in segments(piece))
    return f"<bdi>{''.join(parts)}</bdi>"


def _label(name: str) -> str:
    return f"<bdi>{escape(readable(name))}</bdi>"


def _told(token: Token | Step) -> str:
    """A token's text, and the character that it ends."""
    whole = f" → <bdi>{escape(visible(token.completes))}</bdi>" if token.completes else ""
    return _piece(token.piece) + whole


def _lens_grid(run: StackRun, name: str, *, fills: bool) -> str:
    if not any(block.lens.by_token for block in run.blocks):
        return ""
    count = max(len(block.lens.by_token) for block in run.blocks)
    head = "".join(f"<th>{_piece(token.piece)}</th>" for token in run.tokens[-count:])
    rows = "".join(
        f"<tr><th>{layer}</th>{_lens_row(block)}</tr>"
        for layer, block in reversed(list(enumerate(run.blocks)))
        if block.lens.by_token
    )
    which = f" of the last {count} tokens" if count < len(run.tokens) else ""
    what, guess = ("follow each token", "what comes next") if not fills else ("stand for each token", "its place")
    return (
        f"<h3>What would {what}, after every block{escape(name)}</h3><p class=dim>The lowest row is the "
        f"text{which}; above it the best guess for {guess}, the last block on top, the darker the surer.</p>"
        f"<div class=s><table class=g>{rows}<tr><th></th>{head}</tr></table></div>"
    )


def _lens_row(block: BlockRun) -> str:
    shares = block.lens.by_token_shares or (0.0,) * len(block.lens.by_token)
    return "".join(
        f'<td title="{escape(visible(piece))} {percent(share)}"{_shade(share)}>{_piece(piece)}</td>'
        for piece, share in zip(block.lens.by_token, shares, strict=True)
    )


def _head(explanation: Explanation) -> str:
    text = head_text(explanation)
    return (f"<p>{text}</p>" if text else "") + _parts(explanation.anatomy.stacks[-1].head)


def _choice(explanation: Explanation) -> str:
    return f"<div class=two>{''.join(_run(run, explanation) for run in explanation.runs)}</div>"


def _run(run: Run, explanation: Explanation) -> str:
    title = f"<h3>{escape(run.name)}</h3>" if len(explanation.runs) > 1 else ""
    if run.scores:
        rows = "".join(
            f"<tr><td>{escape(label)}</td><td>{bar(value)}</td><td class=n>{number(value)}</td>"
            f"<td class=n>{number(run.logits.get(label))}</td></tr>"
            for label, value in run.scores.items()
        )
        head = "<tr><th>label<th><th>answer<th>from</tr>" if run.logits else ""
        return f"<div>{title}<table>{head}{rows}</table>{_effects(run)}</div>"
    if run.vector:
        shown = ", ".join(number(value) for value in run.vector[:6])
        return f"<div>{title}<p>A vector of {len(run.vector):,} numbers: {shown}, …</p></div>"
    if not run.steps:
        return f"<div>{title}{_filled(run)}</div>"
    filters = "".join(
        f"<tr><td>{escape(one.name)}</td><td class=n>{one.setting:g}</td><td class=n>{one.kept:,}</td>"
        f"<td class=n>{percent(one.mass)}</td></tr>"
        for one in run.filters
    )
    return (
        f"<div>{title}<table><tr><th>setting<th>value<th>tokens left<th>of the probability</tr>{filters}</table>"
        f"{sampler(run, explanation.sampling)}<p>Chosen: <span class=t>{_piece(run.steps[0].piece)}</span></p>"
        f"{_loop(run)}</div>"
    )


def _filled(run: Run) -> str:
    """What a model that fills gaps puts into one."""
    if run.gap < 0 or not run.stacks[0].blocks:
        return "<p class=dim>This model has no next token to choose.</p>"
    token = run.stacks[0].tokens[run.gap]
    guesses = _guesses(run.stacks[0].blocks[-1], _piece)
    return f"<p>In the place of {_piece(token.piece)} (token {run.gap}) it would put:</p>{guesses}"


def _effects(run: Run) -> str:
    """By how much each token raises the answer, where that was tried."""
    chips = "".join(
        f"<span class=t>{_piece(token.piece)}<small>{effect:+.2g}</small></span>"
        for token, effect in zip(run.stacks[0].tokens, run.effects, strict=bool(run.effects))
        if not token.control
    )
    return f"<p>What each token adds to it: the text was read once without each.</p>{chips}" if chips else ""


def _loop(run: Run) -> str:
    chips = "".join(
        f'<span class="t{" c" if step.ends else ""}"{_shade(step.probability)}>'
        f"{_told(step)}<small>{percent(step.probability)}</small></span>"
        for step in run.steps
    )
    return f"<p>It is added to the text, and the loop goes round again:</p>{chips}"


def _change(blocks: Sequence[BlockRun], field: str) -> str:
    """A share of the base's block, and what the adapters make of it."""
    values = [percent(value) for block in blocks if (value := getattr(block, field)) is not None]
    return " → ".join(dict.fromkeys(values))
