"""What bounds the latency search: under any prices no more than the optimum, and rooms rounded to what fills them."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from peerllm.planner.latency.assignment_problem import AssignmentProblem, placement_cost
from peerllm.planner.latency.latency_plan import assignment_problem
from peerllm.planner.latency.mixed_layers.layer_runs import layer_runs
from peerllm.planner.latency.mixed_layers.memory_relaxation import (
    initial_memory_price,
    memory_bound,
    relaxed_device_route,
    violations,
    visit_table,
)
from peerllm.planner.latency.mixed_layers.relay_hops import placement_over_relays
from peerllm.planner.latency.mixed_layers.usable_memory import MOST_SUMS, UsableMemory
from peerllm.planner.routing.bundle_method import BundleMethod
from tests.planner.instances import hub_household, instance
from tests.sizes import FULL


def problem(i) -> AssignmentProblem:
    order = (i.source, *sorted(set(i.devices) - {i.source}))
    return assignment_problem(i.model, i.devices, i.links, order, workload=i.workload, working=i.working)


def cheapest(asked: AssignmentProblem) -> float:
    """Over every assignment."""
    layers, devices = asked.cost.shape
    homes = np.array(list(product(range(devices), repeat=layers)))
    rows = np.arange(layers)
    used = [np.where(homes == j, asked.memory[rows, homes], 0).sum(axis=1) for j in range(devices)]
    homes = homes[(asked.room >= np.array(used).T).all(axis=1)]
    total = asked.cost[rows, homes].sum(axis=1) + asked.back[homes[:, -1]]
    total += asked.hop[rows[:-1], homes[:, :-1], homes[:, 1:]].sum(axis=1)
    return total.min(initial=np.inf)


@pytest.mark.parametrize("apart", [False, True])
def test_no_price_bounds_above_the_optimum(apart):
    r = np.random.default_rng(1)
    finite, seeds = 0, range(120 if FULL else 50)
    for seed in seeds:
        asked = problem(hub_household(seed, seed % 3) if seed % 2 else instance(seed, 4 + seed % 3, 3))
        held, best = visit_table(asked, layer_runs(asked, no_relays=apart)), cheapest(asked)
        finite += np.isfinite(best)
        start = initial_memory_price(held)
        for _ in range(6):
            scale = r.choice([0.0, 0.1, 1.0, 10.0], (len(start), 1)) * start.max(initial=1.0)
            price = start * r.choice([0.0, 1.0]) + r.random(start.shape) * scale
            assert memory_bound(held, price).value <= best * (1 + 1e-9)
    assert finite > len(seeds) // 2


def test_the_ascent_ends_at_or_below_the_optimum_and_gets_near():
    gaps, seeds = [], range(40 if FULL else 16)
    for seed in seeds:
        asked = problem(hub_household(seed, 2))
        held, best = visit_table(asked, layer_runs(asked)), cheapest(asked)
        shape = held.prices

        def solve(price, held=held, shape=shape):
            return memory_bound(held, price.reshape(shape))

        def judge(found, held=held):
            return violations(held, found, relaxed_device_route(held, found))[0].ravel(), False

        found, _, _ = BundleMethod(solve, judge, patient=True).maximise(initial_memory_price(held).ravel(), 1e300, 150)
        if np.isfinite(best):
            assert found.value <= best * (1 + 1e-9)
            gaps.append(1 - found.value / best)
    assert len(gaps) > len(seeds) // 2 and np.median(gaps) < 0.1


def test_relays_keep_what_every_device_holds():
    """Relays only move layers about within runs: no device holds more, and no way gets dearer."""
    r = np.random.default_rng(2)
    for seed in range(200):
        asked = problem(hub_household(seed, seed % 3))
        layers, devices = asked.cost.shape
        homes = (0, 0, *r.integers(0, devices, layers - 2).tolist())
        way = [(homes[i], i) for i in range(layers) if i == layers - 1 or homes[i] != homes[i + 1]]
        relayed = placement_over_relays(asked, layer_runs(asked), way)
        assert placement_cost(asked, relayed) <= placement_cost(asked, homes) * (1 + 1e-12)
        for j in range(devices):
            sizes = [sum(asked.memory[i, j] for i, home in enumerate(each) if home == j) for each in (homes, relayed)]
            assert sizes[0] == sizes[1]


def test_rooms_are_rounded_down_to_what_layers_fill():
    r = np.random.default_rng(3)
    for _ in range(40):
        memory = r.integers(0, 30, (8, 3))
        memory[:, 1] = memory[:, 0]
        room = r.integers(0, 120, 3)
        fillings = UsableMemory(AssignmentProblem(np.zeros((8, 3)), np.zeros((8, 3, 3)), np.zeros(3), memory, room))
        i, left = int(r.integers(0, 8)), np.array([r.integers(0, room + 1) for _ in range(5)])
        for j in range(3):
            behind = memory[i + 1 :, j].tolist()
            sums = {sum(some) for n in range(len(behind) + 1) for some in combinations(behind, n)}
            assert [max(s for s in sums if s <= x) for x in left[:, j]] == fillings.usable(left, i)[:, j].tolist()


def test_too_many_sums_are_not_counted():
    memory = 2 ** np.arange(20)[:, None]
    fillings = UsableMemory(
        AssignmentProblem(np.zeros((20, 1)), np.zeros((20, 1, 1)), np.zeros(1), memory, np.array([2**20]))
    )
    assert MOST_SUMS < 2**19
    assert fillings.usable(np.array([[2**20], [1]]), 0).tolist() == [[2**20 - 2], [1]]
    assert fillings.usable(np.array([[2**20], [1]]), 17).tolist() == [[2**18 + 2**19], [0]]
