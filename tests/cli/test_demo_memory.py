"""The demo's limits: each part fits its device, and no device could be missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerllm.cli.demo_memory import Sizes, even_runs, limits, sizes_of
from peerllm.errors import ModelError


@given(
    blocks=st.integers(1, 40),
    size=st.integers(1000, 10**9),
    embedding=st.integers(0, 10**9),
    working=st.integers(0, 10**9),
    devices=st.integers(1, 8),
)
def test_only_all_together_hold_the_model(blocks: int, size: int, embedding: int, working: int, devices: int) -> None:
    sizes = Sizes(embedding, (size,) * blocks, size // 10, working)
    if devices > blocks:
        with pytest.raises(ModelError, match="too few"):
            limits(sizes, devices)
        return
    found = limits(sizes, devices)
    found = [one - working for one in found]
    room = [(found[0] - sizes.embedding - sizes.head) // size, *(one // size for one in found[1:])]
    assert sum(room) == blocks, "every block has its place, and there is no place for one more"
    assert all(one >= 1 for one in room)
    assert devices == 1 or all(one < sizes.total - working for one in found)


def test_runs_differ_by_one_at_most() -> None:
    assert even_runs(12, 3) == [(0, 4), (4, 8), (8, 12)]
    assert even_runs(12, 5) == [(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)]


def write_model(path: Path, tensors: dict[str, list[int]], config: dict[str, int]) -> None:
    (path / "config.json").write_text(json.dumps(config))
    header = json.dumps(
        {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    )
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_sizes_from_headers(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        {
            "model.embed_tokens.weight": [100, 8],
            "model.layers.0.mlp.weight": [8, 8],
            "model.layers.1.mlp.weight": [8, 8],
            "model.norm.weight": [8],
        },
        {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100},
    )
    kv = 2 * 4 * (2 * 2) * 3 * 10
    sizes = sizes_of(tmp_path, 3, 10, element_bytes=4)
    assert (sizes.embedding, sizes.blocks, sizes.head) == (3200, (256 + kv, 256 + kv), 32)
    assert sizes.working > 0
    assert sizes_of(tmp_path, 3, 10).embedding == 1600


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 5) + b"hello", struct.pack("<Q", 2) + b"[]"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 4}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        sizes_of(tmp_path, 1, 1)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        sizes_of(tmp_path, 1, 1)
