"""The demo's limits: who holds the model with them, and who does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo import FEWER_SLOTS, MOST_CONTEXT, SLOTS
from peerllm.cli.demo.demo_memory import ModelBytes, even_runs, limits, replaceable_limit, sizes_of
from peerllm.daemon.decide.demand import draw_up
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.facade import RunOptions
from peerllm.engine.backends import Backends
from peerllm.engine.messages import Inspect, Inspected
from peerllm.errors import InfeasibleError, ModelError
from tests.daemon.house import hello


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


@settings(max_examples=50)
@given(
    blocks=st.integers(1, 40),
    size=st.integers(1000, 10**9),
    slot=st.integers(1, 10**8),
    percent=st.integers(0, 300),
    working=st.integers(0, 10**9),
    devices=st.integers(2, 6),
)
def test_all_hold_the_model_for_all_and_any_but_one_for_fewer(
    blocks: int, size: int, slot: int, percent: int, working: int, devices: int
) -> None:
    ends = size * percent // 100
    full, fewer = (ModelBytes(ends // 9, (size + n * slot,) * blocks, ends, working + n) for n in (4, 2))
    if devices > blocks:
        with pytest.raises(ModelError, match="too few"):
            replaceable_limit(full, fewer, devices)
        return
    limit = replaceable_limit(full, fewer, devices)

    def held(sizes: ModelBytes, count: int) -> bool:
        """Embedding and head on the first, then whole blocks wherever there is room."""
        room, ends = limit - sizes.working, sizes.embedding + sizes.head
        return room >= ends and (room - ends) // sizes.blocks[0] + (count - 1) * (room // sizes.blocks[0]) >= blocks

    assert held(full, devices) and held(fewer, devices - 1)
    if blocks >= devices**2 and percent <= 80:  # else it may be as coarse that one device less needs no more of each
        assert not held(full, devices - 1)


def test_one_device_holds_all() -> None:
    sizes = ModelBytes(5, (10,) * 3, 7, 1)
    assert replaceable_limit(sizes, sizes, 1) == sizes.total


@pytest.fixture(scope="module")
def built_in() -> Inspected:
    return Backends().inspect(Inspect(0, str(MODEL_DIR), "float32", "none"))


@pytest.mark.parametrize(("here", "slots"), [("abc", SLOTS), ("ab", FEWER_SLOTS), ("ac", FEWER_SLOTS), ("a", 0)])
def test_the_planner_uses_all_of_three_and_goes_on_with_any_two(built_in: Inspected, here: str, slots: int) -> None:
    sizes, fewer = (sizes_of(MODEL_DIR, count, MOST_CONTEXT) for count in (SLOTS, FEWER_SLOTS))
    lent = replaceable_limit(sizes, fewer, 3)
    hellos = {device: replace(hello(device, lent), architectures=(built_in.architecture,)) for device in here}
    candidates = {device: Candidate(device, one, lent) for device, one in hellos.items()}
    options = RunOptions("builtin", context=sizes.context)
    if not slots:
        with pytest.raises(InfeasibleError):
            draw_up(options, built_in, candidates, "a")
        return
    found = draw_up(options, built_in, candidates, "a")
    assert (set(found.plan.devices), found.workload.sequences) == (set(here), slots)


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
    assert (sizes.context, sizes_of(MODEL_DIR, 1, 10**9).context) == (100, 2048)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        sizes_of(tmp_path, 1, 1)
