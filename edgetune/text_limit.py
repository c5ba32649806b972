"""How many tokens of a text a model has positions for, by the values of its config.json. Reads no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = (
    *("max_position_embeddings", "n_positions", "max_source_positions", "max_encoder_position_embeddings"),
    *("max_seq_len", "seq_length", "n_ctx"),
)
_COUNTED_FROM_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer"),
    *("data2vec-text", "ibert", "xmod", "luke"),
)
"""`model_type` of those whose first token stands at the position after the padding token's id."""
_PADDING = 1
"""The padding token of these, where the config does not name it."""


_TABLE = re.compile(r"(^|\.)(wpe|positions_embed|embed_positions|position_embeddings?|position_embd)\.weight$")
"""Names of tables of positions among the weights."""

_COMPUTED_TABLE = ("codegen", "ctrl", "gptj")
"""`model_type` of those whose table is computed, as long as the config says, and in no file."""


def bounds_positions(model_type: str, weights: Iterable[str]) -> bool:
    """Whether a model with these `weights` cannot run longer texts than `positions` says, as it looks them up."""
    return model_type in _COMPUTED_TABLE or any(_TABLE.search(name) for name in weights)


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest text in tokens, those around it included; None where the config sets no bound."""
    found = next((value for name in _NAMES if isinstance(value := config.get(name), int) and value > 0), None)
    return found if found is None else max(0, found - unused_positions(config))


def unused_positions(config: Mapping[str, Any]) -> int:
    """Rows at the start of the position table that no token ever has."""
    if config.get("model_type") not in _COUNTED_FROM_PADDING:
        return 0
    padding = config.get("pad_token_id")
    # MPNet's is fixed, whatever its config says.
    return (padding if isinstance(padding, int) and config["model_type"] != "mpnet" else _PADDING) + 1
