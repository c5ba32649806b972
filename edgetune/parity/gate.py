"""Runs the checks in order and puts the report together: tokens first, weights last, each only where it can run."""

from __future__ import annotations

from pathlib import Path

from edgetune.artifacts import LogitsParity, ParityCheck, ParityReport
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import ResourceError, UnsupportedError, UsageError
from edgetune.events import Notice, Sink, ignore
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.hardware import available_memory
from edgetune.parity import bounds, structure, tokens
from edgetune.parity.distributions import Comparison, chance_kl, compare, effect_ratio, llama_logits
from edgetune.parity.reference import NO_TRANSFORMERS, Reference, effective_template, load_reference
from edgetune.parity.sequences import choose_sequences, threshold_length
from edgetune.parity.torch_model import TorchModel, parameter_count

_TORCH = 'pip install "edgetune[train]"'


def verify(
    base_dir: Path,
    gguf_path: Path,
    *,
    adapter_dir: Path | None = None,
    lora_path: Path | None = None,
    merged: bool = False,
    data_path: Path | None = None,
    sink: Sink = ignore,
) -> ParityReport:
    """Compare the checkpoint `base_dir` (with PEFT's `adapter_dir`) with `gguf_path` (with `lora_path` on it).

    `merged`: the GGUF holds base and adapter in one. `data_path`: held-out rows of it are what is predicted. A failed
    check is in the report; raises only when a file cannot be read or the arguments make no sense.
    """
    _check_arguments(adapter_dir, lora_path, merged)
    header = read_gguf_header(gguf_path)
    lora = read_gguf_header(lora_path) if lora_path else None
    checks = [structure.check_structure(header, base_dir, lora=lora, merged=merged)]
    found, not_checked, reference = _check_tokens(base_dir, adapter_dir, header, lora, merged)
    checks = [*found, *checks]
    logits: LogitsParity | None = None
    if checks[-1].passed:
        try:
            model = TorchModel.load(base_dir, adapter_dir, available_bytes=available_memory())
        except ImportError:
            not_checked.append(f"next-token distributions: torch is not installed ({_TORCH})")
        except ResourceError as error:
            not_checked.append(f"next-token distributions: {error.message}")
        else:
            proof = _Proof(base_dir, header, lora, sink)
            logits = proof.run(model, reference, data_path)
            checks += proof.checks
            not_checked += proof.not_checked
    else:
        not_checked.append("next-token distributions: the files' structure already differs")
    return ParityReport(gguf_path, lora_path, tuple(checks), logits, tuple(not_checked))


def _check_arguments(adapter_dir: Path | None, lora_path: Path | None, merged: bool) -> None:
    if merged and (lora_path or not adapter_dir):
        raise UsageError("A merged file is compared with base and adapter.", hint="Give --adapter, and no --lora.")
    if not merged and bool(adapter_dir) != bool(lora_path):
        given, lacking = ("--adapter", "--lora") if adapter_dir else ("--lora", "--adapter")
        raise UsageError(
            f"{given} without {lacking}.", hint="Give both, or --merged for a GGUF with the adapter in it."
        )


def _check_tokens(
    base_dir: Path, adapter_dir: Path | None, header: GgufHeader, lora: GgufHeader | None, merged: bool
) -> tuple[list[ParityCheck], list[str], Reference | None]:
    not_checked: list[str] = []
    # A merged model brings the adapter's tokenizer, where it has one: it may have added tokens.
    tokenizer_dir = adapter_dir if merged and adapter_dir and (adapter_dir / "tokenizer.json").is_file() else base_dir
    template = effective_template(base_dir, adapter_dir if merged else None)
    try:
        reference = load_reference(tokenizer_dir, template=template)
    except UnsupportedError as error:
        return [ParityCheck("tokenizer", 0, 0, skipped=error.message)], [f"token ids: {error.message}"], None
    if reference.hugging_face is None:
        not_checked.append(f"rendered chat template text, BOS, EOS and stop tokens: {NO_TRANSFORMERS}")
    tokenizer = GgufTokenizer.open(header.path)
    try:
        source = _template_of(header)
        checks = [
            tokens.check_tokenizer(reference, tokenizer),
            tokens.check_template(reference, tokenizer, source, where=header.path.name),
            tokens.check_stop(reference, tokenizer),
        ]
        if lora is not None and (adapter_source := _template_of(lora)):
            own = load_reference(base_dir, template=effective_template(base_dir, adapter_dir))
            check = tokens.check_template(own, tokenizer, adapter_source, where=lora.path.name)
            checks.append(ParityCheck("adapter_template", check.checked, check.equal, check.first_difference))
    finally:
        tokenizer.close()
    return checks, not_checked, reference


def _template_of(header: GgufHeader) -> str | None:
    source = header.metadata.get("tokenizer.chat_template")
    return str(source) if source else None


class _Proof:
    """The comparison of distributions: sequences, both sides, the bound."""

    def __init__(self, base_dir: Path, header: GgufHeader, lora: GgufHeader | None, sink: Sink) -> None:
        self.base_dir, self.header, self.lora, self.sink = base_dir, header, lora, sink
        self.config = structure.text_config(base_dir)
        self.is_moe = structure.is_moe(self.config)
        self.parameters = parameter_count(base_dir)
        self.checks: list[ParityCheck] = []
        """What was found besides the distributions."""
        self.not_checked: list[str] = []

    def run(self, model: TorchModel, reference: Reference | None, data_path: Path | None) -> LogitsParity:
        """Compare on the chosen sequences and grade."""
        if model.dtype != "float32":
            self.sink(Notice(f"Memory does not allow float32: torch computes in {model.dtype}, a coarser reference."))
        sequences = choose_sequences(
            reference, self.config, parameters=self.parameters, base_dir=self.base_dir, data_path=data_path
        )
        expected = model.logits(sequences, label="torch", sink=self.sink)
        found = self._llama_logits(sequences, with_lora=True)
        comparison = compare(expected, found)
        headers = [self.header, *([self.lora] if self.lora else [])]
        fixed = bounds.fixed_bound(bounds.coarsest_type(*headers), is_moe=self.is_moe, torch_dtype=model.dtype)
        if fixed is None or not getattr(comparison, fixed[1]) <= fixed[0]:
            # A trained model can be so sure of itself that rounding alone moves one position beyond a fixed number.
            bound, bounded = self._noise_bound(model, sequences, expected)
        else:
            bound, bounded = fixed
        if self.lora and not fixed:
            self._check_effect(model, sequences, expected, found)
        return LogitsParity(
            positions=comparison.positions,
            mean_kl=comparison.mean_kl,
            max_kl=comparison.max_kl,
            top1=comparison.top1,
            bound=bound,
            bounded=bounded,
        )

    def _llama_logits(self, sequences: list[list[int]], *, with_lora: bool) -> list[bounds.Logits]:
        return llama_logits(
            self.header.path,
            sequences,
            lora_path=self.lora.path if self.lora and with_lora else None,
            long_from=threshold_length(self.config),
            sink=self.sink,
        )

    def _check_effect(
        self, model: TorchModel, sequences: list[list[int]], expected: list[bounds.Logits], found: list[bounds.Logits]
    ) -> None:
        """On a coarse base a weak adapter drowns in the base's rounding; what it changes can still be compared."""
        with model.without_adapter():
            plain = model.logits(sequences, label="effect", sink=self.sink)
        with model.noise(bounds.noise_levels(self.header, self.lora, torch_dtype=model.dtype), seed=0):
            noisy = model.logits(sequences, label="effect", sink=self.sink)
            with model.without_adapter():
                noisy_plain = model.logits(sequences, label="effect", sink=self.sink)
        ratio = effect_ratio(plain, expected, self._llama_logits(sequences, with_lora=False), found)
        owed = effect_ratio(plain, expected, noisy_plain, noisy)
        if ratio is None or not owed:
            return
        low, high = bounds.EFFECT
        fits = low <= ratio / owed <= high
        difference = f"the adapter changes the logits {ratio / owed:.2f} times as much as PEFT's does"
        self.checks.append(ParityCheck("adapter_effect", 1, int(fits), "" if fits else difference))

    def _noise_bound(
        self, model: TorchModel, sequences: list[list[int]], expected: list[bounds.Logits]
    ) -> tuple[float, bounds.Bounded]:
        levels = bounds.noise_levels(self.header, self.lora, torch_dtype=model.dtype)
        draws: list[Comparison] = []
        for seed in range(3 if self.parameters < 50_000_000 else 1):
            with model.noise(levels, seed=seed):
                noisy = model.logits(sequences, label="bound", sink=self.sink)
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
