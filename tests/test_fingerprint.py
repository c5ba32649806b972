"""Fingerprints tell bases apart by weights, tokenizer and template, and do not change with sharding or file order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import Fingerprint
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.events import Event, Progress
from edgetune.fingerprint import (
    fingerprint_checkpoint,
    read_chat_template,
    read_safetensors_header,
    safetensors_files,
    settings_sha256,
)

TENSORS = {"a.weight": bytes(range(16)), "b.weight": bytes(range(100, 132)), "c.bias": b"\0\1\2\3"}


def write_safetensors(path: Path, tensors: dict[str, bytes], *, header: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, offset = {}, 0
    for name, data in tensors.items():
        entries[name] = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(entries if header is None else header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    return path


def write_shards(directory: Path, shards: list[list[str]]) -> Path:
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: TENSORS[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def single(directory: Path, tensors: dict[str, bytes] = TENSORS) -> Path:
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def test_sharding_and_order_do_not_matter(tmp_path: Path) -> None:
    one = fingerprint_checkpoint(single(tmp_path / "one"))
    other_order = dict(reversed(TENSORS.items()))
    assert len(one.weights) == 64
    assert fingerprint_checkpoint(single(tmp_path / "two", other_order)) == one
    shards = write_shards(tmp_path / "three", [["c.bias"], ["b.weight", "a.weight"]])
    assert fingerprint_checkpoint(shards) == one


@pytest.mark.parametrize(
    "changed",
    [
        {**TENSORS, "c.bias": b"\0\1\2\4"},
        {("d.bias" if name == "c.bias" else name): data for name, data in TENSORS.items()},
        {name: data for name, data in TENSORS.items() if name != "c.bias"},
    ],
)
def test_any_change_of_the_weights_shows(tmp_path: Path, changed: dict[str, bytes]) -> None:
    one = fingerprint_checkpoint(single(tmp_path / "one"))
    assert fingerprint_checkpoint(single(tmp_path / "two", changed)).differences(one) == ["weights"]


def test_tokenizer_and_template_show(tmp_path: Path) -> None:
    one, two = single(tmp_path / "one"), single(tmp_path / "two")
    for directory, content in ((one, "{}"), (two, '{"x": 1}')):
        (directory / "tokenizer.json").write_text(content)
        (directory / "chat_template.jinja").write_text(content)
    assert fingerprint_checkpoint(one).differences(fingerprint_checkpoint(two)) == ["tokenizer", "template"]


def test_the_hash_is_cached_until_the_file_changes(tmp_path: Path) -> None:
    directory = single(tmp_path / "one")
    events: list[Event] = []
    first = fingerprint_checkpoint(directory, sink=events.append)
    assert any(isinstance(event, Progress) and event.stage == "hash" for event in events)
    events.clear()
    assert fingerprint_checkpoint(directory, sink=events.append) == first
    assert events == []
    single(directory, {**TENSORS, "c.bias": b"\0\1\2\4"})
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert fingerprint_checkpoint(directory) != first


def test_unknown_parts_never_differ() -> None:
    known = Fingerprint(weights="1", tokenizer="2")
    assert known.differences(Fingerprint()) == []
    assert known.differences(Fingerprint(weights="3")) == ["weights"]
    assert Fingerprint.from_metadata(known.to_metadata()) == known


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"\xff" * 8, "cut short"),
        (b"\x05\0\0\0\0\0\0\0hello", "broken"),
        (b"\x02\0\0\0\0\0\0\0[]", "broken"),
    ],
)
def test_broken_safetensors_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=said):
        fingerprint_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-4, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": None, "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        7,
    ],
)
def test_lying_headers_are_named(tmp_path: Path, entry: Any) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"a": b"\0" * 16}, header={"a": entry})
    with pytest.raises(CorruptFileError):
        read_safetensors_header(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_shards(tmp_path, [["a.weight"], ["b.weight", "c.bias"]])
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="00002-of-00002"):
        safetensors_files(directory)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_cannot_lead_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptFileError):
        safetensors_files(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedError, match=r"pickle \(pytorch_model\.bin\)"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("chat_template.jinja", "A", "A"),
        ("chat_template.json", '{"chat_template": "B"}', "B"),
        ("tokenizer_config.json", '{"chat_template": "C"}', "C"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}',
            "D",
        ),
        ("tokenizer_config.json", "{}", None),
    ],
)
def test_the_template_is_found_wherever_it_is(tmp_path: Path, file: str, content: str, expected: str | None) -> None:
    (tmp_path / file).write_text(content)
    assert read_chat_template(tmp_path) == expected


def test_settings_are_told_apart_by_labels_pooling_and_layers_after_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "good"}}')
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    write_safetensors(tmp_path / "2_Dense" / "model.safetensors", TENSORS)
    seen = {settings_sha256(tmp_path)}
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    seen.add(settings_sha256(tmp_path))
    (tmp_path / "config.json").write_text('{"id2label": {"0": "bad"}}')
    seen.add(settings_sha256(tmp_path))
    write_safetensors(tmp_path / "2_Dense" / "model.safetensors", {**TENSORS, "c.bias": b"\0\1\2\4"})
    seen.add(settings_sha256(tmp_path))
    assert len(seen) == 4
    (tmp_path / "model-F16.gguf").write_bytes(b"made from it")
    assert settings_sha256(tmp_path) in seen
