"""Everything a training run is told, in one frozen value; the docstrings under the fields are the command line's help.

Also reads recipes (TOML files with the same names). Standard library alone: nothing here imports torch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from edgetune.errors import UsageError
from edgetune.training.methods import METHODS
from edgetune.training.reporters import REPORTERS
from edgetune.training.schedule import ScheduleName
from edgetune.training.tasks import TASKS

LEAST_LENGTH = 8
"""Tokens that a row may be cut to, at least."""


@dataclass(frozen=True)
class TrainSettings:
    """What `train` is told. Paths as given; everything else ends up in the run record."""

    model: str = ""
    """Base model: a Hugging Face directory, or a name in the library."""
    data: tuple[str, ...] = ()
    """Data: a file, several files, or a directory with train/valid/test files; PATH:2 has its rows twice an epoch,
    PATH:0.5 half of them."""
    out: str = ""
    """Run directory to write; default: runs/BASE-DATA-TIME."""
    task: str = "auto"
    """What is trained for: chat, completion, classification, regression, embedding, seq2seq, or preferences (dpo, orpo,
    simpo, kto); auto: by the data."""
    method: str = "lora"
    """How the model is adapted: lora, rslora, dora, lora+, pissa, olora, qlora, full, houlsby, pfeiffer or prompt."""
    option: Mapping[str, str] = field(default_factory=dict)
    """What a task or method of another package wants to be told: NAME=VALUE."""
    epochs: float = 3.0
    """Passes over the training data; ignored when --steps is given."""
    steps: int = 0
    """Optimizer steps; 0: as many as --epochs takes."""
    batch_size: int = 4
    """Sequences in one forward pass."""
    grad_accum: int = 1
    """Forward passes in one optimizer step."""
    packing: bool = True
    """Lay sequences into rows without padding, where the model keeps them apart exactly; the loss stays the same."""
    cache: bool = True
    """Keep sequences made of 1,000 rows and more on disk, for the next run on the same data."""
    max_length: int = 0
    """Longest sequence in tokens, the rest is cut; 0: 2048, or the model's context when that is shorter."""
    lr: float = 2e-4
    """Learning rate at its highest."""
    schedule: ScheduleName = "cosine"
    """How the learning rate falls after the warmup, by transformers' names."""
    warmup: float = 0.03
    """Share of the steps (below 1) or number of steps (1 and above) in which the learning rate rises."""
    decay: float = 0.2
    """Schedule warmup_stable_decay (wsd): share or number of the last steps, in which the learning rate falls."""
    min_lr_rate: float = 0.0
    """What the learning rate falls to, as a share of --lr; not with constant and inverse_sqrt."""
    power: float = 1.0
    """Schedule polynomial: 1 is a straight line, more falls sooner."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: not at all."""
    rank: int = 16
    """LoRA rank r."""
    alpha: float = 32.0
    """LoRA alpha; updates are scaled by alpha / rank."""
    dropout: float = 0.0
    """LoRA dropout. The base's own, which few have (GPT-2: 0.1), is active in training, as in transformers and PEFT."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: all-linear, names such as q_proj v_proj embed_tokens lm_head, or one regular expression."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules whose name matches: PATTERN=RANK."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for modules whose name matches: PATTERN=ALPHA."""
    lora_plus_ratio: float = 16.0
    """Method lora+: B's learning rate as a multiple of A's."""
    bottleneck: int = 64
    """Methods houlsby and pfeiffer: numbers in the middle of an adapter."""
    prompt_tokens: int = 20
    """Method prompt: vectors in front of the text."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter; converting then needs --merge."""
    grad_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations instead of keeping them: less memory, a third slower; auto: where memory would not suffice.
    Without a value: on."""
    torch_compile: bool = False
    """Compile the model's layers (torch.compile): minutes at the start, which a CPU's small gain does not repay."""
    fsdp: bool = False
    """Several processes: each holds a share of the frozen layers and fetches the rest to run them (FSDP)."""
    chat_template: str = ""
    """A Jinja file to use as the chat template, for a model that has none; kept with the adapter."""
    seed: int = 0
    """Seed of the data order, the adapter's start and dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: cuda, else mps, else cpu."""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """Type of the frozen base weights; auto: bf16 where the chip computes in it, else f32. Adapters are always f32."""
    eval: bool = True
    """Measure the validation rows before, on schedule, and at the end."""
    valid_share: float = 0.05
    """Share of 40 and more training rows that is held out for validation where no rows are given for it; 0: none."""
    eval_every: int = 0
    """Steps between measurements; 0: once an epoch."""
    eval_texts: int = -1
    """Validation rows that a text is written for, greedily, to be compared; -1: 64 for seq2seq, else none."""
    samples: int = 4
    """Validation rows that the model answers before and after, for the report; 0: none."""
    metric: str = ""
    """Keep the adapter that is best by this, e.g. loss, accuracy, macro_f1, spearman, bleu; else the last one."""
    early_stopping: int = 0
    """Stop after this many measurements without a better --metric (by default the loss); 0: never."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification: balanced makes rare labels count as much as frequent ones."""
    pair_loss: Literal["cosent", "cosine"] = "cosent"
    """Embedding, pairs with a score: learn their order (CoSENT), or their cosine."""
    temperature: float = 0.05
    """Embedding: cosines are divided by this; less looks harder at near misses."""
    pooling: Literal["auto", "mean", "cls", "last", "max"] = "auto"
    """Embedding: how token states become one; auto: as the model's files say, else mean, or last for decoders."""
    src_lang: str = ""
    """Seq2seq: language of the sources, a column of the rows or a code of the model, e.g. en or en_XX."""
    tgt_lang: str = ""
    """Seq2seq: language of the targets."""
    prefix: str = "auto"
    """Seq2seq: text in front of every source; auto: what T5 was taught for such rows, else nothing."""
    beta: float = 0.0
    """Preferences: strength of a gain on the base (DPO, KTO) or of a likelihood (SimPO); 0: 0.1, for SimPO 2."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO: the paper's own loss, or IPO's, which does not drive replies apart for ever."""
    label_smoothing: float = 0.0
    """DPO, SimPO: share of the pairs taken to be the wrong way round."""
    orpo_lambda: float = 0.1
    """ORPO: weight of the odds ratio beside the chosen reply's own loss."""
    gamma: float = 1.0
    """SimPO: by how much the chosen reply is to win."""
    desirable_weight: float = 1.0
    """KTO: weight of the replies found good."""
    undesirable_weight: float = 1.0
    """KTO: weight of the replies found bad."""
    report_to: tuple[str, ...] = ()
    """Tools that are told what is measured, where they are installed: tensorboard, wandb, mlflow. Offline."""
    save_every: int = 0
    """Steps between checkpoints; 0: ten times a run, and at least every 200 steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, 1 or more; the best adapter, where --metric chooses one, is kept besides."""
    skip_bad_rows: bool = False
    """Leave out rows that are not in the data's format, and count them."""

    def check(self) -> None:
        """Raise `UsageError` for a value out of its range."""
        TASKS.check(self.task)
        METHODS.check(self.method)
        for reporter in self.report_to:
            REPORTERS.check(reporter)
        for name in (item.name for item in fields(self) if isinstance(getattr(self, item.name), float)):
            self._demand(math.isfinite(getattr(self, name)), name, "a number")
        for name in ("batch_size", "grad_accum", "rank", "bottleneck", "prompt_tokens", "keep_checkpoints"):
            self._demand(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "steps",
            "max_length",
            "save_every",
            "eval_every",
            "early_stopping",
            "samples",
            "weight_decay",
            "max_grad_norm",
            "warmup",
            "seed",
            "beta",
            "orpo_lambda",
            "gamma",
            "desirable_weight",
            "undesirable_weight",
        ):
            self._demand(getattr(self, name) >= 0, name, "0 or more")
        self._demand(self.seed < 1 << 63, "seed", "less than 2^63")
        if len(set(self.data)) > len(self.data_weights):
            raise UsageError("The same data are given with several weights.", hint="Give each path once.")
        for path, weight in self.data_weights.items():
            if not 0 < weight <= 1000:
                raise UsageError(f"{path} has the weight {weight:g}, expected more than 0 and at most 1000.")
        self._demand(self.epochs > 0, "epochs", "more than 0")
        self._demand(0 < self.lr < 10, "lr", "between 0 and 10")
        for name in ("alpha", "decay", "power"):
            self._demand(getattr(self, name) > 0, name, "more than 0")
        self._demand(0 <= self.min_lr_rate < 1, "min_lr_rate", "at least 0 and less than 1")
        self._demand(self.lora_plus_ratio > 0, "lora_plus_ratio", "more than 0")
        self._demand(self.temperature > 0, "temperature", "more than 0")
        self._demand(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and less than 0.5")
        self._demand(self.eval_texts >= -1, "eval_texts", "-1 or more")
        self._demand(self.eval or not (self.metric or self.early_stopping), "eval", "on, for --metric")
        self._demand(0 <= self.valid_share <= 0.5, "valid_share", "between 0 and 0.5")
        self._demand(0 <= self.dropout < 1, "dropout", "at least 0 and less than 1")
        self._demand(self.max_length == 0 or self.max_length >= LEAST_LENGTH, "max_length", f"at least {LEAST_LENGTH}")
        self._demand(not (self.torch_compile and self.fsdp), "torch_compile", "off, with --fsdp")
        self._demand(bool(self.target_modules), "target_modules", "at least one name")
        self._demand(self.grad_checkpointing in ("auto", "on", "off"), "grad_checkpointing", "auto, on or off")
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            good = all(value > 0 and math.isfinite(value) for value in patterns.values())
            self._demand(good, name, "more than 0 everywhere")

    @property
    def data_paths(self) -> list[Path]:
        """Where the data are, without weights."""
        return [Path(split_weight(text)[0]).expanduser() for text in self.data]

    @property
    def data_weights(self) -> dict[str, float]:
        """How often the rows of each path come in an epoch, by the path without its weight."""
        return {str(path): split_weight(text)[1] for path, text in zip(self.data_paths, self.data, strict=True)}

    def _demand(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise UsageError(f"{flag_name(name)} is {getattr(self, name)!r}, expected {expected}.")

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> TrainSettings:
        """From `record()`'s values; names that are not settings are ignored."""
        known = {item.name for item in fields(cls)}
        # A record that does not know of held-out rows is of a run that held none out.
        values = {"valid_share": 0.0, **values}
        return cls(**{name: _typed(name, value) for name, value in values.items() if name in known})

    def absolute(self) -> TrainSettings:
        """The same with every path absolute, so that a run can be resumed from any directory."""

        def path(value: str) -> str:
            return str(Path(value).expanduser().absolute()) if value else ""

        model = path(self.model) if Path(self.model).expanduser().is_dir() else self.model
        data = tuple(map(path, self.data))
        option = {name: path(text) if Path(text).expanduser().is_file() else text for name, text in self.option.items()}
        return replace(self, model=model, data=data, chat_template=path(self.chat_template), option=option)

    def differences(self, other: TrainSettings) -> list[str]:
        """Which settings differ, as "--lr 0.0001, was 0.0002"; where things are written does not count."""
        mine, theirs = self.record(), other.record()
        return [
            f"{flag_name(name)} {mine[name]}, was {theirs[name]}"
            for name in mine
            if name not in ("out", "cache") and mine[name] != theirs[name]
        ]

    def chosen(self) -> dict[str, Any]:
        """The settings that are not the defaults, JSON-ready."""
        default = TrainSettings().record()
        return {name: value for name, value in self.record().items() if value != default[name]}


_OTHER_NAMES = {"gradient_checkpointing": "grad_checkpointing"}


def split_weight(text: str) -> tuple[str, float]:
    """A path and its weight, from PATH or PATH:WEIGHT."""
    found = re.fullmatch(r"(.{2,}?):(\d+\.?\d*|\.\d+)", text, re.DOTALL)
    return (found[1], float(found[2])) if found else (text, 1.0)


def flag_name(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def merge_settings(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainSettings:
    """Defaults, then `recipe`, then `flags`; checked. Raises `UsageError`."""
    settings = replace(TrainSettings(), **{name: _typed(name, value) for name, value in {**recipe, **flags}.items()})
    settings.check()
    return settings


RECIPES = Path(__file__).parent.parent / "recipes"
"""Recipes that come with edgetune, found by their names."""


def find_recipe(name: str) -> Path:
    """The recipe called `name`, or the file of that path. Raises `UsageError` when there is neither."""
    if (path := Path(name).expanduser()).is_file() or path.suffix == ".toml":
        return path
    known = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}; or give a TOML file."
        raise UsageError(f"There is no recipe {name!r}.", hint=hint)
    return known[name]


def read_recipe(path: Path) -> dict[str, Any]:
    """Settings from a TOML file; paths in it are relative to the file. Raises `UsageError` for a wrong one."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"The recipe {path} cannot be read: {error}.") from error
    known, found = {item.name for item in fields(TrainSettings)}, dict[str, Any]()
    for written, value in values.items():
        name = written.replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0].replace('_', '-')}?" if close else f"Known: {', '.join(sorted(known))}."
            raise UsageError(f"The recipe {path} has an unknown setting {written!r}.", hint=hint)
        if name in found:
            raise UsageError(f"The recipe {path} has {name.replace('_', '-')} twice, the second time as {written!r}.")
        found[name] = _relative(name, _typed(name, value, where=f" in {path}"), path.parent)
    return found


def parse_setting(name: str, text: str) -> Any:
    """The value of setting `name` that `text` says. Raises `UsageError`, also for one that is no single value."""
    hints = get_type_hints(TrainSettings)
    if name not in hints:
        close = get_close_matches(name, hints, n=1)
        raise UsageError(f"There is no setting {name!r}.", hint=f"Did you mean {close[0]}?" if close else "")
    if (wanted := hints[name]) is bool:
        return _typed(name, {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text))
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError as error:
            raise UsageError(f"{name} is {text!r}, expected {_called(wanted)}.") from error
    if "tuple" in str(wanted) or "Mapping" in str(wanted):
        raise UsageError(f"{flag_name(name)} has no single value.")
    return _typed(name, text)


def _relative(name: str, value: Any, directory: Path) -> Any:
    """Paths of a recipe, seen from the recipe; a model's name stays a name."""
    if name in ("chat_template", "out") and value:
        return str(directory / Path(value).expanduser())
    if name == "data":
        return tuple(str(directory / Path(item).expanduser()) for item in value)
    if name == "option":
        return {key: str(directory / text) if (directory / text).is_file() else text for key, text in value.items()}
    if name == "model" and (directory / value).exists() and ("/" in value or value.startswith(".")):
        return str(directory / value)
    return value


def _typed(name: str, value: Any, *, where: str = "") -> Any:
    """`value` as the field wants it: lists become tuples, whole numbers pass as floats. Else raises `UsageError`."""
    wanted = get_type_hints(TrainSettings)[name]
    text = str(wanted)
    if "tuple" in text:
        items = (value,) if isinstance(value, str) else value
        if isinstance(items, Sequence) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif "Mapping" in text:
        number = str if "str, str" in text else int if "int" in text else (int, float)
        items = value.values() if isinstance(value, Mapping) else [value]
        if isinstance(value, Mapping) and all(isinstance(n, number) and not isinstance(n, bool) for n in items):
            return dict(value)
    elif "Literal" in text:
        choices = re.findall(r"'([^']+)'", text)
        if "on" in choices:
            # Recipes, records and sweeps may say yes or no.
            value = {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(str(value).lower(), value)
        if value in choices:
            return value
        raise UsageError(f"{name} is {value!r}{where}, expected one of {', '.join(choices)}.")
    elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{name} is {value!r}{where}, expected {_called(wanted)}.")


def _called(wanted: Any) -> str:
    """A type as people call it."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(wanted) or ("a list of texts" if "tuple" in str(wanted) else "a table, e.g. { q_proj = 4 }")
