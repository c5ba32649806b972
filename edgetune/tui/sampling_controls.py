"""The sampling parameters as controls: which, in what order, between which ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgetune.engine.sampling import Sampling
from edgetune.tui.controls import Control, Value

PRESET = "preset"
MAX_TOKENS = "max_tokens"
CUSTOM = "custom"
"""What the preset is called when the parameters are nobody's."""

_DEFAULT = Sampling()
_LABELS = {
    "temp": "temperature",
    "repeat_penalty": "repeat",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
    "repeat_last_n": "look back",
    "top_nsigma": "top-nσ",
    "xtc_probability": "xtc chance",
    "xtc_threshold": "xtc from",
    "dry_multiplier": "dry",
    "dry_base": "dry growth",
    "dry_allowed_length": "dry length",
    "dynatemp_range": "dyn. temp",
    "mirostat_ent": "miro target",
    "mirostat_lr": "miro rate",
    MAX_TOKENS: "max tokens",
}


def _number(name: str, low: float, high: float, step: float, hint: str, *, digits: int = 2, unset: str = "") -> Control:
    default = float(getattr(_DEFAULT, name, -1))
    zero = 0.0 if low < 0 and not unset else None
    label = _LABELS.get(name, name.replace("_", "-"))
    return Control(name, label, hint, low, high, step, digits, default, zero=zero, unset=unset)


NUMBERS = (
    _number("temp", 0, 2, 0.05, "Flatter or steeper: 0 always takes the likeliest token."),
    _number("top_k", 0, 100, 1, "Only the k likeliest stay; 0 keeps all.", digits=0),
    _number("top_p", 0, 1, 0.01, "The likeliest that together reach this share stay."),
    _number("min_p", 0, 1, 0.01, "Out goes what is less likely than this share of the likeliest."),
    _number("repeat_penalty", 1, 2, 0.01, "Tokens said lately are divided by this; 1 is off."),
    _number("presence_penalty", -2, 2, 0.05, "Taken from tokens that were said lately."),
    _number("frequency_penalty", -2, 2, 0.05, "Taken for each time a token was said lately."),
    _number("repeat_last_n", -1, 512, 1, "How many tokens back the penalties look.", digits=0, unset="all"),
    _number("typical", 0, 1, 0.01, "Tokens of about the expected surprise stay; 1 is off."),
    _number("top_nsigma", -1, 5, 0.1, "Within this many deviations of the best logit.", unset="off"),
    _number("xtc_probability", 0, 1, 0.05, "Chance of leaving out all likely tokens but the last."),
    _number("xtc_threshold", 0, 0.5, 0.01, "From here on XTC calls a token likely."),
    _number("dry_multiplier", 0, 2, 0.05, "Strength against repeating whole sequences; 0 is off."),
    _number("dry_base", 1, 4, 0.05, "How fast that grows with the length."),
    _number("dry_allowed_length", 0, 20, 1, "Repetitions up to here are free.", digits=0),
    _number("dynatemp_range", 0, 2, 0.05, "The temperature follows the entropy by this much."),
    _number("mirostat", 0, 2, 1, "Hold the surprise at a target instead; 0 is off.", digits=0),
    _number("mirostat_ent", 0, 10, 0.1, "Mirostat's target, in nats."),
    _number("mirostat_lr", 0, 1, 0.01, "How fast mirostat follows."),
    _number("seed", -1, 1000, 1, "The same seed, the same reply; -1 is another each time.", digits=0, unset="random"),
    _number(MAX_TOKENS, -1, 2048, 1, "New tokens a reply may have.", digits=0, unset="context"),
)
"""Every parameter on the panel."""


def preset_control(names: list[str]) -> Control:
    """The line that chooses among presets."""
    return Control(
        PRESET, PRESET, "s keeps these values as a preset of yours; X deletes one.", choices=(*names, CUSTOM)
    )


def values_of(sampling: Sampling, *, max_tokens: int) -> dict[str, Value]:
    """What the controls show."""
    values: dict[str, Value] = {
        control.name: float(getattr(sampling, control.name)) for control in NUMBERS if control.name != MAX_TOKENS
    }
    return {**values, MAX_TOKENS: float(max_tokens)}


def changed(sampling: Sampling, name: str, value: float) -> Sampling:
    """`sampling` with another parameter. Raises `UsageError` for a value it does not take."""
    is_whole = isinstance(getattr(_DEFAULT, name), int)
    number: Any = int(value) if is_whole else float(value)
    return replace(sampling, **{name: number})
