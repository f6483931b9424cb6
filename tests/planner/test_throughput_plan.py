"""The throughput plan against brute force: the same optimum, every limit kept, no claim that does not hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peerllm.errors import InfeasibleError
from peerllm.planner.routing.device_classes import device_classes
from peerllm.planner.routing.route_graph import capped, route_lap
from peerllm.planner.routing.route_relaxation import route_bound
from peerllm.planner.throughput import batch_size_search
from peerllm.planner.throughput.class_tables import class_tables
from peerllm.planner.throughput.subset_dp import least_ring
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.types import DeviceProfile, LinkProfile, Plan
from tests.planner.brute import (
    assignments,
    divides,
    divisions,
    fits,
    homes_of,
    most_tokens_per_second,
    pass_ms,
    prompt_of,
    rate,
    rates,
    roomy,
)
from tests.planner.instances import EVERY_BLOCK, Instance, instance, on_air, seeds, shape
from tests.sizes import FULL


def check_plan(i: Instance, plan: Plan) -> None:
    """The plan keeps every limit and is worth what it says."""
    homes, did = homes_of(plan), plan.predicted
    assert homes[:2] == (i.source, i.source) and (not i.head_on_source or homes[-1] == i.source)
    assert divides(homes) and fits(i.model, i.devices, homes, i.workload, i.working)
    b, m = did.micro_batch, did.micro_batches
    assert min(b, m) >= 1 and b * m <= i.workload.sequences
    assert did.tokens_per_second == pytest.approx(1000 * rate(i.model, i.devices, i.links, homes, b, m, i.media))
    step = pass_ms(i.model, i.devices, i.links, homes, [b], [b])
    first = pass_ms(i.model, i.devices, i.links, homes, prompt_of(i.workload), [1])
    assert did.step_ms == pytest.approx(step) and did.time_to_first_token_ms == pytest.approx(first)
    assert did.request_ms == pytest.approx(first + (i.workload.output_tokens - 1) * step)


def check(i: Instance) -> Plan | None:
    """The plan, or None where there is none; unless links share media it is proven."""
    ends = {"head_on_source": i.head_on_source, "media": i.media}
    expected = most_tokens_per_second(*i.asked, working=i.working, **ends)
    try:
        plan = plan_throughput(*i.asked, working_bytes=i.working, **ends)
    except InfeasibleError:
        assert expected == 0, "a feasible instance was called infeasible"
        return None
    check_plan(i, plan)
    did = plan.predicted.tokens_per_second
    assert 0 < did <= expected * (1 + 1e-9) <= plan.bound * (1 + 2e-9)
    if plan.optimal or not i.media:
        assert plan.optimal and plan.bound == did == pytest.approx(expected, rel=1e-9)
    return plan


@pytest.mark.parametrize("block", EVERY_BLOCK)
def test_agrees_with_brute_force(block):
    plans = [check(instance(seed, *shape(seed))) for seed in seeds(block)]
    assert len(plans) * 0.4 < sum(plan is not None for plan in plans) < len(plans) * 0.9  # not all trivial or hopeless


def test_shared_media_are_not_forgotten():
    """Where optimality is claimed it holds, and where not the bound does; and media do change the answer."""
    plans = [(seed, check(on_air(seed, *shape(seed)))) for seed in range(400 if FULL else 80)]
    found = [(seed, plan) for seed, plan in plans if plan is not None]
    assert any(plan.optimal for _, plan in found)
    slower = 0
    for seed, plan in found:
        i = on_air(seed, *shape(seed))
        free = most_tokens_per_second(*i.asked, working=i.working, head_on_source=i.head_on_source)
        slower += plan.predicted.tokens_per_second < free * (1 - 1e-9)
    assert slower > 2


@pytest.mark.parametrize("seed", range(12))
def test_brute_force_agrees_with_its_own_plain_form(seed):
    """What is computed for all assignments at once is what the plain functions say of each."""
    i = on_air(seed, 4 + seed % 2, 3)
    order = (i.source, *sorted(set(i.devices) - {i.source}))
    every = assignments(len(i.model.layers), 3)
    named = [tuple(order[j] for j in homes) for homes in every]
    good = roomy(i.model, i.devices, order, i.workload, i.working, every)
    assert good.tolist() == [fits(i.model, i.devices, homes, i.workload, i.working) for homes in named]
    assert len(divisions(len(i.model.layers), 3)) == sum(divides(homes) for homes in named)
    b, m = 1 + seed % 3, 1 + seed % 2
    at_once = rates(i.model, i.devices, i.links, order, every, b, m, i.media)
    for value, homes in zip(at_once, named, strict=True):
        if divides(homes):
            plain = rate(i.model, i.devices, i.links, homes, b, m, i.media)
            assert (math.isinf(value) and math.isinf(plain)) or value == pytest.approx(plain)


def test_hurried_searches_claim_nothing_false(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one label, no exact search and hardly any work plans are poor; bounds still hold, no poor plan is proven."""
    hurried = {"WIDTHS": (1,), "SMALL": 0, "LARGEST_STATES": 0, "STEPS": 1, "local_search_ring": lambda *_: (None, 0)}
    for name, value in hurried.items():
        monkeypatch.setattr(batch_size_search, name, value)
    poor = given_up = 0
    for seed in range(200) if FULL else range(40):
        i = instance(seed, 7, 4)
        expected = most_tokens_per_second(*i.asked, working=i.working, head_on_source=i.head_on_source)
        for budget in (0, 2000):
            monkeypatch.setattr(batch_size_search, "BUDGET", budget)
            try:
                plan = plan_throughput(*i.asked, working_bytes=i.working, head_on_source=i.head_on_source)
            except InfeasibleError as error:
                said = str(error)
                assert not expected or "though one may exist" in said
                given_up += expected > 0
                continue
            did = plan.predicted.tokens_per_second
            assert did <= expected * (1 + 1e-9) <= plan.bound * (1 + 2e-9)
            assert not plan.optimal or did == pytest.approx(expected, rel=1e-9)
            poor += did < expected * (1 - 1e-9)
    assert poor and given_up


def test_the_subset_program_finds_the_shortest_ring_at_the_cutoff_and_none_below() -> None:
    rings = 0
    for seed in range(40):
        i = instance(seed, 6, 3)
        graph = class_tables(*i.asked, i.working).graph(1, 1, False)
        if graph is None or not len(graph.class_size):
            continue
        routes = capped(graph, math.inf)
        free = route_bound(routes, np.zeros(len(graph.class_size)))
        best = least_ring(routes, free, 1e300)
        if best is None:
            continue
        ring, _ = route_lap(graph, best)
        assert least_ring(routes, free, ring) is not None
        assert least_ring(routes, free, ring * (1 - 1e-9)) is None or ring == 0
        rings += 1
    assert rings > 10


def test_devices_with_other_links_between_them_are_no_class() -> None:
    names = "sxy"
    devices = {name: DeviceProfile(name, name, 9, {"block": ((1, 1.0),)}) for name in names}
    links = {(a, b): LinkProfile(1.0, 100) for a in names for b in names if a != b}
    room = dict.fromkeys(names, 9)
    assert device_classes(devices, links, "sxy", room) == [["s"], ["x", "y"]]
    assert device_classes(devices, {**links, ("x", "y"): LinkProfile(2.0, 100)}, "sxy", room) == [["s"], ["x"], ["y"]]
    assert device_classes(devices, {**links, ("y", "s"): LinkProfile(2.0, 100)}, "sxy", room) == [["s"], ["x"], ["y"]]
    assert device_classes(devices, links, "sxy", {**room, "y": 8}) == [["s"], ["x"], ["y"]]
