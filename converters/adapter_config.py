"""A PEFT adapter's adapter_config.json: which modules it adapts, at which rank and scale, and what makes it special.

Follows PEFT 0.21 field by field. Fields that only steer training (dropout, initial values that leave the base alone, …)
have no say in what an adapter computes and are not read. Knows no tensors and no model family.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CorruptCheckpoint, UnsupportedAdapter

CONFIG_NAME = "adapter_config.json"

MERGE_WITH_PEFT = (
    "Merge it into its base with PEFT (model.merge_and_unload().save_pretrained(DIRECTORY)) and convert that directory."
)

_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base's own weights as they are."""

_VARIANTS = {
    "use_qalora": "QA-LoRA pools its input in groups",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "BD-LoRA keeps its matrices as diagonal blocks",
    "arrow_config": "Arrow routes every token among several adapters",
    "kasa_config": "KaSA rewrites the base's own weights when it is loaded",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "layer_replication": "it repeats the base's layers",
    "megatron_config": "it was made for Megatron's parallel layers",
}
"""Fields that change what an adapter computes into something neither a GGUF adapter nor a merged weight holds."""

_BESIDE_WEIGHTS = {
    "HOULSBY": "it puts layers of its own between the model's",
    "PFEIFFER": "it puts layers of its own between the model's",
    "PROMPT_TUNING": "it puts trained vectors in front of the text",
    "P_TUNING": "it puts trained vectors in front of the text",
    "PREFIX_TUNING": "it puts trained keys and values in front of the text's",
}
"""Kinds of adapter that are no change of the model's weights."""

_KNOWN_SWITCHES = frozenset(
    ("use_rslora", "use_dora", "velora_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config")
) | frozenset(_VARIANTS)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, as far as it decides what the adapter computes."""

    values: Mapping[str, Any]
    """Every field of the file."""

    @property
    def base_name(self) -> str:
        """`base_model_name_or_path`: a path or a hub name; empty when the file has none."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return _names(self.values.get("modules_to_save"))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        return _names(self.values.get("target_parameters"))

    @property
    def trainable_token_indices(self) -> list[int] | dict[str, list[int]] | None:
        value: list[int] | dict[str, list[int]] | None = self.values.get("trainable_token_indices")
        return value or None

    @property
    def ensure_weight_tying(self) -> bool:
        return bool(self.values.get("ensure_weight_tying"))

    def rank(self, module: str) -> int:
        """LoRA rank of the module called `module` ("model.layers.0.mlp.up_proj")."""
        return int(_by_pattern(self.values.get("rank_pattern"), module, self.values.get("r", 8)))

    def scaling(self, module: str) -> float:
        """What B @ A is multiplied with: alpha / rank, with rsLoRA alpha / √rank."""
        alpha = float(_by_pattern(self.values.get("alpha_pattern"), module, self.values.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a module of this name; the rule is `check_target_module_exists` in its tuners_utils."""
        if self._excludes(module):
            return False
        wanted = self.values.get("target_modules")
        if wanted is None:
            return False
        if isinstance(wanted, str):
            return wanted.lower() == "all-linear" or re.fullmatch(wanted, module) is not None
        # A name given in full is meant whatever layers_to_transform says.
        return module in wanted or (_ends_with_any(module, wanted) and self._transforms_layer(module))

    def _excludes(self, module: str) -> bool:
        excluded = self.values.get("exclude_modules")
        if isinstance(excluded, str) and excluded:
            return re.fullmatch(excluded, module) is not None
        if excluded and _ends_with_any(module, excluded):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def _transforms_layer(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern")
        found = None
        if not patterns:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        else:
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module):
                    break
        if found is None:
            return False
        index = int(found["idx"])
        return index == layers if isinstance(layers, int) else index in layers


def read_adapter_config(adapter_dir: Path) -> AdapterConfig:
    """Read `adapter_dir`'s configuration and refuse what is no LoRA, or no LoRA that weights alone describe.

    Raises `CorruptCheckpoint` for a missing or broken file, `UnsupportedAdapter` naming the field.
    """
    path = adapter_dir / CONFIG_NAME
    if not path.is_file():
        raise CorruptCheckpoint(
            f"{adapter_dir} has no {CONFIG_NAME}.", hint="Point to a directory that PEFT's save_pretrained() made."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(
            f"{path} is not valid JSON: {error}.", hint="Save or download the adapter again."
        ) from error
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path} does not hold a JSON object.", hint="Save or download the adapter again.")
    config = AdapterConfig(values)
    _check_kind(config)
    _check_numbers(path, config)
    _check_patterns(path, config)
    return config


def _check_kind(config: AdapterConfig) -> None:
    values = config.values
    kind = values.get("peft_type")
    if reason := _BESIDE_WEIGHTS.get(str(kind)):
        raise UnsupportedAdapter(
            f"The adapter's peft_type is {kind!r}: {reason}. Neither a GGUF adapter nor a merged weight holds that.",
            hint="Run it in torch, on the model's directory, with the tool that made it; generate, embed and classify "
            "have --engine torch for HOULSBY and PFEIFFER. To get a GGUF file, train a LoRA.",
        )
    if kind != "LORA":
        raise UnsupportedAdapter(f"The adapter's peft_type is {kind!r}; only LORA is supported.", hint=MERGE_WITH_PEFT)
    if (task := values.get("task_type")) not in _TASKS:
        raise UnsupportedAdapter(
            f"The adapter's task_type is {task!r}; it answers for something else than a text as a whole.",
            hint=f"Adapters with task_type {', '.join(one for one in _TASKS if one)} are converted.",
        )
    _check_init(values.get("init_lora_weights", True))
    for field, reason in _VARIANTS.items():
        if values.get(field):
            raise UnsupportedAdapter(f"The adapter sets {field}: {reason}.", hint=_way_out(field))
    for field, value in values.items():
        if value and field not in _KNOWN_SWITCHES and (field.startswith("use_") or field.endswith("_config")):
            raise UnsupportedAdapter(
                f"The adapter sets {field}, which PEFT 0.21 does not know and which may change what it computes.",
                hint=MERGE_WITH_PEFT,
            )


def _check_init(init: object) -> None:
    if init in _PLAIN_INITS:
        return
    raise UnsupportedAdapter(
        f"The adapter's init_lora_weights is {init!r}: PEFT changes the base's own weights when it loads this adapter.",
        hint="Save it as a plain LoRA: save_pretrained(…, path_initial_model_for_weight_conversion=…). "
        + MERGE_WITH_PEFT,
    )


def _way_out(field: str) -> str:
    if field in ("arrow_config", "alora_invocation_tokens"):
        return "No fixed set of weights does the same; run it with PEFT."
    return MERGE_WITH_PEFT


def _check_numbers(path: Path, config: AdapterConfig) -> None:
    values = config.values
    ranks = [values.get("r", 8), *(values.get("rank_pattern") or {}).values()]
    alphas = [values.get("lora_alpha", 8), *(values.get("alpha_pattern") or {}).values()]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CorruptCheckpoint(f"{path} gives a LoRA rank as {rank!r}, not a positive whole number.")
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CorruptCheckpoint(f"{path} gives lora_alpha as {alpha!r}, not a number.")


def _check_patterns(path: Path, config: AdapterConfig) -> None:
    values = config.values
    patterns: list[str] = [*(values.get("rank_pattern") or {}), *(values.get("alpha_pattern") or {})]
    patterns += [value for key in ("target_modules", "exclude_modules") if isinstance(value := values.get(key), str)]
    patterns += [*config.modules_to_save, *_names(values.get("layers_pattern"))]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CorruptCheckpoint(f"{path} holds the pattern {pattern!r}, which is not valid: {error}.") from error


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT's get_pattern_key: the first pattern, in the file's order, that matches the end of the name from a dot on.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _ends_with_any(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(name) for name in value) if isinstance(value, list | tuple) else ()
