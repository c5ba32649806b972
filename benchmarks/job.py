"""One piece of work in a process of its own: what it printed last, and the most memory it ever had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def run_job(command: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The JSON object on the last line of stdout, and the process's peak memory in bytes. Exits where the job fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, env=environment)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-3000:]}")
    return json.loads(printed.splitlines()[-1]), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
