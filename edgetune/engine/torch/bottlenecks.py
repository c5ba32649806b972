"""Bottleneck adapters in torch: small layers after attention and after the feed-forward, where residuals are added.

h + up(gelu(down(h))), as in Houlsby et al. 2019 (arXiv:1902.00751), who train the layer norms as well, and in Pfeiffer
et al. 2020 (arXiv:2005.00247), who have them after the feed-forward alone. Read and written as adapter_config.json and
adapter_model.safetensors; no other format holds them. Training puts them on with `add_bottlenecks`; the engine reads
them with `read_bottlenecks`. Does not merge: between two layers stands a nonlinearity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import CorruptFileError, UnsupportedError

if TYPE_CHECKING:
    import torch

KINDS = ("HOULSBY", "PFEIFFER")
"""`peft_type` of these adapters."""

_ATTENTION = (
    r"(layer\.\d\.)?(self_attn|encoder_attn|attn|attention|self_attention|SelfAttention|EncDecAttention|attention\.self|"
    r"attention\.output|crossattention\.output)\.(o_proj|out_proj|c_proj|dense|Wo|out_lin|o)"
)
_FEED_FORWARD = (
    r"((mlp|feed_forward)\.(down_proj|c_proj|fc2|Wo|dense_4h_to_h)|ffn\.lin2|layer\.\d\.DenseReluDense\.wo|"
    r"output\.dense|fc2)"
)
_MIXTURE = r"(mlp|block_sparse_moe|feed_forward)"
"""A feed-forward of experts is adapted as a whole."""
_LAYER = r"(?P<layer>(?:.*?\.)?\d+)\."


def add_bottlenecks(model: Any, config: Mapping[str, Any], *, name: str = "default") -> None:
    """Put fresh adapters on `model` as `config` says (adapter_config.json), called `name` and switched on.

    Raises `UnsupportedError` for a model whose sub-layers are not known.
    """
    import torch

    parameter = next(model.parameters())
    for place in find_places(model, config["places"]):
        module = model.get_submodule(place)
        width = _width(module, model)
        if not hasattr(module, "bottleneck"):
            module.bottleneck = torch.nn.ModuleDict()
            module.register_forward_hook(_after)
        module.bottleneck[name] = _bottleneck(width, int(config["bottleneck"])).to(parameter.device)
    switch(model, name)


def find_places(model: Any, places: Sequence[str]) -> list[str]:
    """The modules of `model` whose outputs are adapted: the last of the sub-layers named in `places`."""
    found: dict[str, dict[str, list[str]]] = {"attention": {}, "feed_forward": {}}
    for name, module in model.named_modules():
        mixture = hasattr(module, "experts")
        patterns = {"attention": _ATTENTION, "feed_forward": _MIXTURE if mixture else _FEED_FORWARD}
        for place, pattern in patterns.items():
            if match := re.fullmatch(_LAYER + pattern, name):
                found[place].setdefault(match["layer"], []).append(name)
                break
    if not found["attention"] or set(found["attention"]) != set(found["feed_forward"]):
        raise UnsupportedError(
            f"Where attention and feed-forward end in a {type(model).__name__} is not known.",
            hint="Use --method lora, which fits every linear layer.",
        )
    return [name for place in places for names in found[place].values() for name in names]


def trained_parameters(model: Any, config: Mapping[str, Any], *, name: str = "default") -> dict[str, Any]:
    """What an adapter consists of, by the names it is saved under: bottlenecks, layer norms, whole modules."""
    own = {
        key.replace(f".bottleneck.{name}.", ".bottleneck."): parameter
        for key, parameter in model.named_parameters()
        if f".bottleneck.{name}." in key
    }
    return {**own, **whole_parameters(model, config)}


def whole_parameters(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The base's own parameters that the adapter has values for."""
    found: dict[str, Any] = {}
    modules = tuple(config.get("modules_to_save") or ())
    for name, module in model.named_modules():
        norm = config["layer_norms"] and "Norm" in type(module).__name__
        if norm or any(name == one or name.endswith(f".{one}") for one in modules):
            found |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    return found


def switch(model: Any, name: str | None) -> None:
    """Let the adapter `name` act, or none."""
    for module in model.modules():
        if hasattr(module, "bottleneck"):
            module.bottleneck.active = name


class BottleneckModel:
    """A transformers model with such adapters read onto it; what PEFT's model is to the engine."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._values: dict[str | None, dict[str, torch.Tensor]] = {None: {}}
        self._active: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def base_model(self) -> BottleneckModel:
        """Itself: it is what switches adapters."""
        return self

    def get_base_model(self) -> Any:
        """The transformers model."""
        return self._model

    def read(self, path: Path, config: Mapping[str, Any], name: str) -> None:
        """Read the adapter in `path` and switch it on. Raises `CorruptFileError`."""
        import safetensors.torch

        tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
        self.set_adapter(None)
        add_bottlenecks(self._model, config, name=name)
        wanted = trained_parameters(self._model, config, name=name)
        _check_tensors(path, tensors, wanted)
        whole = whole_parameters(self._model, config)
        dtype = next(parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point())
        for key, parameter in wanted.items():
            if key in whole:
                self._values[None].setdefault(key, parameter.data.clone())
            else:
                parameter.data = tensors[key].to(parameter.device, dtype)
        self._values[name] = {key: tensors[key].to(p.device, p.dtype) for key, p in whole.items()}
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        """Let one adapter act, or none."""
        parameters = dict(self._model.named_parameters())
        for key, value in {**self._values[None], **self._values[name]}.items():
            parameters[key].data = value
        switch(self._model, name)

    def disable_adapter_layers(self) -> None:
        """Let none act."""
        self.set_adapter(None)

    def enable_adapter_layers(self) -> None:
        """Nothing: `set_adapter` follows."""


def read_bottlenecks(model: Any, path: Path, name: str) -> Any:
    """`model` with the adapter in `path` on it, called `name`.

    Raises `UnsupportedError` beside adapters of other kinds, `CorruptFileError` for tensors that are not its config's.
    """
    config = read_bottleneck_config(path)
    if hasattr(model, "peft_config"):
        raise UnsupportedError(f"{path} cannot be read beside PEFT's adapters.", hint="Give one of them.")
    wrapped = model if isinstance(model, BottleneckModel) else BottleneckModel(model)
    wrapped.read(path, config, name)
    return wrapped


def read_bottleneck_config(path: Path) -> dict[str, Any]:
    """The adapter_config.json in `path`. Raises `CorruptFileError`."""
    config_path = path / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
        width, places = config["bottleneck"], config["places"]
        if type(width) is not int or width < 1 or not set(places) <= {"attention", "feed_forward"} or not places:
            raise ValueError(f"bottleneck {width!r} at {places!r}")
        config["layer_norms"] = bool(config["layer_norms"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{config_path} is not a bottleneck adapter's: {error}.") from error
    return config


def _check_tensors(path: Path, tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if odd := sorted(set(tensors) ^ set(wanted)):
        lacks = odd[0] in wanted
        raise CorruptFileError(
            f"{path} {'lacks' if lacks else 'has'} {odd[0]}, which this model {'has' if lacks else 'lacks'}.",
            hint="Is it of another base?",
        )
    if wrong := next((key for key in sorted(wanted) if wanted[key].shape != tensors[key].shape), None):
        raise CorruptFileError(f"{path} has {wrong} in another size than this model.", hint="Is it of another base?")


def _after(module: Any, args: Any, output: Any) -> Any:
    active = getattr(module.bottleneck, "active", None)
    if active is None:
        return output
    adapter = module.bottleneck[active]
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _width(module: Any, model: Any) -> int:
    """How many numbers the output of `module` has for a token."""
    for name in ("out_features", "nf"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return int(model.config.get_text_config().hidden_size)


def _bottleneck(width: int, inner: int) -> Any:
    """down: (width → inner), up: (inner → width), near the identity: weights of 0.01, biases 0."""
    import torch

    class Bottleneck(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
            for layer in (self.down, self.up):
                torch.nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                torch.nn.init.zeros_(layer.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.nn.functional.gelu(self.down(x.to(self.down.weight.dtype)))
            return x + self.up(inner).to(x.dtype)  # type: ignore[no-any-return]

    return Bottleneck()
