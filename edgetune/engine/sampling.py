"""How the next token is chosen: llama.cpp's sampling parameters, with its names and defaults.

Values only; the chain of native samplers that follows them is built in `sampler`. The front ends take their flags, help
and `/set parameter` names from the fields here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from edgetune.errors import UsageError

RANDOM_SEED = -1
"""As a seed: take another one each time."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; a field's name is llama.cpp's flag with underscores."""

    seed: int = RANDOM_SEED
    """Seed of the random choice; -1 takes another one each time."""
    temp: float = 0.8
    """Temperature: 0 always takes the most likely token, higher is more varied."""
    top_k: int = 40
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the most likely one; 0 keeps all."""
    typical: float = 1.0
    """Keep tokens near the expected information (locally typical sampling); 1 is off."""
    top_nsigma: float = -1.0
    """Keep tokens within this many standard deviations of the best logit; -1 is off."""
    xtc_probability: float = 0.0
    """Chance of dropping all likely tokens but the least of them (XTC); 0 is off."""
    xtc_threshold: float = 0.1
    """Probability from which XTC calls a token likely; above 0.5 it is off."""
    dynatemp_range: float = 0.0
    """Let the temperature vary by this much with the entropy; 0 is off."""
    dynatemp_exp: float = 1.0
    """How entropy maps to the dynamic temperature."""
    repeat_last_n: int = 64
    """How many tokens back the penalties look; 0 is off, -1 is the whole context."""
    repeat_penalty: float = 1.0
    """Divide the logits of tokens seen before by this; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract this from tokens seen before; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtract this for each time a token was seen; 0 is off."""
    dry_multiplier: float = 0.0
    """Strength of the penalty on repeated sequences (DRY); 0 is off."""
    dry_base: float = 1.75
    """How fast DRY's penalty grows with the length of the repetition."""
    dry_allowed_length: int = 2
    """Repetitions up to this many tokens cost nothing under DRY."""
    dry_penalty_last_n: int = 64
    """How many tokens back DRY looks; 0 is off, -1 is the whole context."""
    mirostat: int = 0
    """Hold the text's surprise at a target instead: 1 is Mirostat, 2 is Mirostat 2.0, 0 is off."""
    mirostat_lr: float = 0.1
    """Mirostat's learning rate."""
    mirostat_ent: float = 5.0
    """Mirostat's target surprise."""
    ignore_eos: bool = False
    """Never end by itself: go on until the token limit or the context is reached."""
    logit_bias: str = ""
    """Make single tokens likelier or less likely: ID+BIAS or ID-BIAS, e.g. "15043+1 29871-2.5"; -inf forbids one."""
    grammar: str = ""
    """A grammar (GBNF) that the text must follow."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name} is {value}; it has to be a finite number.")
        _demand(self.repeat_penalty > 0, "repeat_penalty", self.repeat_penalty, "more than 0")
        _demand(self.mirostat in (0, 1, 2), "mirostat", self.mirostat, "0, 1 or 2")
        _demand(self.seed < 1 << 32, "seed", self.seed, "less than 4294967296")
        for name in ("repeat_last_n", "dry_penalty_last_n", "seed"):
            _demand(getattr(self, name) >= -1, name, getattr(self, name), "-1 or more")
        for name in ("top_p", "min_p", "typical", "xtc_probability", "xtc_threshold"):
            _demand(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        self.biases()
        if self.grammar and self.ignore_eos:
            raise UsageError("A grammar ends the text, which ignore_eos forbids.", hint="Leave one of them out.")

    def biases(self) -> dict[int, float]:
        """`logit_bias` as token id → bias. Raises `UsageError` when it cannot be read."""
        found = {}
        for word in self.logit_bias.replace(",", " ").split():
            match = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", word)
            if match is None or match[2] == "+inf":
                raise UsageError(f"logit_bias has {word!r}; it takes ID+BIAS or ID-BIAS.", hint='E.g. "15043+1".')
            found[int(match[1])] = float(match[2])
        return found

    def with_setting(self, name: str, text: str) -> Sampling:
        """A copy with the field called `name` (dashes, underscores and ollama's names alike) set from `text`."""
        name = _ALIASES.get(name.replace("-", "_").lower(), name.replace("-", "_").lower())
        default: bool | int | float | str | None = getattr(Sampling, name, None) if name in _names() else None
        if default is None:
            raise UsageError(f"There is no sampling parameter {name!r}.", hint=f"Known: {', '.join(_names())}.")
        try:
            value = _as_bool(text) if isinstance(default, bool) else type(default)(text)
        except ValueError as error:
            raise UsageError(f"{name} takes {_KINDS[type(default)]}, not {text!r}.") from error
        changes: dict[str, object] = {name: value}
        return replace(self, **changes)  # type: ignore[arg-type]


_ALIASES = {
    "temperature": "temp",
    "typical_p": "typical",
    "typ_p": "typical",
    "top_n_sigma": "top_nsigma",
    "mirostat_tau": "mirostat_ent",
    "mirostat_eta": "mirostat_lr",
    "penalty_repeat": "repeat_penalty",
}


_KINDS = {bool: "on or off", int: "a whole number", float: "a number", str: "a text"}


def _names() -> list[str]:
    return [field.name for field in fields(Sampling)]


def _demand(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}; it has to be {expected}.")


def _as_bool(text: str) -> bool:
    values = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]
