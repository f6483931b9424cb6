"""tensors.json: only what can be where it says is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.checkpoint import read_tensors
from peerllm.errors import ModelError

BYTES = 1000


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "m.gguf").write_bytes(bytes(BYTES))
    path = str(tmp_path / "m.gguf")
    return {"name": "a.weight", "dtype": "Q8_0", "shape": [2, 64], "path": path, "offset": 864, "nbytes": 136}


def read(directory: Path, value: Any) -> dict[str, TensorAt]:
    (directory / "tensors.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return read_tensors(directory)


def test_tensors_of_block_types_are_found(tmp_path: Path, entry: dict[str, Any]) -> None:
    other = {**entry, "name": "b.weight", "dtype": "F32", "shape": [], "nbytes": 4, "offset": 0}
    found = read(tmp_path, [entry, other])
    assert found["a.weight"] == TensorAt("a.weight", "Q8_0", (2, 64), entry["path"], 864, 136)
    assert found["b.weight"].shape == ()


def test_names_are_those_that_are_wanted(tmp_path: Path, entry: dict[str, Any]) -> None:
    read(tmp_path, [entry, {**entry, "name": "vision.weight"}])
    assert list(read_tensors(tmp_path, lambda name: None if "vision" in name else f"model.{name}")) == [
        "model.a.weight"
    ]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"offset": 865}, "m.gguf is cut short or another file than before: tensor a.weight ends at byte 1001 of 1000"),
    ({"offset": -1}, "malformed"),
    ({"offset": 1 << 63}, "malformed"),
    ({"offset": True}, "malformed"),
    ({"offset": 1.0}, "malformed"),
    ({"nbytes": 135}, "malformed"),
    ({"shape": [2, 63]}, "malformed"),
    ({"shape": [-2, -64]}, "malformed"),
    ({"shape": [1] * 8 + [64], "nbytes": 68}, "malformed"),
    ({"shape": "2, 64"}, "malformed"),
    ({"dtype": "Q9_9"}, "malformed"),
    ({"name": 7}, "malformed"),
    ({"path": None}, "malformed"),
    ({"path": "m.gguf"}, "malformed"),
    ({"path": "/gone/m.gguf"}, "/gone/m.gguf is gone"),
    ({"path": "/dev"}, "/dev is gone"),
    ({"path": "/etc/passwd"}, "/etc/passwd, which is no GGUF file"),
    ({"path": "/a\0b"}, "/a\0b"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str, tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, [{**entry, **changes}])
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "{}", "[7]", "[{}]", "[" * 10_000, "nothing"])
def test_what_is_no_list_of_tensors_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensors\.json"):
        read(tmp_path, text)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"a\.weight stands in m\.gguf and m\.gguf"):
        read(tmp_path, [entry, entry])
