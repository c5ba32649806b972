"""What imports what: the written contracts, and what a real interpreter has loaded after each command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gguf_files import write_model

_ROOT = Path(__file__).resolve().parents[1]
_HEAVY = ("torch", "transformers", "peft", "accelerate")
_REPORT = """
import json, sys
from edgetune.cli.main import run
code = run(sys.argv[1:])
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & set({names!r}))
print("\\n" + json.dumps({{"code": int(code), "loaded": loaded}}))
"""


def loaded_after(arguments: list[str], *, names: tuple[str, ...] = _HEAVY, stdin: str = "") -> dict[str, object]:
    """Exit code and which of `names` are loaded, after `edgetune` ran with `arguments` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _REPORT.format(names=names), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return values


def test_the_contracts_hold() -> None:
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if lint is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_help_loads_next_to_nothing() -> None:
    names = (*_HEAVY, "numpy", "llama_cpp", "gguf", "rich", "tokenizers", "jinja2", "converters")
    assert loaded_after(["--help"], names=names) == {"code": 0, "loaded": []}


@pytest.mark.parametrize(
    "verb", ["chat", "generate", "tokenize", "models", "quantize", "convert", "verify", "train", "embed", "classify"]
)
def test_the_help_of_a_verb_is_light(verb: str) -> None:
    assert loaded_after([verb, "--help"]) == {"code": 0, "loaded": []}


def test_chat_and_its_kin_never_load_torch(tmp_path: Path) -> None:
    code = (
        "import edgetune.chat, edgetune.engine, edgetune.engine.llama, edgetune.export, edgetune.quantize, "
        "edgetune.library, edgetune.cli.chat, edgetune.cli.generate, edgetune.cli.tokenize, sys; "
        f"print(sorted({{name.split('.')[0] for name in sys.modules}} & set({_HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    model = write_model(tmp_path / "model.gguf")
    assert loaded_after(["models", "show", str(model)]) == {"code": 0, "loaded": []}


def test_the_package_itself_is_instant() -> None:
    code = "import edgetune, sys; print(sorted(name for name in sys.modules if name.startswith('edgetune')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['edgetune']"


def test_the_converters_stand_alone() -> None:
    code = (
        "import converters, sys; print(sorted({n.split('.')[0] for n in sys.modules} & {'edgetune', 'torch', 'click'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
