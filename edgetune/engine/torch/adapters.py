"""PEFT adapters on a model in torch: read once, switched and scaled without reading them again.

LoRA's changes add up and can be scaled; of other kinds one may be on, as it was trained. A kind that PEFT does not know
is added to `READERS` by the module that has it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetune.engine.protocol import LoraSpec
from edgetune.engine.torch.bottlenecks import KINDS, BottleneckModel, read_bottlenecks
from edgetune.engine.torch.loading import load_checkpoint, quantize_int8, translated
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError, UsageError

AdapterSet = tuple[tuple[Path, float], ...]
"""Adapters that are on: directory and scale of each."""
READERS: dict[str, Callable[[Any, Path, str], Any]] = dict.fromkeys(KINDS, read_bottlenecks)
"""`peft_type` → (model, directory, name) → the model with that adapter; for kinds that PEFT does not have."""

_LOST = "missing adapter keys"
_IN_FRONT = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")


class PeftAdapters:
    """The adapters of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        """The model with the adapters read so far."""
        self.is_quantized = False
        """Whether its linear layers are in 8 bits."""
        self._names: dict[Path, str] = {}
        self._configs: dict[Path, dict[str, Any]] = {}
        self._scalings: dict[tuple[str, str], float] = {}
        self._applied: AdapterSet = ()

    @property
    def known(self) -> tuple[Path, ...]:
        """The directories read so far."""
        return tuple(self._names)

    def load(self, adapters: Sequence[LoraSpec]) -> AdapterSet:
        """Read what is not read yet; returns the active ones with their scales.

        Raises `UsageError`, `MismatchError`, `UnsupportedError`, `CorruptFileError`.
        """
        active = tuple((one.path.resolve(), one.scale) for one in adapters if one.scale)
        for path, _ in active:
            if path not in self._names:
                self._read(path)
        self._check_together(active)
        return active

    def apply(self, active: AdapterSet) -> None:
        """Let the next evaluation run under these adapters."""
        if active == self._applied or not self._names:
            return
        base = self.model.base_model
        if not active:
            base.disable_adapter_layers()
        else:
            base.enable_adapter_layers()
            names = [self._names[path] for path, _ in active]
            base.set_adapter(names if len(names) > 1 else names[0])
            for (path, scale), name in zip(active, names, strict=True):
                if self._is_lora(path):
                    self._scale(name, scale)
        self._applied = active

    def _read(self, path: Path) -> None:
        config = _read_config(path)
        kind, name = str(config.get("peft_type")), f"adapter{len(self._names)}"
        if kind in _IN_FRONT:
            # PEFT puts them in front of every piece of a text that is handed over token by token.
            raise UnsupportedError(
                f"{path} puts trained vectors in front of the text, which this engine does not.",
                hint="Run it with PEFT itself: its generate() does.",
            )
        with translated(f"The adapter {path} does not fit the model"), warnings.catch_warnings(record=True) as said:
            # Python shows at its end what the filters asked last let through: here, what PEFT says and nothing else.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", f"(?s).*{_LOST}")
            self.model = READERS.get(kind, read_with_peft)(self.model, path, name)
        lost = next((str(one.message) for one in said if _LOST in str(one.message)), "")
        if lost:
            raise MismatchError(f"{path} lacks weights for modules of this model.", hint="Is it of another base?")
        self._names[path], self._configs[path] = name, config
        self.model.eval()
        for module_name, module in self.model.named_modules():
            # Attention modules have a number of this name.
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and name in scaling:
                self._scalings[module_name, name] = scaling[name]
        # PEFT switches a new one on by itself.
        self._applied = ((path, 1.0),)

    def _scale(self, name: str, scale: float) -> None:
        for module_name, module in self.model.named_modules():
            if (module_name, name) in self._scalings:
                module.scaling[name] = self._scalings[module_name, name] * scale

    def _is_lora(self, path: Path) -> bool:
        return self._configs[path].get("peft_type") == "LORA"

    def _check_together(self, active: AdapterSet) -> None:
        for path, scale in active:
            whole = self._configs[path].get("modules_to_save")
            if scale != 1 and (whole or not self._is_lora(path)):
                what = "holds whole modules" if whole else f"is of kind {self._configs[path].get('peft_type')}"
                raise UnsupportedError(f"{path} {what}, which cannot be scaled by {scale:g}.", hint="Use 1, or 0.")
            if len(active) > 1 and (whole or not self._is_lora(path)):
                raise UnsupportedError(f"{path} cannot be on together with another adapter.", hint="Give one of them.")


def in_int8(path: Path, adapters: PeftAdapters, wanted: Sequence[LoraSpec]) -> PeftAdapters:
    """The model loaded from `path` with its linear layers in 8 bits, the adapters read so far and those `wanted` on it.

    PEFT can put none on such layers: for a new adapter the model is read again, and quantized with all of them.
    """
    known = adapters.known
    new = [one.path for one in wanted if one.scale and one.path.resolve() not in known]
    if adapters.is_quantized and not new:
        return adapters
    fresh = load_checkpoint(path, dtype="int8", device="cpu") if adapters.is_quantized else adapters.model
    whole = PeftAdapters(fresh)
    for one in (*known, *new):
        whole.load([LoraSpec(one)])
    whole.model, whole.is_quantized = quantize_int8(whole.model), True
    return whole


def read_with_peft(model: Any, path: Path, name: str) -> Any:
    """`model` with PEFT's adapter in `path` on it, called `name`."""
    import peft

    if isinstance(model, BottleneckModel):
        raise UnsupportedError(f"{path} cannot be read beside bottleneck adapters.", hint="Give one of them.")
    device = str(next(model.parameters()).device)
    if isinstance(model, peft.PeftModel):
        model.load_adapter(str(path), adapter_name=name, torch_device=device)
        return model
    return peft.PeftModel.from_pretrained(model, str(path), adapter_name=name, torch_device=device)


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        raise UsageError(
            f"{path} is a file; a model in torch takes the adapter's directory.", hint="Give the run it was made from."
        )
    config_path = path / "adapter_config.json"
    if not config_path.is_file():
        raise UsageError(f"{path} is no adapter: it has no adapter_config.json.", hint="Give a run's directory.")
    if not (path / "adapter_model.safetensors").is_file():
        raise UnsupportedError(f"{path} has no adapter_model.safetensors; other files may hold code.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{config_path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{config_path} holds no object.")
    return config
