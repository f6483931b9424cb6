"""Simulated rates against the closed forms, which the simulator does not know."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.planner.cost.layer_costs import pass_ms
from peerllm.planner.cost.prediction import Lap, predict_latency
from peerllm.planner.simulator.run_report import formula_tokens_per_second
from peerllm.planner.simulator.simulated_schedules import SCHEDULES
from peerllm.types import Workload
from tests.planner.simulator.rings import at_random, by_hand
from tests.sizes import FULL

MS = st.integers(0, 400).map(lambda tenths: tenths / 10)


@settings(max_examples=60 if FULL else 30)
@given(st.lists(st.tuples(MS, MS), min_size=1, max_size=6), st.integers(1, 9), st.sampled_from(sorted(SCHEDULES)))
def test_each_resource_once_a_lap_reaches_the_formula(stations, groups, schedule):
    ring = by_hand([compute + 0.1 for compute, _ in stations], [hop for _, hop in stations])
    run = ring.run(schedule=schedule, micro_batches=groups, steps=60, prefill=False)
    expected = formula_tokens_per_second(ring.lap(), schedule, groups)
    assert run.steady_tokens_per_second == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_rings_of_batches_reach_the_formula(schedule):
    for seed in range(50 if FULL else 15):
        ring, batch, groups = at_random(seed)
        run = ring.run(schedule=schedule, micro_batch=batch, micro_batches=groups, steps=60, prefill=False)
        expected = formula_tokens_per_second(ring.lap(batch), schedule, groups)
        assert run.steady_tokens_per_second == pytest.approx(expected, rel=0.01), f"seed {seed}"


def test_head_on_the_source_earlier_stage_first_reaches_the_formula():
    for seed in [129, 195, 377, 399, *range(40 if FULL else 8)]:  # the first four lose up to 27 % by arrival
        ring, batch, groups = at_random(seed, "head")
        run = ring.run(micro_batch=batch, micro_batches=groups, steps=80, prefill=False, order="stage")
        expected = formula_tokens_per_second(ring.lap(batch), "no-bubble", groups)
        assert run.steady_tokens_per_second == pytest.approx(expected, rel=0.01), f"seed {seed}"


def test_two_visits_in_order_of_arrival_may_lose_as_documented():
    ring, batch, groups = at_random(399, "head")
    run = ring.run(micro_batch=batch, micro_batches=groups, steps=80, prefill=False, order="arrival")
    lost = 1 - run.steady_tokens_per_second / formula_tokens_per_second(ring.lap(batch), "no-bubble", groups)
    assert 0.2 < lost < 0.3


@pytest.mark.parametrize(("shape", "shared"), [("head", False), ("once", True), ("head", True)])
def test_no_pipeline_beats_the_formula(shape, shared):
    exact, seeds = 0, range(40 if FULL else 16)
    for seed in seeds:
        ring, batch, groups = at_random(seed, shape, shared)
        run = ring.run(micro_batch=batch, micro_batches=groups, steps=60, prefill=False)
        reached = run.steady_tokens_per_second / formula_tokens_per_second(ring.lap(batch), "no-bubble", groups)
        assert 0.5 < reached < 1.01, f"seed {seed}"
        exact += reached > 0.99
    assert exact >= 0.75 * len(seeds)


@pytest.mark.parametrize("chunk", [None, 8, 5])
def test_one_sequence_in_turn_takes_what_the_cost_model_predicts(chunk):
    work = Workload(prompt_tokens=20, output_tokens=7, prompt_chunk=chunk)
    for seed in range(30):
        ring, _, _ = at_random(seed, "visits")
        said = predict_latency(*ring.where, work)
        run = ring.run(work, schedule="sequential")
        assert run.time_to_first_token_ms == (pytest.approx(said.time_to_first_token_ms),)
        assert run.makespan_ms == pytest.approx(said.request_ms)
        assert run.tokens_per_second == pytest.approx(said.tokens_per_second)
        assert run.step_ms == pytest.approx(said.step_ms)


def test_chunks_that_follow_each_other_are_no_slower_than_in_turn():
    work, faster = Workload(prompt_tokens=20, output_tokens=1, prompt_chunk=5), 0
    for seed in range(30):
        ring, _, _ = at_random(seed)
        in_turn = pass_ms(*ring.where, work.pieces)
        first = ring.run(work).time_to_first_token_ms[0]
        assert first <= in_turn + 1e-9
        faster += first < 0.9 * in_turn
    assert faster > 10


def test_the_formulas():
    lap = Lap(2, 10.0, 4.0, "x")
    assert formula_tokens_per_second(lap, "no-bubble", 2) == 400
    assert formula_tokens_per_second(lap, "no-bubble", 3) == 500
    assert formula_tokens_per_second(lap, "bubble", 3) == pytest.approx(1000 * 6 / 18)
    assert formula_tokens_per_second(lap, "sequential", 3) == 200


def test_passes_that_vary_meet_in_queues_and_alone_they_do_not():
    """Two batches that fit each other exactly lose by meeting; one alone takes as long as the means say."""
    ring = by_hand([5, 5], [1, 1])
    vary = {"spread": {0: 0.4, 1: 0.4}, "prefill": False}
    exact = ring.run(micro_batches=2, steps=2000, prefill=False).steady_tokens_per_second
    varied = [ring.run(micro_batches=2, steps=2000, **vary, seed=seed).steady_tokens_per_second for seed in range(3)]
    assert all(0.75 * exact < rate < 0.97 * exact for rate in varied)
    assert varied[0] == ring.run(micro_batches=2, steps=2000, **vary).steady_tokens_per_second, "the same for each seed"
    assert len(set(varied)) == 3
    alone = ring.run(micro_batches=1, steps=4000, **vary).steady_tokens_per_second
    assert alone == pytest.approx(1000 / 12, rel=0.03)
    more = ring.run(micro_batches=6, steps=2000, **vary).steady_tokens_per_second
    assert more == pytest.approx(1000 / 5, rel=0.1), "with enough batches the busiest is never without work"
