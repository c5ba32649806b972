"""`make bench`: every benchmark in turn, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

for module in ("convert", "train", "decode", "chat", "embed", "classify", "gguf_base", "plan", "quantized"):
    print(f"== {module}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=True)
