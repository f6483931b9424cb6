"""The latency plan against brute force, and the speed a household needs."""

from __future__ import annotations

import math
import time

import pytest

from peerllm.errors import InfeasibleError
from peerllm.planner.latency import assignment_search
from peerllm.planner.latency.equal_blocks import head_search
from peerllm.planner.latency.latency_plan import assignment_problem, most_fillable, plan_latency
from peerllm.planner.latency.mixed_layers.layer_runs import layer_runs
from peerllm.types import DeviceProfile, Layer, LinkProfile, ModelProfile, Plan, Workload
from tests.planner.brute import assignments, fits, homes_of, least_request_ms, request_ms, requests_ms
from tests.planner.instances import EVERY_BLOCK, Instance, hub_household, instance, seeds, shape
from tests.sizes import FULL


def check(seed: int) -> Plan | None:
    return agrees(seed, instance(seed, *shape(seed)))


def agrees(seed: int, i: Instance) -> Plan | None:
    """The plan, which is the best there is; None if there is none."""
    expected = least_request_ms(*i.asked, working=i.working, head_on_source=i.head_on_source)
    try:
        plan = plan_latency(*i.asked, working_bytes=i.working, head_on_source=i.head_on_source)
    except InfeasibleError:
        assert math.isinf(expected), f"seed {seed}: a feasible instance was called infeasible"
        return None
    homes = homes_of(plan)
    assert homes[:2] == (i.source, i.source) and (not i.head_on_source or homes[-1] == i.source)
    assert fits(i.model, i.devices, homes, i.workload, i.working), f"seed {seed}: the plan breaks a limit"
    assert plan.predicted.request_ms == pytest.approx(request_ms(i.model, i.devices, i.links, homes, i.workload))
    assert plan.predicted.request_ms == pytest.approx(expected, rel=1e-9), f"seed {seed}"
    assert plan.optimal and plan.bound == plan.predicted.request_ms
    return plan


@pytest.mark.parametrize("block", EVERY_BLOCK)
def test_agrees_with_brute_force(block):
    feasible = sum(check(seed) is not None for seed in seeds(block))
    assert len(seeds(block)) * 0.4 < feasible < len(seeds(block)) * 0.95  # neither all trivial nor all hopeless


@pytest.mark.parametrize("block", range(20) if FULL else [4])
def test_agrees_with_brute_force_where_second_visits_pay(block):
    again = feasible = 0
    for seed in range(block * 40, (block + 1) * 40):
        plan = agrees(seed, hub_household(seed))
        feasible += plan is not None
        again += revisits(plan)
    assert feasible > 30 and again


@pytest.mark.parametrize("block", range(20) if FULL else [1])
def test_agrees_with_brute_force_where_second_visits_pay_and_blocks_are_of_two_kinds(block):
    again = feasible = 0
    for seed in range(block * 20, (block + 1) * 20):
        plan = agrees(seed, hub_household(seed, heavy=2 + seed // 8 % 2))
        feasible += plan is not None
        again += revisits(plan)
    assert feasible > 10 and again


def test_both_searches_agree_where_second_visits_pay():
    """The search for equal blocks finds what the search for mixed layers finds, whose relays are others."""
    relays, seeds = 0, range(80 if FULL else 15)
    for seed in seeds:
        i = hub_household(seed)
        order = (i.source, *sorted(set(i.devices) - {i.source}))
        problem = assignment_problem(i.model, i.devices, i.links, order, workload=i.workload, working=i.working)
        one, other = assignment_search.cheapest_assignment(problem), assignment_search.search_mixed_layers(problem)
        assert one.cost == pytest.approx(other.cost, rel=1e-9) and one.proven and other.proven, f"seed {seed}"
        relays += len(one.placement) > 0 and layer_runs(problem).relay.any()
    assert relays > len(seeds) // 4


def revisits(plan: Plan | None) -> bool:
    """Whether the plan visits a device other than the source twice, or the source in the middle."""
    if plan is None:
        return False
    visits = [stage.device for stage in plan.stages if stage.first_layer < plan.stages[-1].last_layer]
    return len(visits) > len(set(visits))


@pytest.mark.parametrize("seed", range(12))
def test_brute_force_agrees_with_its_own_plain_form(seed):
    """What is computed for all assignments at once is what the plain functions say of each."""
    i = instance(seed, 4 + seed % 2, 3)
    order = (i.source, *sorted(set(i.devices) - {i.source}))
    every = assignments(len(i.model.layers), 3)
    at_once = requests_ms(i.model, i.devices, i.links, order, i.workload, every)
    for value, homes in zip(at_once, every, strict=True):
        plain = request_ms(i.model, i.devices, i.links, tuple(order[j] for j in homes), i.workload)
        assert value == pytest.approx(plain)


def household(layers: int, count: int, alike: bool = False, tight: float = 1.2):
    blocks = tuple(Layer(f"b{i}", "block", 750, 1, 8192) for i in range(layers - 2))
    model = ModelProfile("big", (Layer("e", "embedding", 500, 0, 8192), *blocks, Layer("h", "head", 500, 0, 4)))
    total = sum(x.memory_bytes + 128 * x.kv_bytes_per_token for x in model.layers)
    shares = [1.0 if alike else 0.9 + (7 * i % 11) / 9 for i in range(count)]
    devices = {
        f"d{i:02}": DeviceProfile(
            f"d{i:02}",
            f"d{i:02}",
            int(total * tight * share / sum(shares)),
            {k: ((1, 6.0 if alike else 0.8 + (5 * i % 7)),) for k in ("embedding", "block", "head")},
        )
        for i, share in enumerate(shares)
    }
    links = {
        (a, b): LinkProfile(2.1 if alike else 0.3 + (3 * i + 5 * j) % 7 * 0.7, 1000)
        for i, a in enumerate(devices)
        for j, b in enumerate(devices)
        if a != b
    }
    return model, devices, links, "d00", Workload(32, 96, 1, 128)


@pytest.mark.parametrize(("layers", "count", "alike"), [(34, 3, True), (34, 8, False), (130, 8, False), (130, 8, True)])
def test_a_household_is_planned_quickly(layers, count, alike):
    started = time.perf_counter()
    plan = plan_latency(*household(layers, count, alike))
    assert time.perf_counter() - started < 10  # a second alone; the machine that tests may be busy
    gap = 1 - plan.bound / plan.predicted.request_ms
    assert plan.optimal if alike else gap < 0.08  # eight unequal devices, all of them full, are the hard case


def test_one_device_is_a_plan():
    model, devices, links, source, work = household(6, 3, tight=30)
    plan = plan_latency(model, devices, links, source, work)
    solo = plan_latency(model, {source: devices[source]}, {}, source, work)
    assert len(solo.stages) == 1 and plan.predicted.request_ms <= solo.predicted.request_ms


def test_what_is_missing_is_said():
    model, devices, links, source, work = household(10, 2, tight=0.5)
    with pytest.raises(InfeasibleError, match="are missing") as caught:
        plan_latency(model, devices, links, source, work)
    needed = sum(x.memory_bytes + 128 * x.kv_bytes_per_token for x in model.layers)
    lent = sum(d.memory_bytes for d in devices.values())
    assert caught.value.missing_bytes == needed - lent > 0


def test_the_layer_that_fits_nowhere_is_named():
    layers = (Layer("e", "embedding", 1, 0, 8), Layer("b0", "block", 1, 0, 8), Layer("wide", "block", 50, 0, 8))
    model = ModelProfile("m", (*layers, Layer("h", "head", 1, 0, 4)))
    speed = {k: ((1, 1.0),) for k in ("embedding", "block", "head")}
    devices = {name: DeviceProfile(name, name, 40, speed) for name in "ab"}
    links = {(a, b): LinkProfile(1, 100) for a, b in ("ab", "ba")}
    with pytest.raises(InfeasibleError, match=r"layer 2 \(wide\)") as caught:
        plan_latency(model, devices, links, "a", Workload(1, 1, 1, 1))
    assert caught.value.missing_bytes == 0


def test_beyond_the_cap_the_bound_is_still_proven(monkeypatch):
    """With room for one label per layer the answer may be poor, but its bound never lies."""
    for module in (assignment_search, head_search):
        monkeypatch.setattr(module, "WIDTHS", {True: (1,), False: (1,)})
    unproven = 0
    for seed in range(200) if FULL else range(120, 150):
        i = instance(seed, 6, 3)
        expected = least_request_ms(*i.asked, working=i.working, head_on_source=i.head_on_source)
        try:
            plan = plan_latency(*i.asked, working_bytes=i.working, head_on_source=i.head_on_source)
        except InfeasibleError:
            continue
        assert plan.bound <= expected * (1 + 1e-9) <= plan.predicted.request_ms * (1 + 2e-9)
        unproven += not plan.optimal
    assert unproven


@pytest.mark.parametrize(
    ("room", "filled"), [(-1, -1), (2, 0), (3, 3), (5, 5), (7, 6), (8, 8), (10, 8), (11, 11), (99, 11)]
)
def test_a_room_is_as_large_as_the_layers_that_fill_it(room, filled):
    assert most_fillable({3: 2, 5: 1}, room) == filled


def test_countless_ways_to_fill_a_room_are_not_counted():
    rare = {2 * (100 + k): 1 for k in range(13)}
    assert most_fillable({2000: 50, **dict(list(rare.items())[:12])}, 9001) < 9001, "4,096 sums of even sizes"
    assert most_fillable({2000: 50, **rare}, 9001) == 9001
    assert most_fillable({}, 7) == 7
