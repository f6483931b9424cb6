"""The demo's limits: each part fits its device, and no device could be missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import ModelBytes, even_runs, limits, sizes_of
from peerllm.errors import ModelError


@given(
    blocks=st.integers(1, 40),
    size=st.integers(1000, 10**9),
    embedding=st.integers(0, 10**9),
    working=st.integers(0, 10**9),
    devices=st.integers(1, 8),
)
def test_only_all_together_hold_the_model(blocks: int, size: int, embedding: int, working: int, devices: int) -> None:
    sizes = ModelBytes(embedding, (size,) * blocks, size // 10, working)
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


def test_sizes_are_those_of_the_planner() -> None:
    sizes = sizes_of(MODEL_DIR, 3, 100)
    more = sizes_of(MODEL_DIR, 3, 200)
    assert sizes.embedding == 0, "it is read from its file"
    assert len(sizes.blocks) == len(more.blocks) > 8
    assert all(0 < few < many for few, many in zip(sizes.blocks, more.blocks, strict=True))
    assert 0 < sizes.head == more.head
    assert 0 < sizes.working <= more.working


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        sizes_of(tmp_path, 1, 1)
