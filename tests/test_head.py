"""Heads in GGUF metadata: read, checked, and computed as torch computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.head import ACTIVATIONS, Head, HeadLayer, normalized, pool, read_head, sigmoid, softmax

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3, 8)).astype(np.float32)


def write(path: Path, **keys: Any) -> Path:
    """A GGUF with one tensor and `edgetune.head.*` keys, dots written as two underscores."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "bert")
    for name, value in keys.items():
        key = f"edgetune.{name.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(number: int = 0, **other: Any) -> dict[str, Any]:
    """Keys of a dense layer of 8 to 3."""
    keys: dict[str, Any] = {
        "kind": "dense", "activation": "tanh", "in": 8, "out": 3, "weight": WEIGHT.reshape(-1).tolist(), **other,
    }  # fmt: skip
    return {f"head__{number}__{name}": value for name, value in keys.items()}


def test_a_head_is_read_with_arrays_of_any_length(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(100)]
    path = write(tmp_path / "a.gguf", task="multilabel", labels=labels, head__pooling="cls", head__count=1, **dense())
    head = read_head(path)
    assert head is not None
    assert (head.task, head.pooling, len(head.labels)) == ("multilabel", "cls", 100)
    rows = RNG.normal(size=(5, 8)).astype(np.float32)
    assert np.allclose(head.apply(rows), np.tanh(rows @ WEIGHT.T), atol=1e-6)


def test_a_file_without_a_head_has_none(tmp_path: Path) -> None:
    assert read_head(write(tmp_path / "a.gguf")) is None


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        (dense(weight=[1.0] * 7), CorruptFileError, "7 weights"),
        (dense(bias=[1.0] * 2), CorruptFileError, "2 biases"),
        (dense(activation="swish9"), UnsupportedError, "swish9"),
        (dense(kind="conv"), UnsupportedError, "conv"),
        ({**dense(), "head__pooling": "middle"}, UnsupportedError, "middle"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        read_head(write(tmp_path / "a.gguf", **{"task": "classification", "head__count": 1, **keys}))


def test_a_head_of_the_wrong_size_is_refused() -> None:
    layer = HeadLayer("dense", WEIGHT)
    Head("classification", ("a", "b", "c"), "cls", (layer,)).check_width(8, Path("a"))
    with pytest.raises(CorruptFileError, match="takes 8 numbers, and gets 9"):
        Head("classification", ("a", "b", "c"), "cls", (layer,)).check_width(9, Path("a"))
    with pytest.raises(CorruptFileError, match="3 outputs and 2 labels"):
        Head("classification", ("a", "b"), "cls", (layer,)).check_width(8, Path("a"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name: str) -> None:
    import torch
    from torch.nn import functional

    expected: dict[str, Any] = {
        "none": lambda x: x, "tanh": torch.tanh, "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
    }  # fmt: skip
    values = np.linspace(-90, 90, 1001, dtype=np.float32)
    found = ACTIVATIONS[name](values)
    assert np.allclose(found, expected[name](torch.from_numpy(values)).numpy(), atol=1e-5)


def test_layer_norm_is_torchs() -> None:
    import torch

    rows, bias = RNG.normal(3, 2, (4, 8)).astype(np.float32), RNG.normal(size=8).astype(np.float32)
    layer = HeadLayer("layer_norm", WEIGHT[0], bias, eps=1e-3)
    weights = torch.from_numpy(WEIGHT[0]), torch.from_numpy(bias)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(rows), (8,), *weights, eps=1e-3).numpy()
    assert np.allclose(layer.apply(rows), expected, atol=1e-5)


def test_pooling_takes_each_sequence_by_itself() -> None:
    states = RNG.normal(size=(6, 4)).astype(np.float32)
    first, second = states[:2], states[2:]
    assert np.allclose(pool(states, [2, 4], "mean"), [first.mean(0), second.mean(0)], atol=1e-6)
    assert np.array_equal(pool(states, [2, 4], "cls"), [first[0], second[0]])
    assert np.array_equal(pool(states, [2, 4], "last"), [first[-1], second[-1]])
    assert np.array_equal(pool(states, [2, 4], "max"), [first.max(0), second.max(0)])


def test_probabilities_do_not_overflow() -> None:
    assert softmax(np.array([1e4, -1e4], np.float32)).tolist() == [1.0, 0.0]
    assert sigmoid(np.array([1e4, -1e4], np.float32)).tolist() == [1.0, 0.0]
    assert not np.isnan(normalized(np.zeros((1, 4), np.float32))).any()
