"""The parts of an explanation's page that its script brings to life: attention, positions, and the choice of a token.

Each carries its values as JSON in an element of its own, escaped so that nothing in a token can end that element. What
a page says without a script is in `html`.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.page import Explanation, Rope, Run, StackRun
from edgetune.explain.words import number, percent, visible, with_whole

_MOST_PACKED = 1 << 21
"""Bytes that all attention of a page may take, packed."""
_LEVELS = (255, 127, 63, 31, 15)
"""Shades that a share may be told in: as many as there is room for."""
_SAMPLED = 40
"""Maps that are packed to see how much room all of them would take."""

_LEFT = "\u200e"
"""Unicode's mark for text from left to right."""

Maps = NDArray[np.float16]


def attention_maps(stack: StackRun, run_name: str, explanation: Explanation) -> str:
    """Who looks at whom in `stack`, and at the source where there is one."""
    all_maps = [maps for run in explanation.runs for one in run.stacks for maps in (one.attention, one.cross_attention)]
    room = _MOST_PACKED / max(1, sum(maps.size for maps in all_maps if maps is not None))
    pieces = _pieces(stack)
    shown = _map(stack.attention, pieces, pieces, f"Attention in the {stack.name}{run_name}", room=room)
    if stack.cross_attention is not None:
        source = _pieces(explanation.runs[0].stacks[0])
        shown += _map(stack.cross_attention, pieces, source, f"Attention to the source{run_name}", room=room)
    return shown


def _pieces(stack: StackRun) -> list[str]:
    """The tokens' texts; where a byte ends a character, bytes and arrow stay on its left, whichever way it is read."""
    return [_LEFT * bool(token.completes) + with_whole(token.piece, token.completes) for token in stack.tokens]


def _map(maps: Maps | None, rows: list[str], columns: list[str], title: str, *, room: float) -> str:
    """`maps` (blocks, heads, rows, columns), in so many bytes a number as there is `room` for."""
    if maps is None:
        return ""
    same = rows is columns
    is_causal = same and not np.triu(maps[0], 1).any() and not np.triu(maps[-1], 1).any()
    count, levels = maps.shape[1], _levels(maps, room, is_causal=is_causal)
    heads = [f"head {head}" for head in range(count)] if levels and count > 1 else ["mean over heads"]
    told = _values(
        {
            "mean": _packed(maps.mean(1, dtype=np.float32, keepdims=True), 255, is_causal=is_causal),
            "each": _packed(maps, levels, is_causal=is_causal) if len(heads) > 1 else None,
            "levels": levels,
            "causal": is_causal,
            "layers": maps.shape[0],
            "heads": len(heads),
            "rows": len(rows),
            "columns": len(columns),
            "from": rows,
            "to": columns,
        }
    )
    layers = "".join(f"<option value={layer}>block {layer}" for layer in range(maps.shape[0]))
    options = "".join(f"<option value={index}>{label}" for index, label in enumerate(heads))
    all_heads = "<option value=-1>mean over heads" if len(heads) > 1 else ""
    coarse = f" Single heads are told in {levels} steps." if levels < 255 and len(heads) > 1 else ""
    return (
        f"<h3>{escape(title)}</h3><div data-maps{' data-same' if same else ''}>{told}"
        f"<p class=only><select aria-label=block>{layers}</select> "
        f"<select aria-label=head>{all_heads}{options}</select> <output class=dim>A row is a token that looks, a "
        f"column one that is looked at. Choose a row.{coarse}</output></p>"
        "<div class=looks><canvas class=map></canvas><div class=heads></div></div><div class=reads></div></div>"
    )


def _levels(maps: Maps, room: float, *, is_causal: bool) -> int:
    """The shades for which `room` is enough; 0 where it is not even for the fewest."""
    blocks, heads = maps.shape[:2]
    some = maps.reshape(blocks * heads, 1, *maps.shape[2:])[:: max(1, blocks * heads // _SAMPLED)]
    most = some.size * room
    return next((n for n in _LEVELS if len(_packed(some, n, is_causal=is_causal)) <= most), 0)


def _packed(maps: Maps | NDArray[np.float32], levels: int, *, is_causal: bool) -> str:
    """A byte for each number, of a causal text those up to the diagonal: map by map, row by row, deflated."""
    # Every number of 16 bits has its shade: a root, so that small shares of long texts keep their differences.
    numbers = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    shades = np.round(np.sqrt(np.clip(np.nan_to_num(numbers), 0, 1)) * levels).astype(np.uint8)
    places = np.tril(np.ones(maps.shape[2:], bool), 0 if is_causal else maps.shape[3])
    packer = zlib.compressobj()
    parts = [
        packer.compress(shades[block[:, places].astype(np.float16, copy=False).view(np.uint16)].tobytes())
        for block in maps
    ]
    return base64.b64encode(b"".join((*parts, packer.flush()))).decode()


def rope_dials(rope: Rope, last: int) -> str:
    """A few of the turning pairs, and a slider for the position; `last` is the prompt's last one."""
    count = len(rope.wavelengths)
    chosen = sorted({round(step * (count - 1) / 7) for step in range(8)})
    told = _values({"pairs": chosen, "wavelengths": [rope.wavelengths[pair] for pair in chosen], "last": last})
    rows = "".join(
        f"<tr><td class=n>{pair}</td><td class=n>{number(rope.wavelengths[pair])}</td>"
        f"<td class=n>{rope.angles[pair]:.1f}°</td></tr>"
        for pair in chosen
    )
    return (
        f"<div data-rope>{told}<p class=only><label>position <input type=range min=0 max={max(last, 64)} value={last}>"
        f"</label> <output></output></p><div class=dials></div><details><summary>in numbers</summary><table>"
        f"<tr><th>pair<th>one turn in … tokens<th>angle at the last token</tr>{rows}</table></details></div>"
    )


def sampler(run: Run, sampling: Mapping[str, Any]) -> str:
    """The distribution of the next token under settings that can be moved; without a script, as they were given."""
    if not run.distribution.likeliest:
        return ""
    told = _values(
        {
            "pieces": [visible(one.piece) for one in run.distribution.likeliest],
            "shares": [float(f"{one.probability:.6g}") for one in run.distribution.likeliest],
            "tail": run.distribution.tail,
            "typical": sampling.get("typical", 1.0),
            "chosen": run.steps[0].id if run.steps else None,
            "ids": [one.id for one in run.distribution.likeliest],
        }
    )
    known = len(run.distribution.likeliest) + sum(count for _, count in run.distribution.tail)
    sliders = "".join(
        f"<label>{label}<input type=range data-set={name} min={low} max={high} step={step} "
        f'value="{_clamped(sampling.get(name, off), low, high)}"><output></output></label>'
        for name, label, low, high, step, off in (
            ("temp", "temperature", 0, 3, 0.01, 0.8),
            ("top_k", "top-k", 0, min(known, max(200, sampling.get("top_k", 0))), 1, 40),
            ("top_p", "top-p", 0, 1, 0.001, 0.95),
            ("min_p", "min-p", 0, 1, 0.001, 0.05),
        )
    )
    return (
        f"<div data-sampler>{told}<div class='sliders only'>{sliders}</div><p class=only><button type=button>As given"
        "</button> <button type=button>Draw a token</button> <button type=button>Draw 100</button> <output class=dim>"
        f"</output></p>{_options(run)}</div>"
    )


def _options(run: Run) -> str:
    rows = "".join(
        f"<tr{'' if option.sampled else ' class=cut'}><td class=m><bdi>{escape(visible(option.piece))}</bdi></td>"
        f"<td>{bar(option.probability)}</td><td class=n>{percent(option.probability)}</td>"
        f"<td>{bar(option.sampled, warm=True)}</td><td class=n>{percent(option.sampled)}</td><td class=n></td></tr>"
        for option in run.steps[0].options
    )
    head = "<tr><th>token<th colspan=2>by the model<th colspan=2>after the settings<th></tr>"
    return f"<div class=s><table class=choice><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def bar(share: float, *, warm: bool = False) -> str:
    """A bar as long as a share of one."""
    return f'<span class="b{" w" if warm else ""}" style="width:{8 * max(0.0, min(share, 1.0)):.2f}rem"></span>'


def _clamped(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def _values(values: Mapping[str, Any]) -> str:
    # "</script>" in a token would end the element that carries the values.
    told = json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"<script type=application/json>{told}</script>"
