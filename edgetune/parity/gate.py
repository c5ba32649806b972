"""Runs the checks in order and puts the report together: tokens first, weights last, each only where it can run."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from edgetune.artifacts import LogitsParity, ParityCheck, ParityReport
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import ResourceError, UnsupportedError, UsageError
from edgetune.events import Sink, ignore
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.hardware import available_memory
from edgetune.parity import encoders, seq2seq, structure, tokens
from edgetune.parity.distributions import llama_logits
from edgetune.parity.proof import Proof
from edgetune.parity.reference import NO_TORCH, NO_TRANSFORMERS, Reference, effective_template, load_reference
from edgetune.parity.sequences import choose_sequences, threshold_length
from edgetune.parity.torch_model import TorchModel, parameter_count


def verify(
    base_dir: str | PathLike[str],
    gguf_path: str | PathLike[str],
    *,
    adapter_dir: str | PathLike[str] | None = None,
    lora_path: str | PathLike[str] | None = None,
    merged: bool = False,
    data_path: str | PathLike[str] | None = None,
    sink: Sink = ignore,
) -> ParityReport:
    """Compare the checkpoint `base_dir` (with PEFT's `adapter_dir`) with `gguf_path` (with `lora_path` on it).

    `merged`: the GGUF holds base and adapter in one. `data_path`: held-out rows of it are what is predicted. A failed
    check is in the report; raises only when a file cannot be read or the arguments make no sense.
    """
    base_dir, gguf_path = Path(base_dir), Path(gguf_path)
    adapter_dir, lora_path, data_path = (Path(one) if one else None for one in (adapter_dir, lora_path, data_path))
    _check_arguments(adapter_dir, lora_path, merged)
    header = read_gguf_header(gguf_path)
    lora = read_gguf_header(lora_path) if lora_path else None
    if header.architecture in seq2seq.ARCHITECTURES:
        return seq2seq.verify(
            base_dir, header, adapter_dir=adapter_dir, lora=lora, merged=merged, data_path=data_path, sink=sink
        )
    if any(encoders.is_encoder(one) for one in (header, lora) if one):
        return encoders.verify(
            base_dir, header, adapter_dir=adapter_dir, lora=lora, merged=merged, data_path=data_path, sink=sink
        )
    checks = [structure.check_structure(header, base_dir, lora=lora, merged=merged)]
    found, not_checked, reference = _check_tokens(base_dir, adapter_dir, header, lora, merged)
    checks = [*found, *checks]
    logits: LogitsParity | None = None
    if checks[-1].passed:
        try:
            model = TorchModel.load(base_dir, adapter_dir, available_bytes=available_memory())
        except ImportError:
            not_checked.append(f"next-token distributions: {NO_TORCH}")
        except ResourceError as error:
            not_checked.append(f"next-token distributions: {error.message}")
        else:
            config = structure.text_config(base_dir)
            sequences = choose_sequences(
                reference, config, parameters=parameter_count(base_dir), base_dir=base_dir, data_path=data_path
            )
            proof = Proof(
                base_dir,
                header,
                lora,
                model,
                expected=lambda label: model.logits(sequences, label=label, sink=sink),
                found=lambda lora_path: llama_logits(
                    header.path, sequences, lora_path=lora_path, long_from=threshold_length(config), sink=sink
                ),
                sink=sink,
            )
            logits = proof.run()
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
