"""Trains pocket: equal workers, each a process on one core, share the weights and split every step's conversations.

Matrices inside the layers are trained with Muon, the rest with AdamW; each worker updates its share of the parameters.
Budgeted in steps, never in time, so that the same seed gives the same model however busy the machine is. Everything is
learned in one pass over a stream that never repeats. A run that was stopped goes on from its last kept state.

Muon: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); written from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from models.pocket.generate import Message, conversations
from models.pocket.network import Network, Shape


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    steps: int = 3000
    tokens_per_step: int = 4000
    """Over all workers."""
    workers: int = 2
    seed: int = 0
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    warm_up: int = 40
    decay_steps: int = 1500
    """Steps, at the end, over which the rates fall to zero."""
    prompt_weight: float = 0.1
    """What a token of the user or of the template counts in the loss, against 1 for what the assistant says."""
    save_every: int = 100

    def rate(self, step: int) -> float:
        """The factor on both learning rates at `step`: up, level, down to zero."""
        return min(1.0, (step + 1) / self.warm_up, (self.steps - step) / self.decay_steps)


def train(directory: Path, plan: Plan, *, shape: Shape) -> None:
    """Train and write the configuration and the weights into `directory`, which has the tokenizer.

    Goes on where a stopped run of this plan was.
    """
    torch.manual_seed(plan.seed)
    network = Network(shape).share_memory()
    size = sum(parameter.numel() for parameter in network.parameters())
    gradients = torch.zeros(plan.workers, size).share_memory_()  # type: ignore[no-untyped-call]
    # A row a worker: weighted loss, weight, tokens.
    totals = torch.zeros(plan.workers, 3).share_memory_()  # type: ignore[no-untyped-call]
    barrier = get_context("spawn").Barrier(plan.workers)
    spawn(_work, (directory, plan, shape, network, gradients, totals, barrier), nprocs=plan.workers)  # type: ignore[no-untyped-call]


def save(directory: Path, network: Network, shape: Shape) -> None:
    """Write the weights in bf16 with the configuration, under the names transformers gives a Llama."""
    weights = {name: value.detach().bfloat16().contiguous() for name, value in network.state_dict().items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
        "max_position_embeddings": shape.positions, "rope_theta": shape.rope_theta, "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "do_sample": False}
    temporary = directory / "model.safetensors.part"
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _work(
    rank: int,
    directory: Path,
    plan: Plan,
    shape: Shape,
    network: Network,
    gradients: Tensor,
    totals: Tensor,
    barrier: Any,
) -> None:
    torch.set_num_threads(1)
    batches = iter_batches(Tokenizer.from_file(str(directory / "tokenizer.json")), plan, rank)
    optimizer = _Optimizer(network, plan, rank)
    started, seen, first = time.time(), 0.0, 0
    state_path = directory / f"state-{rank}.pt"
    if state_path.is_file():
        first = optimizer.load(torch.load(state_path))
        barrier.wait()
        next(islice(batches, first - 1, first), None)
    for step in range(first, plan.steps):
        totals[rank] = _accumulate(network, next(batches), gradients[rank])
        barrier.wait()
        loss, weight, tokens = totals.sum(0).tolist()
        optimizer.step(gradients.sum(0), 1 / weight, plan.rate(step))
        barrier.wait()
        seen += tokens
        if rank == 0 and (step + 1) % 25 == 0:
            speed = seen / (time.time() - started)
            print(
                f"step {step + 1}/{plan.steps} loss {loss / weight:.4f} tokens {seen / 1e6:.2f} M {speed:.0f}/s",
                flush=True,
            )
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            optimizer.save(state_path)
            if rank == 0:
                save(directory, network, shape)


def _accumulate(network: Network, batch: list[tuple[Tensor, Tensor]], into: Tensor) -> Tensor:
    """Add up the gradients of one worker's share of a step in `into`; returns (loss, weight, tokens)."""
    network.zero_grad(set_to_none=True)
    totals = torch.zeros(3)
    for ids, weights in batch:
        loss = network.loss(ids[:, :-1], ids[:, 1:], weights[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        totals += torch.tensor([loss.item(), weights[:, 1:].sum().item(), (weights > 0).sum().item()])
    grads = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
    torch.cat(grads, out=into)
    return totals


def iter_batches(tokenizer: Tokenizer, plan: Plan, rank: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One worker's share of each step: a few pairs of ids and weights, (conversations, length), of near lengths."""
    stream = conversations(f"{plan.seed} {rank}")
    rows: list[tuple[list[int], list[float]]] = []
    while True:
        tokens = 0
        while tokens < plan.tokens_per_step / plan.workers:
            chunk = [encode(tokenizer, messages, prompt_weight=plan.prompt_weight) for messages in islice(stream, 8)]
            tokens += sum(len(ids) for ids, _ in chunk)
            rows += chunk
        yield list(_padded(sorted(rows, key=lambda row: len(row[0]))))
        rows = []


def _padded(rows: list[tuple[list[int], list[float]]], most: int = 1280) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    while start < len(rows):
        end = start + 1
        # Padding is wasted work: stop where the next row is much longer than the first.
        while (
            end < len(rows)
            and len(rows[end][0]) * (end + 1 - start) <= most
            and len(rows[end][0]) <= 1.35 * len(rows[start][0])
        ):
            end += 1
        width = len(rows[end - 1][0])
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows[start:end]])
        weights = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows[start:end]])
        yield ids, weights
        start = end


def encode(tokenizer: Tokenizer, messages: list[Message], *, prompt_weight: float) -> tuple[list[int], list[float]]:
    """Token ids of a conversation in ChatML, and what each counts in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        head = tokenizer.encode(f"<|im_start|>{message['role']}\n").ids
        body = tokenizer.encode(f"{message['content']}<|im_end|>").ids
        end = tokenizer.encode("\n").ids
        ids += head + body + end
        body_weight = 1.0 if message["role"] == "assistant" else prompt_weight
        weights += [prompt_weight] * len(head) + [body_weight] * len(body) + [prompt_weight] * len(end)
    return ids, weights


class _Optimizer:
    """Muon for matrices inside the layers, AdamW for the rest, on every `workers`-th parameter."""

    def __init__(self, network: Network, plan: Plan, rank: int) -> None:
        self.plan, self.count = plan, 0
        self.mine: list[tuple[torch.nn.Parameter, int, bool, list[Tensor]]] = []
        offset, turn = 0, {True: 0, False: 0}
        for name, parameter in network.named_parameters():
            inner = parameter.ndim == 2 and ".layers." in name
            if turn[inner] % plan.workers == rank:
                state = [torch.zeros_like(parameter.data) for _ in range(1 if inner else 2)]
                self.mine.append((parameter, offset, inner, state))
            turn[inner] += 1
            offset += parameter.numel()

    def save(self, path: Path) -> None:
        """Keep the state of this worker's parameters, to go on from after an interruption."""
        torch.save((self.count, [(parameter.data, state) for parameter, _, _, state in self.mine]), path)

    @torch.no_grad()
    def load(self, state: Any) -> int:
        """Take up a state that `save` kept; returns the steps done."""
        self.count, kept = state
        for (parameter, _, _, mine), (value, moments) in zip(self.mine, kept, strict=True):
            parameter.copy_(value)
            for moment, saved in zip(mine, moments, strict=True):
                moment.copy_(saved)
        return int(self.count)

    @torch.no_grad()
    def step(self, flat: Tensor, scale: float, rate: float) -> None:
        """Update this worker's parameters from the flat gradient of all, times `scale`, at `rate` of the full speed."""
        self.count += 1
        for parameter, offset, inner, state in self.mine:
            gradient = flat[offset : offset + parameter.numel()].view_as(parameter) * scale
            if inner:
                momentum = state[0].lerp_(gradient, 0.05)
                update = orthogonalized(gradient.lerp(momentum, 0.95))
                gain = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.sub_(update, alpha=self.plan.muon_rate * rate * gain)
            else:
                first, second = state[0].lerp_(gradient, 0.1), state[1].lerp_(gradient.square(), 0.02)
                first, second = first / (1 - 0.9**self.count), second / (1 - 0.98**self.count)
                parameter.addcdiv_(first, second.sqrt() + 1e-10, value=-self.plan.adam_rate * rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with all singular values near 1, by five Newton-Schulz steps in bf16."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    if wide := x.shape[0] < x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x.T @ x
        x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
    out: Tensor = (x.T if wide else x).float()
    return out
