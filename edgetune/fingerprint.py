"""Fingerprints: which base weights, tokenizer and chat template an artefact was made from or for.

Hashes files as bytes, with the standard library alone; loads no model. The weights' hash is over tensors (name, dtype,
shape, data), so it does not change with sharding or file order.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgetune.artifacts import Fingerprint
from edgetune.errors import CorruptFileError, EdgetuneError, UnsupportedError
from edgetune.events import Progress, Sink, ignore
from edgetune.gguf_header import read_gguf
from edgetune.paths import cache_dir, write_json

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)
_PIECE_FILES = ("source.spm", "target.spm")
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 23
_HINT = "Download or save the file again."


def fingerprint_checkpoint(model_dir: Path, *, sink: Sink = ignore) -> Fingerprint:
    """Fingerprint a Hugging Face directory. The weights' hash is cached by path, size and modification time.

    Raises `CorruptFileError` for a broken safetensors file, `UnsupportedError` when there are no safetensors.
    """
    return Fingerprint(
        weights=_weights_sha256(model_dir, sink),
        tokenizer=_tokenizer_sha256(model_dir),
        template=text_sha256(read_chat_template(model_dir)),
    )


def fingerprint_gguf(path: Path) -> Fingerprint:
    """Of the checkpoint that the GGUF model at `path` was made from; of the file itself where it names none."""
    recorded = read_gguf(path).fingerprint
    if recorded.weights:
        return recorded
    return Fingerprint(weights=file_sha256(path))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def transformer_dir(model_dir: Path) -> Path:
    """Where config.json, weights and tokenizer of a Hugging Face directory are: there, or in the first of its modules.

    Some sentence-transformers directories keep them in 0_Transformer, and only modules.json at the top.
    """
    if (model_dir / "config.json").is_file():
        return model_dir
    return next(iter(module_dirs(model_dir)), model_dir)


def settings_sha256(model_dir: Path) -> str:
    """SHA-256 of what decides a converted model beside weights and tokenizer: configs, pooling, the layers after it."""
    inside = transformer_dir(model_dir)
    paths = [*model_dir.glob("*.json"), *inside.glob("*.json")]
    for folder in module_dirs(model_dir):
        if folder.resolve() not in (model_dir.resolve(), inside.resolve()):
            paths += [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(f"{path.relative_to(model_dir)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def module_dirs(model_dir: Path) -> list[Path]:
    """The directories that modules.json names, in its order; those outside of `model_dir` are left out."""
    try:
        listed = json.loads((model_dir / "modules.json").read_text(encoding="utf-8"))
        folders = [model_dir / str(module["path"]) for module in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    top = model_dir.resolve()
    return [folder for folder in folders if folder.is_dir() and top in (folder.resolve(), *folder.resolve().parents)]


def text_sha256(text: str | None) -> str:
    """SHA-256 of `text` as UTF-8; empty for no text."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def read_chat_template(model_dir: Path) -> str | None:
    """The default chat template of a Hugging Face directory, wherever it keeps it; None when there is none."""
    folder = transformer_dir(model_dir)
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            template = text if path.suffix == ".jinja" else _default_template(json.loads(text))
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{path} is not UTF-8 text: {error}.", hint=_HINT) from error
        except (ValueError, AttributeError, RecursionError) as error:
            raise CorruptFileError(f"{path} is not valid JSON: {error}.", hint=_HINT) from error
        if template or path.suffix == ".jinja":
            return template
    return None


def _default_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    return str(template) if template else None


def safetensors_files(model_dir: Path) -> list[Path]:
    """The weight files of a checkpoint, in name order: the index's shards, or the single file.

    Raises `UnsupportedError` when there are none, `CorruptFileError` for a broken index or a missing shard.
    """
    model_dir = transformer_dir(model_dir)
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        try:
            names = sorted({*map(_text, json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values())})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptFileError(f"{index_path} is not a valid safetensors index: {error}.", hint=_HINT) from error
        for name in names:
            # A shard's name is a plain file name: an index must not lead out of its directory.
            if Path(name).name != name or not (model_dir / name).is_file():
                raise CorruptFileError(
                    f"{model_dir} lacks the weight file {name!r} that its index names.", hint="Download it again."
                )
        return [model_dir / name for name in names]
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern)):
        raise UnsupportedError(
            f"{model_dir} holds its weights as a pickle ({pickles[0]}), which can run code when loaded.",
            hint="Use the safetensors version of this model, or re-save it from a trusted copy with save_pretrained().",
        )
    raise UnsupportedError(
        f"{model_dir} has no model.safetensors.",
        hint="Point to a Hugging Face model directory with safetensors weights.",
    )


def read_safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read `path`'s tensor table: name → {"dtype", "shape", "data_offsets"}, and where the data begin (bytes).

    Raises `CorruptFileError` when the header is not JSON, or does not match the file's length.
    Format: https://huggingface.co/docs/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptFileError(f"{path} is not a safetensors file, or is cut short ({size} bytes).", hint=_HINT)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((_check_entry(name, entry) for name, entry in header.items()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CorruptFileError(f"{path} has a broken safetensors header: {error}.", hint=_HINT) from error
    if 8 + length + end != size:
        raise CorruptFileError(
            f"{path} is {size} bytes long, its header describes {8 + length + end}: it is truncated or damaged.",
            hint=_HINT,
        )
    return header, 8 + length


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no file name")
    return value


def _check_entry(name: str, entry: dict[str, Any]) -> int:
    """Where `entry`'s data end; raises `ValueError`, `KeyError` or `TypeError` when it does not describe a tensor."""
    begin, end = entry["data_offsets"]
    sizes = [*entry["shape"], begin, end]
    if not isinstance(entry["dtype"], str) or not all(type(size) is int and size >= 0 for size in sizes) or begin > end:
        raise ValueError(f"tensor {name!r} is described as {entry}")
    return int(end)


def _tokenizer_sha256(model_dir: Path) -> str:
    folder = transformer_dir(model_dir)
    first = next((name for name in _TOKENIZER_FILES if (folder / name).is_file()), None)
    if first is None:
        return ""
    # Marian's numbers mean nothing without the pieces that they are of.
    names = [first, *(_PIECE_FILES if first == "vocab.json" else ())]
    paths = [folder / name for name in names if (folder / name).is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _weights_sha256(model_dir: Path, sink: Sink) -> str:
    files = safetensors_files(model_dir)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(model_dir.resolve()), stats]).encode()).hexdigest()
    cached = cache_dir() / "fingerprints" / f"{key[:32]}.json"
    if cached.is_file():
        try:
            known = json.loads(cached.read_text(encoding="utf-8"))["weights"]
            return str(known)
        except (ValueError, KeyError, OSError):
            pass
    tensors = []
    for path in files:
        header, data_start = read_safetensors_header(path)
        tensors += [(name, path, data_start, entry) for name, entry in header.items()]
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for *_, entry in tensors)
    done = 0
    lines = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for (name, _, _, entry), digest in zip(tensors, pool.map(_tensor_sha256, tensors), strict=True):
            lines.append(f"{name} {entry['dtype']} {entry['shape']} {digest}")
            done += entry["data_offsets"][1] - entry["data_offsets"][0]
            sink(Progress("hash", done, total, "bytes", name))
    weights = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    try:
        write_json(cached, {"weights": weights, "path": str(model_dir)})
    except (OSError, EdgetuneError):
        pass  # The cache is a convenience; a read-only home must not stop anyone.
    return weights


def _tensor_sha256(tensor: tuple[str, Path, int, dict[str, Any]]) -> str:
    _, path, data_start, entry = tensor
    begin, end = entry["data_offsets"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(data_start + begin)
        left = end - begin
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CorruptFileError(f"{path} ended while it was read.")
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
