"""A run that takes a moment: its base, its data, its settings; how it is stopped and what it leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from edgetune.events import Event, Metrics
from edgetune.training import TrainSettings
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


def tiny_base(directory: Path) -> Path:
    """A Llama of width 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_checkpoint(directory / "tiny", "llama", overrides=sizes)


def tiny_data(directory: Path) -> Path:
    """Twenty-four short chats, and six of them to measure by."""
    rows = [
        {"messages": [{"role": "user", "content": word * count}, {"role": "assistant", "content": f"{word}!"}]}
        for word in WORDS
        for count in (1, 2, 3)
    ]
    return write_rows(directory, {"train": rows, "valid": rows[::4]})


def tiny_settings(base_dir: Path, data_dir: Path, run_dir: Path) -> TrainSettings:
    """LoRA that learns the chats in a few epochs."""
    return TrainSettings(
        model=str(base_dir), data=(str(data_dir),), out=str(run_dir), dtype="f32", lr=5e-3, rank=4, alpha=8
    )


def stop_after(steps: int) -> Any:
    """A sink that presses Ctrl-C when the run has taken `steps` steps."""

    def sink(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == steps and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)

    return sink


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter_model.safetensors").read_bytes()
