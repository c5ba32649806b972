"""`make demo`: the main job from end to end on the embedded model, with the commands a person would type.

Trains a LoRA adapter that turns support messages into JSON tickets, converts base and adapter to GGUF, quantizes,
proves the pair, then asks the same held-out questions without and with the adapter and scores both. Everything shown is
measured in this run; what is made stays in `build/demo`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "models" / "pocket"
TICKETS = POCKET / "demos" / "tickets"
OUT = ROOT / "build" / "demo"
SHOWN = 4
"""How many of the held-out questions are printed."""

console = Console()


def main() -> None:
    """Run the demo; exits with the code of the first command that fails."""
    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    run_dir, base, quantized = OUT / "tickets", OUT / "pocket-F16.gguf", OUT / "pocket-Q4_K_M.gguf"
    adapter = run_dir / "adapter-F16.gguf"

    step("1  Train a LoRA adapter: support message → JSON ticket")
    edgetune("train", "--recipe", TICKETS / "recipe.toml", "-o", run_dir)
    step("2  Convert base and adapter to GGUF; each conversion ends with its proof")
    edgetune("convert", POCKET, "-o", base, "--outtype", "f16")
    edgetune("convert", run_dir, "--data", TICKETS / "test.jsonl")
    step("3  Quantize the base, and prove the pair that will be used")
    edgetune("quantize", base, quantized, "Q4_K_M")
    pair = ("--adapter", run_dir, "--lora", adapter)
    edgetune("verify", POCKET, quantized, *pair, "--data", TICKETS / "test.jsonl")
    step("4  The same held-out questions, without and with the adapter")
    compare(quantized, adapter)
    console.print(f"\nAll of it took {time.monotonic() - began:.0f} s. Now talk to it yourself:")
    console.print(f"  [bold]{shown('chat', '--lora', adapter)}[/]", highlight=False, soft_wrap=True)


def step(title: str) -> None:
    """Announce a step."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def edgetune(*args: object) -> None:
    """Show a command and run it, as typed in the project's directory."""
    console.print(f"[bold green]$[/] {shown(*args)}", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "edgetune", *words(*args)], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def shown(*args: object) -> str:
    """The command as a person in the project's directory would type it."""
    return " ".join(["edgetune", *words(*args)])


def words(*args: object) -> list[str]:
    """`args` with paths as seen from the project's directory."""
    return [str(arg.relative_to(ROOT) if isinstance(arg, Path) and arg.is_relative_to(ROOT) else arg) for arg in args]


def compare(base: Path, adapter: Path) -> None:
    """Answer every held-out row greedily with the adapter off and on; print some of the answers and both scores."""
    rows = [json.loads(line)["messages"] for line in (TICKETS / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    with LlamaEngine.open(base, ctx_size=512) as engine:
        without = [answer(engine, row) for row in rows]
        engine.set_adapters([LoraSpec(adapter)])
        adapted = [answer(engine, row) for row in rows]
    table = Table(show_lines=True)
    for title in ("message", "wanted", "pocket", "pocket + adapter"):
        table.add_column(title, overflow="fold")
    for row, before, after in list(zip(rows, without, adapted, strict=True))[:SHOWN]:
        wanted = row[-1]["content"]
        table.add_row(row[-2]["content"], wanted, before, f"[{'green' if after == wanted else 'red'}]{after}[/]")
    console.print(table)
    console.print(
        f"Exact match on {len(rows)} held-out messages:  pocket [bold]{score(rows, without):.0%}[/]   "
        f"pocket + adapter [bold]{score(rows, adapted):.0%}[/]"
    )


def answer(engine: LlamaEngine, row: Sequence[dict[str, str]]) -> str:
    """The model's greedy reply to `row` without its last message."""
    template = engine.tokenizer.chat_template
    assert template is not None
    prompt = engine.tokenizer.encode_rendered(template.render(row[:-1], add_generation_prompt=True))
    return "".join(engine.generate(prompt, Sampling(temp=0.0), max_tokens=128))


def score(rows: Sequence[Sequence[dict[str, str]]], answers: Sequence[str]) -> float:
    """Share of `answers` that equal their row's last message."""
    return sum(row[-1]["content"] == text for row, text in zip(rows, answers, strict=True)) / len(rows)


if __name__ == "__main__":
    main()
