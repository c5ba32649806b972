"""An explanation as one HTML page that needs nothing else: no network, no fonts, no other file.

Everything that comes from a model or a prompt is escaped; the page's own policy forbids it to load anything. The
attention maps travel as bytes and are drawn by the page's script; all the rest is readable without it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.page import BlockRun, Explanation, Part, Rope, Run, StackRun, Step
from edgetune.explain.words import LABEL_STEPS, POOLED, STEPS, grouped, number, percent, visible

_MOST_MAP_BYTES = 4 << 20
"""Attention of every head is shown up to this many bytes, else the mean over heads."""


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
    titles = STEPS if explanation.runs[0].steps else LABEL_STEPS
    body = "".join(
        f"<h2><span>{index}</span>{title}</h2>{section(explanation)}"
        for index, (title, section) in enumerate(zip(titles, sections, strict=True), 1)
    )
    notes = "".join(f"<p class=dim>{escape(note)}</p>" for note in explanation.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(anatomy.name)}: a prompt\'s way'
        f" through the model</title><style>{_asset('page.css')}</style></head><body><main>"
        f"<h1>{escape(anatomy.name)}</h1><p class=dim>{escape(facts)}; {escape(runs)}</p>{notes}{body}</main>"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("edgetune.explain").joinpath(name).read_text(encoding="utf-8")


def _prompt(explanation: Explanation) -> str:
    shown = f"<pre>{escape(explanation.rendered)}</pre>"
    if explanation.rendered == explanation.prompt:
        return f"<p>The text, as it was given.</p>{shown}"
    return f"<p>The text inside the model's chat template: this is what it reads.</p>{shown}"


def _tokens(explanation: Explanation) -> str:
    parts = []
    for stack in explanation.runs[0].stacks:
        chips = "".join(
            f'<span class="t{" c" if token.control else ""}">{escape(visible(token.piece))}'
            f"<small>{token.id}</small></span>"
            for token in stack.tokens
        )
        what = f"The {stack.name} reads" if len(explanation.runs[0].stacks) > 1 else "The text becomes"
        parts.append(
            f"<p>{what} {len(stack.tokens)} tokens of {explanation.anatomy.vocabulary:,} known ones:</p>{chips}"
        )
    return "".join(parts)


def _embedding(explanation: Explanation) -> str:
    parts = []
    for stack, run in zip(explanation.anatomy.stacks, explanation.runs[0].stacks, strict=True):
        longest = max((token.norm for token in run.tokens), default=1.0) or 1.0
        rows = "".join(
            f"<tr><td class=m>{escape(visible(token.piece))}</td><td>{_bar(token.norm / longest)}</td>"
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
        heads = f"{stack.heads} heads of {stack.head_size}"
        heads += f", {stack.kv_heads} for keys and values" if stack.kv_heads != stack.heads else ""
        parts.append(
            f"<p>{stack.layers} blocks in the {stack.name}, {heads}; {inside:,} parameters. One block:</p>"
            f"{_parts(block, adapted)}{_rope(stack.rope)}{_work(explanation, runs)}"
        )
        parts += [_lens_grid(run, names) for run, names in zip(runs, _names(explanation), strict=True)]
        parts += [_maps(run, names, explanation) for run, names in zip(runs, _names(explanation), strict=True)]
    return "".join(parts)


def _names(explanation: Explanation) -> list[str]:
    return [run.name if len(explanation.runs) > 1 else "" for run in explanation.runs]


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


def _rope(rope: Rope | None) -> str:
    if rope is None:
        return ""
    chosen = sorted({0, len(rope.wavelengths) // 4, len(rope.wavelengths) // 2, len(rope.wavelengths) - 1})
    rows = "".join(
        f"<tr><td class=n>{pair}</td><td class=n>{grouped(rope.wavelengths[pair])}</td>"
        f"<td class=n>{rope.angles[pair]:.1f}°</td></tr>"
        for pair in chosen
    )
    scaling = f", scaling {escape(rope.scaling)}" if rope.scaling else ""
    return (
        f"<h3>Positions</h3><p>RoPE turns {rope.dimensions} numbers of every query and key in pairs, each pair at its "
        f"own speed (base {rope.base:,.0f}{scaling}): what attention then sees is the distance between two tokens.</p>"
        f"<table><tr><th>pair<th>one turn in … tokens<th>angle at the last token</tr>{rows}</table>"
    )


def _work(explanation: Explanation, runs: Sequence[StackRun]) -> str:
    longest = max((block.norm for run in runs for block in run.blocks), default=1.0) or 1.0
    compared = len(runs) > 1
    highest = max((block.lens.kl_from_base or 0.0 for block in runs[-1].blocks), default=0.0) or 1.0
    crosses = any(block.cross_share is not None for block in runs[0].blocks)
    rows = []
    for layer, block in enumerate(runs[0].blocks):
        cells = [f"<td class=n>{layer}</td>", f"<td>{_bar(block.norm / longest)} {number(block.norm)}</td>"]
        shares = [block.attention_share, *([block.cross_share] if crosses else []), block.mlp_share]
        cells += [f"<td class=n>{_share(value)}</td>" for value in shares]
        cells.append(f"<td>{_guesses(block)}</td>")
        if compared:
            other = runs[-1].blocks[layer]
            kl = other.lens.kl_from_base
            cells.append(f"<td>{_guesses(other)}</td>")
            cells.append(f"<td>{_bar((kl or 0) / highest, warm=True)} {number(kl)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    names = [escape(run.name) for run in explanation.runs]
    across = ["attention to the source adds"] if crosses else []
    titles = ["block", "length of the state", "attention adds", *across, "MLP adds", f"it would say now ({names[0]})"]
    titles += [f"({names[-1]})", "KL from the base"] if compared else []
    head = "".join(f"<th>{title}" for title in titles)
    return f"<h3>Block by block</h3><div class=s><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _guesses(block: BlockRun) -> str:
    return "".join(
        f'<span class=t style="background:rgba(var(--mark),{guess.probability:.2f})">{escape(visible(guess.piece))}'
        f"<small>{percent(guess.probability)}</small></span>"
        for guess in block.lens.guesses[:3]
    )


def _lens_grid(run: StackRun, name: str) -> str:
    if not any(block.lens.by_token for block in run.blocks):
        return ""
    count = max(len(block.lens.by_token) for block in run.blocks)
    tokens = run.tokens[-count:]
    head = "".join(f"<td><b>{escape(visible(token.piece))}</b></td>" for token in tokens)
    rows = "".join(
        f"<tr><td>{layer}</td>{''.join(f'<td>{escape(visible(piece))}</td>' for piece in block.lens.by_token)}</tr>"
        for layer, block in reversed(list(enumerate(run.blocks)))
        if block.lens.by_token
    )
    return (
        f"<details><summary>The best guess at every token after every block {escape(name)}</summary><div class=s>"
        f"<table class=g>{rows}<tr><td></td>{head}</tr></table></div></details>"
    )


def _maps(run: StackRun, name: str, explanation: Explanation) -> str:
    pieces = [visible(token.piece) for token in run.tokens]
    shown = _map(run.attention, pieces, pieces, f"Attention in the {run.name} {name}")
    if run.cross_attention is not None:
        source = [visible(token.piece) for token in explanation.runs[0].stacks[0].tokens]
        shown += _map(run.cross_attention, pieces, source, f"Attention to the source {name}")
    return shown


def _map(maps: NDArray[np.float32] | None, rows: list[str], columns: list[str], title: str) -> str:
    if maps is None:
        return ""
    heads = [f"head {head}" for head in range(maps.shape[1])]
    if maps.size > _MOST_MAP_BYTES:
        maps, heads = maps.mean(axis=1, keepdims=True), ["mean over heads"]
    data = base64.b64encode(np.round(maps * 255).astype(np.uint8).tobytes()).decode()
    values = {"bytes": data, "heads": maps.shape[1], "rows": len(rows), "columns": len(columns)}
    # "</script>" in a token would end the element that carries the values.
    told = json.dumps({**values, "from": rows, "to": columns}).replace("<", "\\u003c")
    layers = "".join(f"<option value={layer}>block {layer}" for layer in range(maps.shape[0]))
    options = "".join(f"<option value={index}>{label}" for index, label in enumerate(heads))
    return (
        f"<h3>{escape(title.strip())}</h3><div data-maps><script type=application/json>{told}</script>"
        f"<p><select aria-label=block>{layers}</select> <select aria-label=head>{options}</select> <output class=dim>"
        "A row is a token that looks, a column one that is looked at.</output></p><canvas></canvas></div>"
    )


def _head(explanation: Explanation) -> str:
    stack = explanation.anatomy.stacks[-1]
    run = explanation.runs[0]
    if run.scores or not run.steps:
        pooled = f"<p>{POOLED[run.pooling]}: {stack.hidden_size:,} numbers.</p>" if run.pooling else ""
        return pooled + _parts(stack.head)
    tied = " It is the embedding table again." if explanation.anatomy.tied else ""
    return (
        f"<p>The last token's {stack.hidden_size:,} numbers become one score for each of "
        f"{explanation.anatomy.vocabulary:,} tokens.{tied}</p>{_parts(stack.head)}"
    )


def _choice(explanation: Explanation) -> str:
    return f"<div class=two>{''.join(_run(run, explanation) for run in explanation.runs)}</div>"


def _run(run: Run, explanation: Explanation) -> str:
    title = f"<h3>{escape(run.name)}</h3>" if len(explanation.runs) > 1 else ""
    if run.scores:
        rows = "".join(
            f"<tr><td>{escape(label)}</td><td>{_bar(value)}</td><td class=n>{number(value)}</td>"
            f"<td class=n>{number(run.logits.get(label))}</td></tr>"
            for label, value in run.scores.items()
        )
        head = "<tr><th>label<th><th>answer<th>from</tr>" if run.logits else ""
        return f"<div>{title}<table>{head}{rows}</table>{_effects(run)}</div>"
    if run.vector:
        shown = ", ".join(number(value) for value in run.vector[:6])
        return f"<div>{title}<p>A vector of {len(run.vector):,} numbers: {shown}, …</p></div>"
    if not run.steps:
        return f"<div>{title}<p class=dim>This model has no next token to choose.</p></div>"
    filters = "".join(
        f"<tr><td>{escape(one.name)}</td><td class=n>{one.setting:g}</td><td class=n>{one.kept:,}</td>"
        f"<td class=n>{percent(one.mass)}</td></tr>"
        for one in run.filters
    )
    return (
        f"<div>{title}{_options(run.steps[0])}<table><tr><th>setting<th>value<th>tokens left<th>of the probability</tr>"
        f"{filters}</table><p>Chosen: <span class=t>{escape(visible(run.steps[0].piece))}</span></p>{_loop(run)}</div>"
    )


def _effects(run: Run) -> str:
    """By how much each token raises the answer, where that was tried."""
    chips = "".join(
        f"<span class=t>{escape(visible(token.piece))}<small>{effect:+.2g}</small></span>"
        for token, effect in zip(run.stacks[0].tokens, run.effects, strict=bool(run.effects))
        if not token.control
    )
    return f"<p>What each token adds to it: the text was read once without each.</p>{chips}" if chips else ""


def _options(step: Step) -> str:
    rows = "".join(
        f"<tr{'' if option.sampled else ' class=cut'}><td class=m>{escape(visible(option.piece))}</td>"
        f"<td>{_bar(option.probability)}</td><td class=n>{percent(option.probability)}</td>"
        f"<td>{_bar(option.sampled, warm=True)}</td><td class=n>{percent(option.sampled)}</td></tr>"
        for option in step.options
    )
    return f"<table><tr><th>token<th colspan=2>by the model<th colspan=2>after the settings</tr>{rows}</table>"


def _loop(run: Run) -> str:
    chips = "".join(
        f'<span class="t{" c" if step.ends else ""}" style="background:rgba(var(--mark),{step.probability:.2f})">'
        f"{escape(visible(step.piece))}<small>{percent(step.probability)}</small></span>"
        for step in run.steps
    )
    return f"<p>It is added to the text, and the loop goes round again:</p>{chips}"


def _bar(share: float, *, warm: bool = False) -> str:
    return f'<span class="b{" w" if warm else ""}" style="width:{8 * max(0.0, min(share, 1.0)):.2f}rem"></span>'


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)
