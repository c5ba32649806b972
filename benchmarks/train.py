"""Trains a LoRA adapter on a model of 135 M parameters, against transformers' Trainer with PEFT and TRL's SFTTrainer.

    python -m benchmarks.train [--rows N] [--rounds N] [--only NAME …] [--data FILE] [--tokenizer DIR]

The model has Qwen2's shape and vocabulary (151,936), random weights in bf16, and r = 16 on every linear layer; the data
are rows of gsm8k, one epoch. Each run is a process of its own. Prints tokens/s (of real tokens: padding is not counted)
in the training itself, peak memory of the whole process, the loss of each adapter on the same rows, computed by plain
transformers and PEFT, and edgetune's ratios to each peer. TRL gets an environment of its own, made on first use; it
uses the packages that are here and is left out, with a word, where it cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.job import REPOSITORY, run_job
from benchmarks.llama_cpp import BUILD_DIR

SHARED = REPOSITORY.parent / "shared" / "data"
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 15,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "bos_token_id": None,
}
BATCH, RANK, ALPHA, RATE, PACKED_LENGTH = 8, 16, 32, 2e-4, 1024
PEERS = ("trainer", "trl")
EVALUATED = 16
"""Rows whose loss is compared."""


def main() -> None:
    """Measure and print; see the module's own words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="each one runs in every round; the best round counts")
    parser.add_argument("--only", nargs="+", choices=("edgetune", *PEERS), default=("edgetune", *PEERS))
    parser.add_argument("--data", type=Path, default=SHARED / "datasets" / "gsm8k" / "train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen2.5")
    parser.add_argument("--job", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job[0]](Path(options.job[1]))))
        return
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD_DIR) as scratch:
        work_dir = Path(scratch)
        _write_inputs(work_dir, options)
        print(json.dumps(measure(work_dir, options.only, rounds=options.rounds), indent=2))


def measure(work_dir: Path, names: tuple[str, ...], *, rounds: int) -> dict[str, Any]:
    """Each one's best tokens/s, peak memory and loss, and the ratios of edgetune's to each peer's."""
    interpreters = {name: _trl_python() if name == "trl" else sys.executable for name in names}
    results: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, python in interpreters.items():
            if python:
                found = _run(python, name, work_dir)
                best = results.setdefault(name, found)
                if found["tokens_per_second"] > best["tokens_per_second"]:
                    results[name] = found
    for name, loss in _run(sys.executable, "evaluate", work_dir).items():
        if name in results:
            results[name]["loss"] = loss
    ratios = {
        f"{value}_to_{peer}": round(results["edgetune"][value] / results[peer][value], 3)
        for peer in PEERS
        for value in ("tokens_per_second", "peak_mib", "loss")
        if {"edgetune", peer} <= results.keys()
    }
    return {**results, **ratios}


def _run(python: str, job: str, work_dir: Path) -> dict[str, float]:
    """What `job` printed, and the peak memory of its process."""
    result, peak = run_job([python, "-m", "benchmarks.train", "--job", job, str(work_dir)])
    if job != "evaluate":
        result["peak_mib"] = round(peak / 2**20)
    return result


def _write_inputs(work_dir: Path, options: argparse.Namespace) -> None:
    with options.data.open(encoding="utf-8") as source:
        (work_dir / "rows.jsonl").write_text("".join(islice(source, options.rows)), encoding="utf-8")
    model_dir = BUILD_DIR / "qwen2-135m-shaped"
    if not model_dir.is_dir():
        _run(sys.executable, "model", work_dir)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(options.tokenizer / name, work_dir / "model" / name)
        (work_dir / "model").rename(model_dir)
    (work_dir / "model").symlink_to(model_dir)
    _run(sys.executable, "tokens", work_dir)


def _trl_python() -> str:
    """An interpreter with TRL and everything that is here, or "" when there can be none."""
    home = BUILD_DIR / "trl"
    python = home / "bin" / "python"
    if not (home / "ready").is_file():
        print("installing TRL", file=sys.stderr)
        here = subprocess.run(
            [sys.executable, "-c", "import site; print(site.getsitepackages()[0])"], stdout=subprocess.PIPE, check=True
        )
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        packages = next(home.glob("lib/python*/site-packages"))
        # What is here is seen from there, and never written to.
        (packages / "here.pth").write_bytes(here.stdout)
        constraints = str(REPOSITORY / "constraints.txt")
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", constraints, "trl", "datasets"]
        if subprocess.run(install, check=False, stdout=sys.stderr).returncode:
            print("TRL cannot be installed here: left out.", file=sys.stderr)
            return ""
        (home / "ready").touch()
    return str(python)


def _model(work_dir: Path) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(work_dir / "model")
    return {}


def _settings(work_dir: Path) -> Any:
    from edgetune.training import TrainSettings

    return TrainSettings(
        model=str(work_dir / "model"),
        data=(str(work_dir / "rows.jsonl"),),
        out=str(work_dir / "edgetune"),
        epochs=1,
        batch_size=BATCH,
        rank=RANK,
        alpha=ALPHA,
        lr=RATE,
        schedule="linear",
        warmup=0,
        dtype="bf16",
        eval=False,
    )


def _tokens(work_dir: Path) -> dict[str, float]:
    """The rows as edgetune writes and masks them, for the peers."""
    from edgetune.training import prepare

    rows = [
        {"input_ids": sequence.ids.tolist(), "completion_mask": sequence.learned.astype(int).tolist()}
        for sequence in prepare(_settings(work_dir)).train
    ]
    (work_dir / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")
    return {}


def _read_tokens(work_dir: Path) -> list[dict[str, list[int]]]:
    rows: list[dict[str, list[int]]] = json.loads((work_dir / "tokens.json").read_text(encoding="utf-8"))
    return rows


def _edgetune(work_dir: Path) -> dict[str, float]:
    from edgetune.training import train

    shutil.rmtree(work_dir / "edgetune", ignore_errors=True)
    metrics = train(_settings(work_dir)).metrics
    return {"tokens_per_second": metrics["tokens_per_second"], "seconds": metrics["seconds"]}


def _adapted(work_dir: Path) -> Any:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(work_dir / "model", dtype=torch.bfloat16)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def _arguments(work_dir: Path, name: str) -> dict[str, Any]:
    return {
        "output_dir": str(work_dir / name),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def _trained(trainer: Any, work_dir: Path, name: str) -> dict[str, float]:
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.model.save_pretrained(work_dir / name)
    tokens = sum(len(row["input_ids"]) for row in _read_tokens(work_dir))
    return {"tokens_per_second": tokens / seconds, "seconds": seconds}


def _trainer(work_dir: Path) -> dict[str, float]:
    import transformers

    rows = [
        {"input_ids": ids, "labels": [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]}
        for ids, mask in (row.values() for row in _read_tokens(work_dir))
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(work_dir / "model")
    trainer = transformers.Trainer(
        model=_adapted(work_dir),
        args=transformers.TrainingArguments(
            per_device_train_batch_size=BATCH, gradient_checkpointing=False, **_arguments(work_dir, "trainer")
        ),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
    return _trained(trainer, work_dir, "trainer")


def _trl(work_dir: Path) -> dict[str, float]:
    import transformers

    # Neither is among the project's own packages.
    datasets, trl = import_module("datasets"), import_module("trl")
    trainer = trl.SFTTrainer(
        model=_adapted(work_dir),
        args=trl.SFTConfig(
            packing=True,
            max_length=PACKED_LENGTH,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,  # about the tokens of eight rows a step
            **_arguments(work_dir, "trl"),
        ),
        train_dataset=datasets.Dataset.from_list(_read_tokens(work_dir)),
        processing_class=transformers.AutoTokenizer.from_pretrained(work_dir / "model"),
    )
    return _trained(trainer, work_dir, "trl")


def _evaluate(work_dir: Path) -> dict[str, float]:
    """The mean loss over the learned tokens of the first rows, of every adapter there is."""
    import peft
    import torch
    import transformers

    losses = {}
    for name in ("edgetune", *PEERS):
        if not (work_dir / name / "adapter_model.safetensors").is_file():
            continue
        base = transformers.AutoModelForCausalLM.from_pretrained(work_dir / "model", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(base, work_dir / name).eval()
        total, count = 0.0, 0
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for row in _read_tokens(work_dir)[:EVALUATED]:
                ids, learned = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"][1:]).bool()
                logits = model(input_ids=ids[None]).logits[0, :-1][learned].float()
                total += float(torch.nn.functional.cross_entropy(logits, ids[1:][learned], reduction="sum"))
                count += int(learned.sum())
        losses[name] = total / count
    return losses


JOBS = {
    "model": _model,
    "tokens": _tokens,
    "edgetune": _edgetune,
    "trainer": _trainer,
    "trl": _trl,
    "evaluate": _evaluate,
}

if __name__ == "__main__":
    main()
