"""A prompt through a GGUF decoder, in llama.cpp itself: what every block does, with the very weights that serve it.

Hidden states and attention are read out of llama.cpp's own graph (`engine.tap`); what the head would say of them is
computed by `lens` from the same file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import Candidate, LoraSpec
from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_writes_text
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Progress, Sink, ignore
from edgetune.explain.anatomy import read_anatomy
from edgetune.explain.filters import entropy, iter_filters, softmax
from edgetune.explain.lens import Lens, LensError, divergence
from edgetune.explain.page import BlockRun, Explanation, Guess, Lensed, Option, Run, StackRun, Step, Token
from edgetune.gguf_header import read_gguf_header

MOST_TOKENS = 512
"""A longer prompt is refused: nobody looks at that many, and attention takes their square in memory."""

MOST_GUESSED = 64
"""Positions from the end for which the guesses after every block are made."""

_TOP = 10
_EMBEDDED = ("inp_scaled", "inpL", "embd", "inp_embd")
_LAYERED = ("kq_soft_max", "ffn_inp", "sa_out", "l_out")

States = NDArray[np.float32]


@dataclass
class _Seen:
    """What the graph computed for one prompt; tokens come in pieces and are put together at the end."""

    length: int = 0
    pieces: dict[str, list[States]] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        kind, _, layer = name.partition("-")
        return kind in (_LAYERED if layer else _EMBEDDED)

    def take(self, name: str, values: States) -> None:
        # (1, 1, tokens, hidden), or (1, heads, tokens, cells of the cache) of attention
        kept = values[0, :, :, : self.length] if name.startswith("kq_soft_max") else values[0, 0]
        self.pieces.setdefault(name, []).append(kept.copy())

    def states(self, name: str) -> States | None:
        """(tokens, hidden); None when the graph has no such tensor."""
        pieces = self.pieces.get(name)
        return np.concatenate(pieces) if pieces and sum(map(len, pieces)) == self.length else None

    def attention(self, layer: int) -> States | None:
        """(heads, tokens, tokens)"""
        pieces = self.pieces.get(f"kq_soft_max-{layer}")
        if not pieces:
            return None
        wide = [np.pad(piece, ((0, 0), (0, 0), (0, self.length - piece.shape[-1]))) for piece in pieces]
        return np.concatenate(wide, axis=1)

    def embedded(self) -> States | None:
        """What the first block gets, (tokens, hidden)."""
        return next((found for name in _EMBEDDED if (found := self.states(name)) is not None), None)


def explain_gguf(
    path: Path,
    prompt: str,
    *,
    lora: Sequence[LoraSpec] = (),
    chat: bool = False,
    system: str = "",
    sampling: Sampling | None = None,
    steps: int = 8,
    threads: int = 0,
    gpu_layers: int = -1,
    sink: Sink = ignore,
) -> Explanation:
    """Follow `prompt` through the decoder at `path`; with `lora`, through the base and through the adapted model.

    `chat` puts it into the model's template as a user's turn. `steps` is how often the loop goes round. Raises
    `UnsupportedError` for an encoder or encoder-decoder, `UsageError` for a prompt that is empty or too long, and what
    opening the model raises.
    """
    _check_decoder(path)
    sampling = sampling or Sampling()
    if sampling.seed == RANDOM_SEED:
        sampling = replace(sampling, seed=random.randrange(1 << 31))
    ids, rendered = _encode(path, prompt, chat=chat, system=system)
    seen = _Seen()
    tap = Tap(seen.wants, seen.take)
    context = -(-(len(ids) + steps + 1) // 256) * 256
    adapters = [spec for spec in lora if spec.scale]
    sets: list[tuple[LoraSpec, ...]] = [(), tuple(adapters)] if adapters else [()]
    notes: list[str] = []
    with LlamaEngine.open(
        path, ctx_size=context, flash_attn="off", threads=threads, gpu_layers=gpu_layers, tap=tap
    ) as engine:
        run = _Runner(engine, seen, ids, sampling, steps, notes)
        runs = []
        for number, specs in enumerate(sets):
            sink(Progress("explain", number, len(sets), "runs"))
            runs.append(run(specs))
        sink(Progress("explain", len(sets), len(sets), "runs"))
    anatomy = read_anatomy(path, positions=len(ids), adapters=[spec.path for spec in adapters])
    return Explanation(
        anatomy=anatomy,
        engine="llama.cpp",
        prompt=prompt,
        rendered=rendered,
        sampling=asdict(sampling),
        runs=tuple(runs),
        notes=tuple(dict.fromkeys(notes)),
    )


def _check_decoder(path: Path) -> None:
    header = read_gguf_header(path)
    hint = "Give the Hugging Face directory it was made from: edgetune explain DIR PROMPT --engine torch"
    if header.architecture.startswith("t5"):
        raise UnsupportedError(
            f"{path} is an encoder-decoder, and from a GGUF file only decoders are explained.", hint=hint
        )
    try:
        check_writes_text(header)
    except UnsupportedError as error:
        reason = error.message.removesuffix(".")
        raise UnsupportedError(f"{reason}, and from a GGUF file only decoders are explained.", hint=hint) from error


def _encode(path: Path, prompt: str, *, chat: bool, system: str) -> tuple[list[int], str]:
    tokenizer = GgufTokenizer.open(path)
    try:
        if chat:
            template = tokenizer.chat_template
            if template is None:
                raise UsageError(f"{path} has no chat template.", hint="Leave out --chat.")
            turns = [{"role": "system", "content": system}] if system else []
            rendered = template.render([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True)
            ids, text = tokenizer.encode_rendered(rendered), rendered.text
        else:
            ids, text = tokenizer.encode(prompt), prompt
    finally:
        tokenizer.close()
    if not ids:
        raise UsageError("The prompt is empty.", hint="Give some text to follow through the model.")
    if len(ids) > MOST_TOKENS:
        raise UsageError(
            f"The prompt has {len(ids)} tokens; explain shows up to {MOST_TOKENS}.", hint="Give a shorter one."
        )
    return ids, text


class _Runner:
    """Runs the prompt under one set of adapters after the other; remembers the base's guesses to compare with."""

    def __init__(
        self, engine: LlamaEngine, seen: _Seen, ids: list[int], sampling: Sampling, steps: int, notes: list[str]
    ) -> None:
        self.engine, self.seen, self.ids, self.sampling, self.steps = engine, seen, ids, sampling, steps
        self.notes = notes
        self.base_logits: States | None = None
        """Of the base, after every block, at the last position: (blocks, vocabulary)."""

    def __call__(self, specs: tuple[LoraSpec, ...]) -> Run:
        self.engine.set_adapters(specs)
        self.seen.length = len(self.ids)
        self.seen.pieces = {}
        last = self.engine.logits(self.ids)[-1].copy()
        layers = [int(name.partition("-")[2]) for name in self.seen.pieces if name.startswith("l_out-")]
        hidden = [self.seen.states(f"l_out-{layer}") for layer in sorted(layers)]
        states = [state for state in hidden if state is not None]
        if not states:
            self.notes.append("This model's graph does not show its hidden states.")
        blocks, attention = self._blocks(states, last, specs), self._attention(len(states))
        self.seen.pieces = {}
        name = " + ".join(f"{spec.path.stem}" + (f":{spec.scale:g}" if spec.scale != 1 else "") for spec in specs)
        stack = StackRun("decoder", self._tokens(), blocks, attention)
        return Run(
            name=name or "base",
            stacks=(stack,),
            filters=tuple(iter_filters(last, self.sampling)),
            steps=self._loop(),
            entropy=entropy(last),
        )

    def _tokens(self) -> tuple[Token, ...]:
        tokenizer = self.engine.tokenizer
        embedded = self._embedded
        norms = np.linalg.norm(embedded, axis=-1).tolist() if embedded is not None else [0.0] * len(self.ids)
        pieces, control = tokenizer.pieces(self.ids), tokenizer.control_tokens
        return tuple(
            Token(token, piece, piece in control, norm)
            for token, piece, norm in zip(self.ids, pieces, norms, strict=True)
        )

    def _blocks(self, states: list[States], last: States, specs: tuple[LoraSpec, ...]) -> tuple[BlockRun, ...]:
        self._embedded = self.seen.embedded()
        guesses = self._guesses(states, last, specs)
        blocks, before = [], self._embedded
        for layer, after in enumerate(states):
            middle = self.seen.states(f"ffn_inp-{layer}")
            middle = self.seen.states(f"sa_out-{layer}") if middle is None else middle
            attention = self.seen.attention(layer)
            blocks.append(
                BlockRun(
                    norm=float(np.linalg.norm(after, axis=-1).mean()),
                    attention_share=_share(before, middle),
                    mlp_share=_share(middle, after),
                    attends_to=tuple(attention[:, -1].mean(0).tolist()) if attention is not None else (),
                    lens=guesses[layer] if guesses else Lensed(),
                )
            )
            before = after
        return tuple(blocks)

    def _guesses(self, states: list[States], last: States, specs: tuple[LoraSpec, ...]) -> list[Lensed]:
        """What the head says after every block; empty, with a note, where that cannot be known."""
        if not states:
            return []
        try:
            lens = Lens(read_gguf_header(self.engine.path), [(spec.path, spec.scale) for spec in specs])
            logits = lens.logits(np.stack([state[-1] for state in states]))
            lens.check(states[-1][-1:], last[None])
        except LensError as error:
            self.notes.append(f"Guesses inside the stack are not shown: {error}.")
            return []
        logits[-1] = last
        shown = [state[-MOST_GUESSED:] for state in states]
        best = lens.best(np.concatenate(shown)).reshape(len(states), -1)
        kl: list[float | None] = [None] * len(states)
        if specs and self.base_logits is not None:
            kl = divergence(self.base_logits, logits).tolist()
        else:
            self.base_logits = logits
        pieces = self.engine.tokenizer.pieces
        return [
            Lensed(self._top(row), tuple(pieces(tokens.tolist())), value)
            for row, tokens, value in zip(logits, best, kl, strict=True)
        ]

    def _top(self, logits: States, count: int = 5) -> tuple[Guess, ...]:
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[:count].tolist()
        pieces = self.engine.tokenizer.pieces(best)
        return tuple(Guess(token, piece, float(shares[token])) for token, piece in zip(best, pieces, strict=True))

    def _attention(self, layers: int) -> States | None:
        maps = [self.seen.attention(layer) for layer in range(layers)]
        found = [one for one in maps if one is not None]
        return np.stack(found) if found and len(found) == len(maps) else None

    def _loop(self) -> tuple[Step, ...]:
        if self.steps < 1:
            return ()
        generation = self.engine.generate(self.ids, self.sampling, max_tokens=self.steps, top=_TOP)
        for _ in generation:
            pass
        pieces = self.engine.tokenizer.pieces([choice.id for choice in generation.choices])
        steps = [
            Step(choice.id, piece, choice.probability, choice.sampled, _options(choice.alternatives))
            for choice, piece in zip(generation.choices, pieces, strict=True)
        ]
        if generation.finish_reason == "stop":
            options = self.engine.distribution(self.sampling, top=_TOP)
            end = next((one for one in options if one.id in self.engine.tokenizer.eog_ids), None)
            if end is not None:
                piece = self.engine.tokenizer.pieces([end.id])[0]
                steps.append(Step(end.id, piece, end.probability, end.sampled, _options(options), ends=True))
        return tuple(steps)


def _share(before: States | None, after: States | None) -> float | None:
    """How long what was added is, as a share of what it was added to; the mean over tokens."""
    if before is None or after is None:
        return None
    lengths = np.linalg.norm(before, axis=-1)
    return float((np.linalg.norm(after - before, axis=-1) / np.maximum(lengths, 1e-12)).mean())


def _options(candidates: Sequence[Candidate]) -> tuple[Option, ...]:
    return tuple(Option(one.id, one.text, one.probability, one.sampled) for one in candidates)
