"""Head and cross entropy in one autograd node: a few hundred tokens at a time, the gradient formed in the forward pass.

At a vocabulary of 152 k the logits of a step are its largest tensor by far, and softmax and its gradient two more of
that size. Here they exist for one chunk of learned tokens only; what remains is the gradient with respect to the hidden
states and to what of the head is trained (LoRA on it, or the whole head), both summed in f32.

A head in a GGUF file's blocks never exists as a whole: `fused_loss_blocks` goes over the vocabulary instead.

Heads that soft-cap or scale their logits are computed as the model does. Whether this is the model's own head is not
believed but compared, once (`find_head`); where it is not, the loss is computed from the model's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from edgetune.training.fused_lora import is_plain_linear

if TYPE_CHECKING:
    import torch

CHUNK = 256
"""Tokens whose logits exist at the same time. More do not multiply faster, and take more memory."""

_STEP = 64
"""The last chunk is filled up to a multiple of this: on the CPU, kernels are compiled and kept for every shape."""

_ROWS = 16
"""Tokens whose softmax is computed at once on a CPU, in f32: what fits into its caches."""

_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Of the largest logit: two ways to the same logits differ by rounding alone."""


@dataclass(frozen=True)
class FusedHead:
    """How a model gets from its last hidden states to logits: cap·tanh(scale·(W·h + b) / cap)."""

    body: Any
    """The model without its head: input → last hidden states."""
    module: Any
    """The head: a linear layer, or PEFT's wrapper around one."""
    scale: float = 1.0
    cap: float = 0.0
    """0: not capped."""

    def summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The summed cross entropy of `hidden` (tokens, hidden) for the tokens `labels` (tokens,), in f32."""
        import torch

        if (layer := _in_blocks(self.module)) is not None:
            from edgetune.training.fused_loss_blocks import summed_loss

            dtype = _compute_dtype(hidden, layer.dtype)
            return summed_loss(hidden, labels, layer, scale=self.scale, cap=self.cap, dtype=dtype)
        weight, bias, a, b, lora_scale = _head_parts(self.module)
        options = (self.scale, self.cap, lora_scale, torch.is_grad_enabled())
        loss: torch.Tensor = _function()(hidden, labels, weight, bias, a, b, *options)
        return loss


_heads: WeakKeyDictionary[Any, FusedHead | None] = WeakKeyDictionary()


def find_head(model: Any) -> FusedHead | None:
    """The head of `model` for the fused loss, or None when it computes something else. Looked up once a model."""
    if model not in _heads:
        _heads[model] = _find(model)
    return _heads[model]


def has_known_head(model: Any) -> bool:
    """Whether `find_head` is going to look at the head of `model`, which may be without its numbers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = base.get_output_embeddings()
    return module is not None and base.base_model is not base and _is_known(module) and not _has_prompt(model)


def _find(model: Any) -> FusedHead | None:
    if not has_known_head(model):
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module, body = base.get_output_embeddings(), base.base_model
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    head = FusedHead(body, module, scale, cap)
    return head if _is_equal(model, head) else None


def _has_prompt(model: Any) -> bool:
    """Whether PEFT puts tokens of its own in front, which only the whole model's forward does."""
    configs = getattr(model, "peft_config", {})
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def _is_known(module: Any) -> bool:
    import torch
    from peft.tuners.lora.layer import Linear
    from peft.utils import ModulesToSaveWrapper

    if type(module) is ModulesToSaveWrapper:
        return type(_trained_copy(module)) is torch.nn.Linear
    if type(module) is Linear:
        name, *others = module.active_adapters
        return (
            not others
            and name in module.lora_A
            and name not in module.lora_variant
            and not module.lora_bias[name]
            and isinstance(module.lora_dropout[name], torch.nn.Identity)
            and is_plain_linear(module.get_base_layer())
        )
    return is_plain_linear(module)


def _in_blocks(module: Any) -> Any:
    """The head's layer where that lies in a GGUF file's blocks and nothing is put on it; else None."""
    layer = module.get_base_layer() if hasattr(module, "lora_A") and module.disable_adapters else module
    return layer if hasattr(layer, "blocks") and not hasattr(layer, "lora_A") else None


def _trained_copy(wrapper: Any) -> Any:
    (name,) = wrapper.active_adapters
    return wrapper.modules_to_save[name]


def _head_parts(module: Any) -> tuple[Any, Any, Any, Any, float]:
    """Weight, bias, LoRA's A and B, and its scale, as they are now: an adapter may be switched off for a while."""
    if hasattr(module, "modules_to_save"):
        module = module.original_module if module.disable_adapters else _trained_copy(module)
    if not hasattr(module, "lora_A"):
        return module.weight, module.bias, None, None, 0.0
    base = module.get_base_layer()
    if module.disable_adapters or module.merged:
        return base.weight, base.bias, None, None, 0.0
    name = module.active_adapters[0]
    return base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def _is_equal(model: Any, head: FusedHead) -> bool:
    """Whether `head` gives the logits that the model gives, on a few tokens spread over the vocabulary."""
    import torch

    device = next(model.parameters()).device
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    ids = torch.linspace(0, config.vocab_size - 1, 7, device=device).long()[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _autocast(head):
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = head.body(input_ids=ids, use_cache=False).last_hidden_state[0]
            if (layer := _in_blocks(head.module)) is not None:
                dtype, ours = layer.dtype, layer(hidden)
            else:
                weight, *parts = _head_parts(head.module)
                dtype, ours = weight.dtype, _logits(hidden.to(_compute_dtype(hidden, weight.dtype)), weight, *parts)
            ours, _ = _transform(ours.float(), head.scale, head.cap)
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(training)
    if ours.shape != theirs.shape:
        return False
    tolerance = _TOLERANCE.get(str(dtype).removeprefix("torch."), 0.0)
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _autocast(head: FusedHead) -> Any:
    import torch

    parameters = list(head.body.parameters())
    enabled = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    return torch.autocast(parameters[0].device.type, dtype=torch.bfloat16, enabled=enabled)


def _compute_dtype(hidden: torch.Tensor, stored: torch.dtype) -> torch.dtype:
    """Heads trained in f32 on a bf16 base multiply in bf16, like the rest of it, and so do models trained whole."""
    import torch

    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype if hidden.dtype.itemsize < stored.itemsize else stored


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    lora_scale: float,
) -> torch.Tensor:
    """(tokens, hidden) → (tokens, vocabulary), before scale and cap."""
    import torch

    dtype = hidden.dtype
    out = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    if a is not None and b is not None:
        out.addmm_(hidden @ a.to(dtype).t(), b.to(dtype).t(), alpha=lora_scale)
    return out


def _transform(logits: torch.Tensor, scale: float, cap: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled and capped logits, in place, and tanh of them where they are capped: its slope is 1 - tanh²."""
    if scale != 1.0:
        logits.mul_(scale)
    if not cap:
        return logits, None
    tanh = logits.div_(cap).tanh_()
    return tanh * cap, tanh


def _softmax_gradient(
    logits: torch.Tensor, labels: torch.Tensor, *, scale: float, cap: float, block: torch.Tensor
) -> torch.Tensor:
    """The summed loss of `logits` (tokens, vocabulary), which become the loss's gradient with respect to themselves.

    Rows without a label are filling: their gradient is 0. `block` is f32 scratch of (rows, vocabulary); softmax is
    computed in it, a few rows at a time.
    """
    total = logits.new_zeros((), dtype=block.dtype)
    logits[len(labels) :] = 0
    for at in range(0, len(labels), len(block)):
        wanted = labels[at : at + len(block), None]
        part = logits[at : at + len(wanted)]
        values = block[: len(part)].copy_(part)
        values, tanh = _transform(values, scale, cap)
        values -= values.amax(dim=1, keepdim=True)
        chosen = values.gather(1, wanted)
        sums = values.exp_().sum(dim=1, keepdim=True)
        total += (sums.log() - chosen).sum()
        values /= sums
        values.scatter_add_(1, wanted, values.new_full(wanted.shape, -1.0))
        if tanh is not None:
            values *= 1 - tanh * tanh
        if scale != 1.0:
            values *= scale
        part.copy_(values)
    return total


@cache
def _function() -> Any:
    """The node's `apply`. Defined late because its base class is torch's."""
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        """hidden (tokens, hidden), labels (tokens,), weight (vocabulary, hidden)."""

        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            labels: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            a: torch.Tensor | None,
            b: torch.Tensor | None,
            scale: float,
            cap: float,
            lora_scale: float,
            with_gradient: bool,
        ) -> torch.Tensor:
            wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:6]]
            dtype = _compute_dtype(hidden, weight.dtype)
            rows = torch.nn.functional.pad(hidden.detach().to(dtype), (0, 0, 0, -len(hidden) % _STEP))
            matrix = weight.detach().to(dtype)
            sums = _Sums.zeros(wanted, rows, weight, bias, a, b)
            block_rows = _ROWS if rows.device.type == "cpu" else CHUNK
            block = torch.empty(block_rows, len(weight), dtype=torch.float32, device=rows.device)
            total = torch.zeros((), dtype=torch.float32, device=rows.device)
            for at in range(0, len(rows), CHUNK):
                part = rows[at : at + CHUNK]
                logits, wanted_tokens = _logits(part, matrix, bias, a, b, lora_scale), labels[at : at + CHUNK]
                total += _softmax_gradient(logits, wanted_tokens, scale=scale, cap=cap, block=block)
                if any(wanted):
                    sums.add(at, part, logits, matrix, a, b, lora_scale)
            ctx.sums, ctx.tokens = sums, len(hidden)
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias, a, b)]
            return total

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            sums = ctx.sums
            ctx.sums = None
            assert sums is not None, "the gradient is formed once"
            hidden, *rest = (
                None if tensor is None else tensor.mul_(grad).to(dtype)
                for tensor, dtype in zip(sums.tensors(), ctx.dtypes, strict=True)
            )
            return None if hidden is None else hidden[: ctx.tokens], None, *rest, None, None, None, None

    return LinearCrossEntropy.apply


@dataclass
class _Sums:
    """Gradients so far; None where nobody asked."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None

    @classmethod
    def zeros(cls, wanted: list[bool], rows: torch.Tensor, *parameters: torch.Tensor | None) -> _Sums:
        """Of `wanted` for (hidden, labels, weight, bias, A, B); every hidden state belongs to one chunk alone."""
        import torch

        hidden = torch.empty_like(rows) if wanted[0] else None
        rest = [
            torch.zeros_like(tensor, dtype=torch.float32) if asked and tensor is not None else None
            for asked, tensor in zip(wanted[2:], parameters, strict=True)
        ]
        return cls(hidden, *rest)

    def tensors(self) -> list[torch.Tensor | None]:
        """In the order of the node's inputs, labels left out."""
        return [self.hidden, self.weight, self.bias, self.a, self.b]

    def add(
        self,
        at: int,
        part: torch.Tensor,
        grad: torch.Tensor,
        matrix: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        lora_scale: float,
    ) -> None:
        """Add what the chunk `part` (tokens, hidden), whose logits have the gradient `grad`, contributes."""
        import torch

        low_grad = None
        if a is not None and b is not None:
            low_grad = (grad @ b.to(grad.dtype)).mul_(lora_scale)  # (tokens, rank)
        if self.hidden is not None:
            into = self.hidden[at : at + len(part)]
            torch.mm(grad, matrix, out=into)
            if a is not None and low_grad is not None:
                into.addmm_(low_grad, a.to(grad.dtype))
        if self.weight is not None:
            self.weight += grad.t() @ part
        if self.bias is not None:
            self.bias += grad.sum(dim=0, dtype=torch.float32)
        if self.a is not None and low_grad is not None:
            self.a += low_grad.t() @ part
        if self.b is not None and a is not None:
            self.b.add_(grad.t() @ (part @ a.to(grad.dtype).t()), alpha=lora_scale)
