"""PiSSA and OLoRA: LoRA that starts at the base's own directions and is saved as a plain LoRA of the original base.

PiSSA (arXiv:2404.02948) starts A and B at the largest singular values of W, OLoRA (arXiv:2406.01775) at its QR
decomposition. Both take s·B₀A₀ out of W, as PEFT does, and then nothing fits the base any more. Here W stays as it is:
an adapter of twice the rank holds [A; A₀] and [B, -B₀], of which the second halves stand still. That is the same
function, exact in any type of W (also in blocks and at 4 bits), and an adapter of W at every moment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.errors import UsageError
from edgetune.events import Sink
from edgetune.training.methods.base import Method
from edgetune.training.model import add_adapter
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task

if TYPE_CHECKING:
    import torch

_SMALL = 256
"""Weights of no more rows or columns are decomposed in full; larger ones by random projection."""

_PASSES = 8
"""Power iterations of the random projection."""


@dataclass(frozen=True)
class Principal(Method):
    """LoRA from the directions of the base's weights."""

    start: Literal["pissa", "olora"]

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """The adapter at its start, where it changes nothing."""
        if settings.weight_decay:
            raise UsageError(
                f"--weight-decay would pull {self.start} away from its start, towards a base without it.",
                hint="Leave --weight-decay away.",
            )
        adapted = add_adapter(model, _doubled(settings), model_dir, task=task, sink=sink)
        for name, layer in _layers(adapted):
            if not getattr(layer, "lora_A", None) or hasattr(layer, "parameter_name"):  # a stack of experts has that
                raise UsageError(
                    f"{self.start} starts linear layers only, and {name} is none.",
                    hint="Choose other --target-modules.",
                )
            self._begin(layer)
        return adapted

    def publish(self, adapted: Any, directory: Path, model_dir: Path) -> None:
        """With the change alone in A and B: large parts that cancel would not survive 16-bit adapter files."""
        for _, layer in _layers(adapted):
            _condense(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        self.save(adapted, directory)

    def _begin(self, layer: Any) -> None:
        import torch

        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        rank = a.shape[0] // 2
        if a.device.type != "meta":
            weight = _weight(layer)
            down, up = _principal(weight, rank, scale) if self.start == "pissa" else _orthonormal(weight, rank)
            # A weight with fewer rows or columns than the rank has fewer directions.
            missing = rank - len(down)
            down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
            a.data = torch.cat([down, down]).contiguous()
            b.data = torch.cat([up, -up], dim=1).contiguous()
        # Gradients of the second halves would move the start; AdamW leaves alone what never had one.
        a.register_hook(lambda grad: torch.cat([grad[:rank], torch.zeros_like(grad[rank:])]))
        b.register_hook(lambda grad: torch.cat([grad[:, :rank], torch.zeros_like(grad[:, rank:])], dim=1))


def _doubled(settings: TrainSettings) -> TrainSettings:
    """Twice the ranks at the same scale: alpha / rank, or alpha / sqrt(rank)."""
    factor = 2**0.5 if settings.rslora else 2
    # A pattern that names a rank alone takes the common alpha, which is doubled with the ranks.
    return replace(
        settings,
        rank=settings.rank * 2,
        alpha=settings.alpha * factor,
        rank_pattern={name: rank * 2 for name, rank in settings.rank_pattern.items()},
        alpha_pattern={name: alpha * factor for name, alpha in settings.alpha_pattern.items()},
    )


def _layers(adapted: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    return [(name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]


def _weight(layer: Any) -> torch.Tensor:
    """W (out, in) of the layer under the adapter, in f32."""
    base = layer.get_base_layer()
    weight: torch.Tensor = base.weight.detach().float()
    return weight.t() if getattr(layer, "fan_in_fan_out", False) else weight


def _principal(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) with s·BA = the largest part of W (out, in), in equal shares."""
    import torch

    if min(weight.shape) <= _SMALL:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(2 * rank + 8, *weight.shape), niter=_PASSES)
        vh = v.t()
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _orthonormal(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in), the first rows of R, and B (out, rank), the first columns of Q, of W = QR."""
    import torch

    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _condense(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same product BA from factors of equal size whose directions stand at right angles."""
    import torch

    q_b, r_b = torch.linalg.qr(b.data.double())  # (out, 2r), (2r, 2r)
    q_a, r_a = torch.linalg.qr(a.data.double().t())  # (in, 2r), (2r, 2r)
    u, s, vh = torch.linalg.svd(r_b @ r_a.t())
    root = s.sqrt()
    down, up = (root[:, None] * vh) @ q_a.t(), (q_b @ u) * root
    # Of a matrix with fewer rows or columns than twice the rank, there are fewer directions; the rest is zero.
    a.data.zero_()[: len(down)] = down.to(a.dtype)
    b.data.zero_()[:, : up.shape[1]] = up.to(b.dtype)


PISSA: Method = Principal("pissa")
OLORA: Method = Principal("olora")
