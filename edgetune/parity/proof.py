"""Next-token distributions compared and graded: a fixed bound, or one measured by noise, and the adapter's effect.

The same for decoders and for encoder-decoders; how either side is run is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgetune.artifacts import LogitsParity, ParityCheck
from edgetune.events import Notice, Sink
from edgetune.gguf_header import GgufHeader
from edgetune.parity import bounds, structure
from edgetune.parity.bounds import Logits
from edgetune.parity.distributions import Comparison, chance_kl, compare, effect_ratio
from edgetune.parity.torch_model import TorchModel, parameter_count


class Proof:
    """Both sides' distributions over the same ids, and the bound on how far they may be apart."""

    def __init__(
        self,
        base_dir: Path,
        header: GgufHeader,
        lora: GgufHeader | None,
        model: TorchModel,
        *,
        expected: Callable[[str], list[Logits]],
        found: Callable[[Path | None], list[Logits]],
        sink: Sink,
    ) -> None:
        """`expected` runs `model`, labelled for the progress; `found` runs llama.cpp, with an adapter or without."""
        self.header, self.lora, self.model, self.sink = header, lora, model, sink
        self._expected, self._found = expected, found
        self.is_moe = structure.is_moe(structure.text_config(base_dir))
        self.parameters = parameter_count(base_dir)
        self.checks: list[ParityCheck] = []
        """What was found besides the distributions."""
        self.not_checked: list[str] = []

    def run(self) -> LogitsParity:
        """Compare and grade."""
        model = self.model
        if model.dtype != "float32":
            self.sink(Notice(f"Memory does not allow float32: torch computes in {model.dtype}, a coarser reference."))
        expected = self._expected("torch")
        found = self._found(self.lora.path if self.lora else None)
        comparison = compare(expected, found)
        headers = [self.header, *([self.lora] if self.lora else [])]
        fixed = bounds.fixed_bound(bounds.coarsest_type(*headers), is_moe=self.is_moe, torch_dtype=model.dtype)
        if fixed is None or not getattr(comparison, fixed[1]) <= fixed[0]:
            # A trained model can be so sure of itself that rounding alone moves one position beyond a fixed number.
            bound, bounded = self._noise_bound(expected)
        else:
            bound, bounded = fixed
        if self.lora and not fixed:
            self._check_effect(expected, found)
        return LogitsParity(
            positions=comparison.positions,
            mean_kl=comparison.mean_kl,
            max_kl=comparison.max_kl,
            top1=comparison.top1,
            bound=bound,
            bounded=bounded,
        )

    def _check_effect(self, expected: list[Logits], found: list[Logits]) -> None:
        """On a coarse base a weak adapter drowns in the base's rounding; what it changes can still be compared."""
        model = self.model
        with model.without_adapter():
            plain = self._expected("effect")
        with model.noise(bounds.noise_levels(self.header, self.lora, torch_dtype=model.dtype), seed=0):
            noisy = self._expected("effect")
            with model.without_adapter():
                noisy_plain = self._expected("effect")
        ratio = effect_ratio(plain, expected, self._found(None), found)
        owed = effect_ratio(plain, expected, noisy_plain, noisy)
        if ratio is None or not owed:
            return
        low, high = bounds.EFFECT
        fits = low <= ratio / owed <= high
        difference = f"the adapter changes the logits {ratio / owed:.2f} times as much as PEFT's does"
        self.checks.append(ParityCheck("adapter_effect", 1, int(fits), "" if fits else difference))

    def _noise_bound(self, expected: list[Logits]) -> tuple[float, bounds.Bounded]:
        levels = bounds.noise_levels(self.header, self.lora, torch_dtype=self.model.dtype)
        draws: list[Comparison] = []
        for seed in range(3 if self.parameters < 50_000_000 else 1):
            with self.model.noise(levels, seed=seed):
                noisy = self._expected("bound")
            draws.append(compare(expected, noisy))
        chance = chance_kl(expected)
        noise = sum(draw.mean_kl for draw in draws) / len(draws)
        bound, bounded = bounds.noise_bound(noise, is_moe=self.is_moe, chance_kl=chance)
        if bounds.says_little(bound, chance):
            kind = bounds.coarsest_type(self.header, *([self.lora] if self.lora else []))
            self.not_checked.append(
                f"the weights, closely: {kind} alone costs this model {noise:.2g} nats, another model's would be "
                f"{chance:.2g} (prove an F16 or Q8_0 file of it)"
            )
        return bound, bounded
