"""The cut of prompts: the recurrence against the simulator, the choice against every other, and the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.planner.cost.layer_costs import pass_ms
from peerllm.planner.cost.prediction import predict_latency
from peerllm.planner.cost.working_space import MAX_CHUNK, MIN_CHUNK, MOST_CHUNK
from peerllm.planner.transfers.prompt_chunks import (
    CLOSE,
    GROWTH,
    LONGEST,
    MOST_WAIT_MS,
    MOST_WAIT_STEPS,
    Pipeline,
    in_chunks,
    sizes,
)
from peerllm.types import MAX_CUTS, DeviceProfile, LinkProfile, Plan, Workload, chunk_of, pieces_of
from tests.planner.simulator.rings import Ring, at_random, by_hand
from tests.sizes import examples

SHAPES = st.sampled_from(["once", "head"])
SEEDS = st.integers(0, 10_000)


def pipeline(ring: Ring) -> Pipeline:
    return Pipeline(*ring.where)


def simulated(ring: Ring, prompt: int, chunk: int) -> float:
    (first,) = ring.run(Workload(prompt, 1, prompt_chunk=chunk)).time_to_first_token_ms
    return first


def paced(computes: list[float], each: list[float], hops: list[float], nbytes: int = 0, mbps: float = 8.0) -> Pipeline:
    """Stages that take `computes` ms for a pass and `each` ms more for a token of it; see rings.by_hand."""
    ring = by_hand(computes, hops, chain_bytes=nbytes)
    devices = {}
    for name, ms, more in zip(ring.devices, computes, each, strict=True):
        times = {"embedding": ((1, 0.0),), "block": ((1, ms + more), (2048, ms + 2048 * more)), "head": ((1, 0.0),)}
        devices[name] = DeviceProfile(name, name, 1, times)
    links = {pair: replace(link, mbps=mbps) for pair, link in ring.links.items()}
    return Pipeline(ring.model, devices, links, ring.stages)


@settings(max_examples=examples(150))
@given(SEEDS, SHAPES, st.integers(1, 300), st.integers(1, 300))
def test_the_recurrence_is_what_the_simulator_does(seed, shape, prompt, chunk):
    ring, *_ = at_random(seed, shape)
    assert pipeline(ring).first_token_ms(prompt, chunk) == pytest.approx(simulated(ring, prompt, chunk))


@settings(max_examples=80)
@given(SEEDS, st.integers(1, 120), st.integers(1, 60))
def test_where_devices_are_visited_again_it_stays_between_the_bounds(seed, prompt, chunk):
    ring, *_ = at_random(seed, "visits")
    pieces = pieces_of(prompt, chunk)
    found = pipeline(ring).first_token_ms(prompt, chunk)
    assert found <= pass_ms(*ring.where, pieces) * (1 + 1e-9), "overlapping is no slower than taking turns"
    assert found >= pass_ms(*ring.where, pieces[-1:]) * (1 - 1e-9), "the last chunk goes all the way"


@settings(max_examples=60)
@given(SEEDS, SHAPES, st.integers(1, 400), st.integers(1, 200))
def test_the_chosen_chunk_is_the_largest_that_is_close_to_the_best_of_all(seed, shape, prompt, most):
    ring, *_ = at_random(seed, shape)
    times = {size: simulated(ring, prompt, size) for size in sizes(most)}
    chosen = pipeline(ring).best_chunk(prompt, most)
    enough = min(times.values()) * (1 + CLOSE)
    assert times[chosen] <= enough * (1 + 1e-9)
    assert all(ms > enough * (1 - 1e-9) for size, ms in times.items() if size > chosen)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4),
    st.integers(1, 700),
)
def test_no_chunk_at_all_is_much_better(stages, prompt):
    """Also of the sizes between the powers of two that are tried."""
    made = paced([float(a) for a, _, _ in stages], [b / 10 for _, b, _ in stages], [float(c) for _, _, c in stages])
    chosen = made.first_token_ms(prompt, made.best_chunk(prompt, MAX_CHUNK))
    assert chosen <= 1.5 * min(made.first_token_ms(prompt, chunk) for chunk in range(MIN_CHUNK, MAX_CHUNK + 1))


@settings(max_examples=30)
@given(SEEDS, SHAPES, st.integers(1, 3000), st.integers(1, MAX_CHUNK))
def test_cuts_hold_for_all_prompts_and_are_bounded(seed, shape, longest, most):
    ring, *_ = at_random(seed, shape)
    made = pipeline(ring)
    cuts = made.cuts(longest, most)
    starts = [least for least, _ in cuts]
    assert starts[0] == 1 and starts == sorted(set(starts)) and len(cuts) <= MAX_CUTS
    assert {chunk for _, chunk in cuts} <= set(sizes(most)) and max(starts) <= longest
    for least in starts:
        assert chunk_of(cuts, least) == made.best_chunk(least, most)
    assert chunk_of(cuts, 10 * LONGEST) == cuts[-1][1]


def test_between_two_starts_the_cut_is_nearly_as_good_as_its_own():
    made = paced([20.0, 20.0], [0.8, 0.8], [0.5, 0.5])
    cuts = made.cuts(2048, MAX_CHUNK)
    assert len(cuts) > 2, "short prompts and long ones are cut differently"
    for prompt in range(1, 2049, 13):
        best = min(made.first_token_ms(prompt, size) for size in sizes(MAX_CHUNK))
        assert made.first_token_ms(prompt, chunk_of(cuts, prompt)) <= best * GROWTH


def test_one_device_is_given_the_largest_chunks():
    alone = paced([40.0], [0.5], [])
    assert alone.cuts(2048, MAX_CHUNK) == ((1, MAX_CHUNK),)
    assert alone.first_token_ms(1024, 128) == pytest.approx(8 * 40 + 1024 * 0.5)


def test_two_equal_devices_are_used_at_once():
    two = paced([4.0, 4.0], [0.5, 0.5], [0.2, 0.2])
    whole = two.first_token_ms(1024, 1024)
    chunk = chunk_of(two.cuts(1024, MAX_CHUNK), 1024)
    assert chunk < 1024 and two.first_token_ms(1024, chunk) <= 0.6 * whole < two.first_token_ms(1024, 16)
    assert chunk_of(two.cuts(1024, MAX_CHUNK), 20) >= 20, "not worth a second pass"
    assert chunk_of(two.cuts(1024, MAX_CHUNK), 100) < 100


def test_without_hops_and_costs_of_a_pass_the_smallest_chunk_wins():
    free = paced([0.0] * 4, [1.0] * 4, [0.0] * 4)
    assert free.best_chunk(1024, MAX_CHUNK) == MIN_CHUNK
    assert free.first_token_ms(1024, 16) == pytest.approx(1024 + 3 * 16)
    assert free.best_chunk(1, MAX_CHUNK) == MAX_CHUNK
    assert paced([0.0], [0.0], []).best_chunk(1024, MAX_CHUNK) == MAX_CHUNK, "of what takes no time the largest"


def test_a_slow_link_is_a_resource_like_a_device():
    """Bytes make small chunks, which begin to travel early; latency makes few."""
    bytes_bound = paced([1.0, 1.0], [0.01, 0.01], [0.0, 0.0], nbytes=4000, mbps=8.0)  # 4 ms a token
    assert bytes_bound.first_token_ms(64, 16) == pytest.approx(1 + 0.16 + 4 * 64 + 1.16 + 4, rel=0.01)
    assert bytes_bound.best_chunk(64, 64) == 64, "what computing overlaps is next to nothing"
    far = paced([1.0, 1.0], [0.1, 0.1], [80.0, 80.0])
    assert far.best_chunk(256, MAX_CHUNK) == MAX_CHUNK
    assert far.best_chunk(256, 256) == 256, "each chunk holds the link for its latency"


def test_no_step_waits_long_for_a_chunk():
    quick = paced([5.0, 5.0], [0.5, 0.5], [0.1, 0.1])
    assert quick.most_chunk(MAX_CHUNK) == MAX_CHUNK
    slow = paced([5.0, 30.0], [0.5, 6.0], [0.1, 0.1])
    found = slow.most_chunk(MAX_CHUNK)
    assert found == 64 and 30 + found * 6 <= MOST_WAIT_MS < 30 + 2 * found * 6
    slower = paced([5.0, 600.0], [0.5, 30.0], [0.1, 0.1])  # where a step takes long itself, a chunk may too
    assert slower.most_chunk(MAX_CHUNK) == MAX_CHUNK and MOST_WAIT_STEPS * 630 > 600 + 128 * 30
    exactly = paced([5.0, 20.0], [0.5, 7.5], [0.1, 0.1])
    assert exactly.most_chunk(MAX_CHUNK) == 64 and MOST_WAIT_MS == 20 + 64 * 7.5
    hopeless = paced([5.0, 0.0], [0.5, 100.0], [0.1, 0.1])
    assert hopeless.most_chunk(MAX_CHUNK) == MIN_CHUNK and hopeless.most_chunk(7) == 7


@pytest.mark.parametrize("most", [1, 15, 16, 17, 100, 128, MOST_CHUNK])
def test_sizes_rise_to_the_most(most):
    found = sizes(most)
    assert found == sorted(set(found)) and found[-1] == most and all(size >= MIN_CHUNK for size in found[:-1])


def test_a_plan_is_told_when_its_first_token_comes():
    ring = by_hand([3.0, 5.0], [1.0, 1.0])
    work = Workload(64, 4)
    plan = Plan(ring.stages, predict_latency(*ring.where, work))
    cut = in_chunks(plan, pipeline(ring), 64, ((1, 128), (50, 16)))
    assert cut.predicted.time_to_first_token_ms == pytest.approx(simulated(ring, 64, 16))
    assert replace(cut.predicted, time_to_first_token_ms=plan.predicted.time_to_first_token_ms) == plan.predicted
    assert LinkProfile(1.0, 8.0) in ring.links.values()
