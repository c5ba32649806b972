"""A base split over the processes of a run (FSDP): each keeps its share of every layer and fetches the rest to run it.

torch's `fully_shard` does the work, layer by layer; this says what is split: the frozen weights of the layers. What is
trained stays whole everywhere, small as it is, and so do embeddings and heads, which are read outside their layers. So
gradients, optimizer, checkpoints and files are those of processes that hold everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


def split_layers(adapted: Any, device: torch.device) -> None:
    """Split the layers of `adapted` over all processes; what is left of it, whole, goes to `device`.

    Every forward and backward pass is then one that all processes take together.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = {parameter for parameter in adapted.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for stack, layers in find_stacks(adapted):
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=trained)
        # The stack holds nothing of its own: it is what makes its layers fetch ahead of each other.
        fully_shard(stack, mesh=mesh, ignored_params=set(stack.parameters()))
    adapted.to(device)


def check_splittable(adapted: Any, model_dir: Path, method: str) -> None:
    """Raise `UnsupportedError` for a base and a method of which there is nothing to split; needs no weights."""
    if model_dir.is_file():
        raise UnsupportedError(
            f"{model_dir} keeps its weights in blocks, which --fsdp does not split.",
            hint="Leave out --fsdp, or give the directory that the file was made from with -m.",
        )
    if not layers_share(adapted):
        raise UnsupportedError(
            f"--fsdp splits frozen layers, and --method {method} leaves none in this model.",
            hint="Leave out --fsdp, or use --method lora.",
        )


def layers_share(adapted: Any) -> float:
    """The share of the frozen weights that is split, from 0 to 1."""
    frozen = {parameter for parameter in adapted.parameters() if not parameter.requires_grad}
    split = {p for _, layers in find_stacks(adapted) for layer in layers for p in layer.parameters()} & frozen
    whole = sum(int(p.numel()) for p in frozen)
    return sum(int(p.numel()) for p in split) / max(1, whole)


def find_stacks(adapted: Any) -> list[tuple[Any, list[Any]]]:
    """Modules that run lists of layers, and those layers, by the classes that transformers says not to cut through."""
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = []
    for stack in base.modules():
        layers = [
            layer
            for child in stack.children()
            if type(child).__name__ == "ModuleList"
            for layer in child
            if type(layer).__name__ in names
        ]
        if layers:
            found.append((stack, layers))
    return found
