"""Which task "auto" means: what the columns of the data are plainly for, on a base of this kind.

Reads config.json's values and one row. Where two tasks would do, says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgetune.data.columns import possible_tasks
from edgetune.data.dataset import first_row
from edgetune.data.formats import detect_format
from edgetune.data.preferences import preference_task
from edgetune.errors import DataError, UnsupportedError
from edgetune.training.settings import TrainSettings

Kind = Literal["decoder", "encoder", "encoder-decoder"]

_ENCODERS = (
    *("bert", "distilbert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "modernbert", "electra"),
    *("albert", "mpnet", "deberta", "deberta-v2", "nomic_bert", "eurobert", "ernie", "roformer", "longformer"),
    *("big_bird", "convbert", "funnel", "layoutlm", "mobilebert", "nystromformer", "rembert", "squeezebert"),
    *("roberta-prelayernorm", "xlm", "xmod", "data2vec-text", "mra", "ibert", "esm"),
)
_ENCODER_DECODERS = (
    *("t5", "mt5", "umt5", "bart", "mbart", "encoder-decoder", "marian", "pegasus", "m2m_100", "blenderbot"),
)

_DOES: dict[Kind, tuple[str, ...]] = {
    "decoder": ("classification", "regression", "embedding"),
    "encoder": ("classification", "regression", "embedding"),
    "encoder-decoder": ("seq2seq",),
}


def base_kind(raw: Mapping[str, Any]) -> Kind:
    """What kind of model config.json's values describe."""
    architecture = str((raw.get("architectures") or [""])[0])
    if raw["model_type"] in _ENCODER_DECODERS or (raw.get("is_encoder_decoder") and "CausalLM" not in architecture):
        return "encoder-decoder"
    if raw["model_type"] in _ENCODERS and "LMHead" not in architecture and "CausalLM" not in architecture:
        return "encoder"
    return "decoder"


def choose_task(settings: TrainSettings, raw: Mapping[str, Any], model_dir: Path) -> str:
    """`settings.task`, or what "auto" means; "auto" itself where chat and completion are to be told apart."""
    if settings.task != "auto":
        return settings.task
    row = first_row(settings.data_paths)
    if row is None:
        return "auto"
    kind, texts = base_kind(raw), detect_format(row)
    if kind == "decoder" and (preferences := preference_task(row)):
        return preferences
    found = [task for task in possible_tasks(row) if task in _DOES[kind]]
    if kind == "decoder" and texts is not None:
        if texts.name == "plain text" and (found := [task for task in found if task != "embedding"]):
            found = ["completion", *found]
        else:
            return "auto"
    if len(found) > 1:
        raise DataError(
            f"The columns {', '.join(map(str, row))} could be for {' or '.join(found)}.",
            hint=f"Say which with --task, e.g. --task {found[-1]}.",
        )
    if found:
        return found[0]
    if kind == "decoder":
        return "auto"
    raise UnsupportedError(
        f"{model_dir} is an {kind} ({raw['model_type']}), not a decoder that writes text, and the columns "
        f"{', '.join(map(str, row))} are not for it.",
        hint=_ROWS[kind],
    )


_ROWS = {
    "encoder": "It learns from rows of text, label or text, score or anchor, positive; for chat give a decoder.",
    "encoder-decoder": "It learns from rows of source, target or article, summary or translations or questions; "
    "for chat give a decoder.",
}
