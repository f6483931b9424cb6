"""Events by hand, and what must hold of every run: resources do one thing at a time and no work is lost."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest

from peerllm.errors import BadInputError, InfeasibleError
from peerllm.planner.simulator import simulation
from peerllm.planner.simulator.run_report import SimulatedRun
from peerllm.planner.simulator.simulated_schedules import SCHEDULES
from peerllm.types import DeviceProfile, Medium, Workload
from tests.planner.simulator.rings import Ring, at_random, by_hand

WORK = Workload(prompt_tokens=11, output_tokens=6, prompt_chunk=4)


def times(run, kind, resource):
    found = [(s.group, s.step, s.start_ms, s.end_ms) for s in run.events if (s.kind, s.resource) == (kind, resource)]
    return sorted(found, key=lambda one: one[2])


def test_two_devices_by_hand_without_bubbles():
    run = by_hand([2, 3], [1, 1]).run(micro_batches=2, steps=2, prefill=False)
    assert times(run, "compute", "d0") == [(0, 1, 0, 2), (1, 1, 2, 4), (0, 2, 7, 9), (1, 2, 10, 12)]
    assert times(run, "transfer", "d0 to d1") == [(0, 1, 2, 3), (1, 1, 4, 5), (0, 2, 9, 10), (1, 2, 12, 13)]
    assert times(run, "compute", "d1") == [(0, 1, 3, 6), (1, 1, 6, 9), (0, 2, 10, 13), (1, 2, 13, 16)]
    assert times(run, "transfer", "d1 to d0") == [(0, 1, 6, 7), (1, 1, 9, 10), (0, 2, 13, 14), (1, 2, 16, 17)]
    assert run.returns == ((0, 7, 14), (0, 10, 17))
    assert (run.makespan_ms, run.tokens, run.step_ms) == (17, 4, 31 / 4)
    assert run.utilisation("compute") == {"d0": 8 / 17, "d1": 12 / 17}
    assert run.stage_utilisation() == {0: 8 / 17, 1: 12 / 17}
    assert run.waiting_ms("compute") == {"d0": 2 / 4, "d1": 1 / 4}


def test_two_devices_by_hand_with_bubbles_and_in_turn():
    ring = by_hand([2, 3], [1, 1])
    assert ring.run(schedule="bubble", micro_batches=2, steps=2, prefill=False).returns == ((0, 7, 17), (0, 10, 20))
    assert ring.run(schedule="sequential", micro_batches=2, steps=2, prefill=False).returns == (
        (0, 7, 21),
        (0, 14, 28),
    )


def test_a_medium_carries_one_transfer_at_a_time():
    """Both hops take 4 ms of air: two groups keep it busy, though device and link would be free for more."""
    air = Medium("air", frozenset({("d0", "d1"), ("d1", "d0")}))
    ring = by_hand([1, 1], [0, 0], [air], chain_bytes=4000)
    run = ring.run(micro_batches=2, steps=40, prefill=False)
    assert run.steady_tokens_per_second == pytest.approx(1000 / 8)
    assert run.utilisation("air")["air"] > 0.95
    alone = by_hand([1, 1], [0, 0], chain_bytes=4000).run(micro_batches=2, steps=40, prefill=False)
    assert alone.steady_tokens_per_second == pytest.approx(1000 / 5)


def test_links_of_two_media_do_not_lock_each_other_out():
    one = Medium("one", frozenset({("d0", "d1"), ("d1", "d0")}))
    two = Medium("two", frozenset({("d1", "d0"), ("d0", "d1")}))
    run = by_hand([1, 1], [0, 0], [two, one], chain_bytes=4000).run(micro_batches=3, steps=20, prefill=False)
    assert run.steady_tokens_per_second == pytest.approx(1000 / 8)


def test_latency_holds_the_link_unless_it_is_told_not_to():
    ring = by_hand([1, 1], [9, 9])
    held = ring.run(micro_batches=20, steps=60, prefill=False)
    assert held.steady_tokens_per_second == pytest.approx(1000 / 9, rel=0.01)
    free = ring.run(micro_batches=20, steps=60, prefill=False, latency_holds_link=False)
    assert free.steady_tokens_per_second == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", ["once", "head", "visits"])
def test_resources_do_one_thing_at_a_time_and_never_idle_while_work_waits(schedule, shape):
    for seed in range(15):
        ring, batch, groups = at_random(seed, shape, shared=seed % 2 == 0)
        run = ring.run(WORK, schedule=schedule, micro_batch=batch, micro_batches=groups)
        by_resource = {}
        for span in run.events:
            assert span.ready_ms <= span.start_ms <= span.end_ms
            by_resource.setdefault((span.kind, span.resource), []).append(span)
        for (kind, _), spans in by_resource.items():
            spans.sort(key=lambda span: (span.start_ms, span.end_ms))
            for before, after in pairwise(spans):
                assert before.end_ms <= after.start_ms
                if kind == "compute" or not ring.media:
                    assert after.start_ms == max(after.ready_ms, before.end_ms)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_work_is_done_once(schedule):
    """Counted by hand: three stages, a prompt of three pieces of which the last alone comes back."""
    ring = by_hand([1, 2, 3], [1, 1, 1])
    run = ring.run(WORK, schedule=schedule, micro_batch=2, micro_batches=3)
    computes = [s for s in run.events if s.kind == "compute"]
    transfers = [s for s in run.events if s.kind == "transfer"]
    prompts = 3 * 2  # groups of sequences
    assert len([s for s in computes if s.step == 0]) == prompts * 3 * 3
    assert len([s for s in transfers if s.step == 0]) == prompts * (3 + 3 + 1)
    assert len([s for s in computes if s.step]) == len([s for s in transfers if s.step]) == 3 * 5 * 3
    assert run.tokens == 3 * 2 * 6
    assert all(len(group) == 6 for group in run.returns)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_group_is_in_one_place_at_a_time(schedule):
    for seed in range(15):
        ring, batch, groups = at_random(seed, "visits")
        run = ring.run(WORK, schedule=schedule, micro_batch=batch, micro_batches=groups)
        for group in range(groups):
            steps = sorted((s.start_ms, s.end_ms) for s in run.events if s.group == group and s.step)
            assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(steps))
            assert steps[0][0] >= run.returns[group][0]


def test_decode_goes_before_prompts():
    overtaken = 0
    for seed in range(20):
        ring, batch, groups = at_random(seed)
        run = ring.run(WORK, micro_batch=batch, micro_batches=groups)
        computes = [s for s in run.events if s.kind == "compute"]
        for prompt in (s for s in computes if not s.step):
            waiting = [s for s in computes if s.resource == prompt.resource and s.step]
            assert not [s for s in waiting if s.ready_ms <= prompt.start_ms < s.start_ms]
            overtaken += any(prompt.ready_ms < s.ready_ms <= s.start_ms < prompt.start_ms for s in waiting)
    assert overtaken > 10


def test_in_turn_one_thing_happens_in_the_whole_household():
    ring, _, _ = at_random(3)
    run = ring.run(WORK, schedule="sequential", micro_batch=2, micro_batches=3)
    spans = sorted((s.start_ms, s.end_ms) for s in run.events)
    assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(spans))
    assert set(run.waiting_ms("compute").values()) == {0.0}


def test_with_bubbles_no_step_starts_before_all_have_the_last():
    ring, _, _ = at_random(3)
    run = ring.run(WORK, schedule="bubble", micro_batch=2, micro_batches=3)
    for step in range(1, 6):
        begun = min(s.start_ms for s in run.events if s.step == step)
        assert begun == max(times[step - 1] for times in run.returns)


def test_the_same_run_twice():
    ring, batch, groups = at_random(9, "head", shared=True)
    runs = [ring.run(WORK, micro_batch=batch, micro_batches=groups) for _ in range(2)]
    assert runs[0] == runs[1]


def test_what_takes_no_time():
    run = by_hand([0], [0]).run(steps=5, prefill=False)
    assert (run.makespan_ms, run.tokens_per_second, run.steady_tokens_per_second) == (0, inf, inf)
    assert run.utilisation("compute") == {"d0": 0.0}


def test_too_few_tokens_for_a_steady_rate():
    ring = by_hand([1, 5], [1, 1])
    assert ring.run(Workload(output_tokens=1)).steady_tokens_per_second is None
    assert ring.run(Workload(output_tokens=1)).step_ms is None
    assert ring.run(Workload(output_tokens=2), micro_batches=9).steady_tokens_per_second is None


def test_two_tokens_of_each_group_after_the_settling_are_enough_for_a_steady_rate():
    def steady(*returns: tuple[float, ...]) -> float | None:
        return SimulatedRun("no-bubble", 2, False, (), returns).steady_tokens_per_second

    assert steady((0, 3, 10)) == pytest.approx(2 * 1000 / 7)  # the first quarter of the ten milliseconds is left out
    assert steady((0, 2.5, 10)) == pytest.approx(2 * 1000 / 7.5)
    assert steady((0, 2.4, 10)) is None
    assert steady((0, 3, 10), (0, 2, 6, 10)) == pytest.approx(2 * (1000 / 7 + 1000 / 4))
    assert steady((0, 3, 10), (0, 2, 10)) is None


def test_devices_of_one_name_stay_apart():
    ring = by_hand([1, 2], [1, 1])
    devices = {one: DeviceProfile(one, "box", 1, device.layer_ms) for one, device in ring.devices.items()}
    run = Ring(ring.model, devices, ring.links, ring.stages).run(steps=1, prefill=False)
    assert run.utilisation("compute") == {"box (d0)": 1 / 5, "box (d1)": 2 / 5}


@pytest.mark.parametrize("prefill", [True, False])
def test_a_missing_link_or_measurement(prefill):
    ring = by_hand([1, 2], [1, 1])
    with pytest.raises(InfeasibleError, match="link that is not there"):
        Ring(ring.model, ring.devices, {}, ring.stages).run(prefill=prefill)
    unknown = {one: DeviceProfile(one, one, 1, {}) for one in ring.devices}
    with pytest.raises(InfeasibleError, match="never measured"):
        Ring(ring.model, unknown, ring.links, ring.stages).run(prefill=prefill)


@pytest.mark.parametrize(
    "how", [{"micro_batch": 0}, {"micro_batches": 0}, {"steps": -1}, {"steps": 0, "prefill": False}]
)
def test_nothing_to_simulate(how):
    with pytest.raises(BadInputError, match="nothing to simulate"):
        by_hand([1, 2], [1, 1]).run(**how)


def test_too_long_a_run_says_which_number_to_lower(monkeypatch):
    ring = by_hand([1, 2], [1, 1])
    with pytest.raises(BadInputError, match=r"2,000,016 spans .* lower the steps \(now 500000\)"):
        ring.run(Workload(output_tokens=500_001, prompt_tokens=5, prompt_chunk=1))
    with pytest.raises(BadInputError, match="lower the prompt's tokens"):
        ring.run(Workload(prompt_tokens=500_000, prompt_chunk=1))
    monkeypatch.setattr(simulation, "MAX_SPANS", 4 * 3 * 2)
    assert len(ring.run(steps=3, micro_batches=2, prefill=False).events) == 4 * 3 * 2
    with pytest.raises(BadInputError):
        ring.run(steps=4, micro_batches=2, prefill=False)


def test_spans_are_counted_as_they_fall(monkeypatch):
    """The bound is checked before the run with the number the run then has."""
    for seed in range(10):
        ring, batch, groups = at_random(seed, "visits", shared=True)
        many = len(ring.run(WORK, micro_batch=batch, micro_batches=groups).events)
        monkeypatch.setattr(simulation, "MAX_SPANS", many)
        ring.run(WORK, micro_batch=batch, micro_batches=groups)
        monkeypatch.setattr(simulation, "MAX_SPANS", many - 1)
        with pytest.raises(BadInputError):
            ring.run(WORK, micro_batch=batch, micro_batches=groups)
        monkeypatch.undo()


def test_decode_passes_vary_as_told_and_prompts_do_not():
    ring = by_hand([2, 3], [1, 1])
    run = ring.run(WORK, steps=40, micro_batch=2, micro_batches=2, spread={0: 0.1})
    took = {}
    for span in run.events:
        if span.kind == "compute":
            took.setdefault((span.stage, span.step > 0), []).append(round(span.end_ms - span.start_ms, 9))
    assert len(set(took[0, True])) == 80 and sum(took[0, True]) / 80 == pytest.approx(2, rel=0.1)
    assert set(took[1, True]) == {3.0} and len(set(took[0, False])) == 1, "stage 1 and prompts take what they take"
    again, other = (ring.run(WORK, steps=40, micro_batches=2, spread={0: 0.1}, seed=seed) for seed in (1, 2))
    assert again == ring.run(WORK, steps=40, micro_batches=2, spread={0: 0.1}, seed=1) != other
    still = ring.run(WORK, steps=40, micro_batches=2, spread={0: 0.9e-3})
    assert still == ring.run(WORK, steps=40, micro_batches=2)
