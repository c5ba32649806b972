"""The peer: llama.cpp's own source, of the very version that llama-cpp-python was built from.

Downloads the sdist once, and builds `llama-bench` from it once; both stay in the build directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

BUILD_DIR = Path(os.environ.get("EDGETUNE_BENCH_DIR") or Path(tempfile.gettempdir()) / "edgetune-bench")
"""Where things are kept that take minutes to make."""


def source_tree(build_dir: Path = BUILD_DIR) -> Path:
    """The llama.cpp source tree inside llama-cpp-python's sdist; downloaded on first use."""
    release = version("llama-cpp-python")
    source = build_dir / f"llama_cpp_python-{release}" / "vendor" / "llama.cpp"
    if not source.is_dir():
        build_dir.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=llama-cpp-python"]
        subprocess.run([*download, "-d", build_dir, f"llama-cpp-python=={release}"], check=True, stdout=sys.stderr)
        with tarfile.open(next(build_dir.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(build_dir, filter="data")
    return source


def llama_bench(build_dir: Path = BUILD_DIR) -> Path:
    """The `llama-bench` program, built with the settings the bindings are built with; takes minutes on first use."""
    found = build_dir / "build" / "bin" / "llama-bench"
    if found.is_file():
        return found
    source = source_tree(build_dir)
    print(f"building llama-bench in {build_dir}; it takes minutes", file=sys.stderr)
    off = [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "OPENSSL")]
    configure = ["cmake", "-S", str(source), "-B", str(build_dir / "build"), "-DCMAKE_BUILD_TYPE=Release", *off]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    compile_ = ["cmake", "--build", str(build_dir / "build"), "--target", "llama-bench", "-j", str(os.cpu_count() or 1)]
    subprocess.run(compile_, check=True, stdout=sys.stderr)
    return found
