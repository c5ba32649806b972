"""Texts that a model in training writes: greedy, in batches, ended by its own end tokens. Measures use it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.text_limit import bounds_positions, positions
from edgetune.training.loss import prompt_length
from edgetune.training.model import text_config

_AT_ONCE = 16


def greedy(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    most_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
    starts: Mapping[str, Any] | None = None,
    most_seconds: float | None = None,
    tick: Callable[[int, int], None],
) -> list[list[int]]:
    """The ids that `model` writes for each prompt, without the prompt and from the end token on without anything.

    With `starts` (decoder_start_token_id, forced_bos_token_id) the model is an encoder-decoder and prompts are its
    sources. What takes longer than `most_seconds` stays as far as it has come, as does what has come to the last
    position that `model` has.
    """
    how = {**(starts or {}), "max_time": most_seconds}
    places, from_sources = _places(model), starts is not None
    room = [most_tokens if places is None else places - (1 if from_sources else len(prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # One that ends before the others would end them too.
    ample = [index for index in order if room[index] >= most_tokens]
    scarce = [[index] for index in order if 0 < room[index] < most_tokens]
    written: dict[int, list[int]] = {index: [] for index in order}
    done = len(order) - len(ample) - len(scarce)
    for indices in [*(ample[at : at + _AT_ONCE] for at in range(0, len(ample), _AT_ONCE)), *scarce]:
        chosen = [prompts[index] for index in indices]
        most = min(most_tokens, room[indices[0]])
        found = _batch(model, chosen, most, sorted(end_ids), pad_id, how, from_sources=from_sources)
        for index, row in zip(indices, found, strict=True):
            end = next((place for place, token in enumerate(row) if token in end_ids), len(row))
            written[index] = row[:end]
        done += len(indices)
        tick(done, len(order))
    return [written[index] for index in range(len(prompts))]


def _places(model: Any) -> int | None:
    """Positions for a prompt and what is written behind it; None where they have no end."""
    config = text_config(model.config)
    names = (name for name, _ in model.named_parameters())
    known = positions(config.to_dict()) if bounds_positions(config.model_type, names) else None
    return None if known is None else known - prompt_length(model)


def _batch(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    most_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    options: Mapping[str, Any],
    *,
    from_sources: bool,
) -> list[list[int]]:
    import torch
    import transformers

    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        # A decoder goes on from the last column; an encoder's rows begin at the first.
        place = slice(0, len(prompt)) if from_sources else slice(longest - len(prompt), None)
        ids[row, place], mask[row, place] = prompt, 1
    device = next(model.parameters()).device
    how = transformers.GenerationConfig(
        max_new_tokens=most_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id,
        eos_token_id=list(end_ids) or None,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            generation_config=how,
        )
    rows: list[list[int]] = found[:, 1 if from_sources else longest :].tolist()
    return rows
