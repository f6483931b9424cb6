"""The latency search on problems as numbers: what it claims is true, and it comes to an end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from peerllm.planner.latency import assignment_search
from peerllm.planner.latency.assignment_problem import AssignmentProblem, interchangeable_devices, placement_cost
from peerllm.planner.latency.equal_blocks import head_search
from peerllm.planner.latency.equal_blocks.block_problem import equal_blocks
from peerllm.planner.latency.equal_blocks.head_search import HeadSearch
from peerllm.planner.latency.latency_plan import assignment_problem
from peerllm.planner.latency.mixed_layers import gap_search
from peerllm.planner.latency.mixed_layers.gap_search import Assignment, GapSearch
from peerllm.planner.latency.mixed_layers.label_setting import LabelSetting
from peerllm.planner.latency.mixed_layers.layer_runs import layer_runs
from peerllm.planner.latency.mixed_layers.memory_relaxation import initial_memory_price, memory_bound, visit_table
from peerllm.planner.latency.mixed_layers.usable_memory import UsableMemory
from tests.planner.instances import hub_household
from tests.planner.problems import least, random_problem
from tests.sizes import FULL

BLOCK = 60  # problems
BLOCKS = range(100 if FULL else 1)


def check(asked: AssignmentProblem, found: Assignment, best: float) -> None:
    """Nothing claimed is false."""
    tolerance = 1e-9 * best if np.isfinite(best) else 0.0
    assert found.bound <= best + tolerance
    if not found.placement:
        assert not found.proven or np.isinf(best), "it was possible"
        return
    used = [
        sum(asked.memory[i, j] for i, home in enumerate(found.placement) if home == j) for j in range(len(asked.room))
    ]
    assert all(asked.room[home] >= used[home] for home in found.placement)
    assert found.cost == pytest.approx(placement_cost(asked, found.placement)) and found.cost >= best - tolerance
    assert found.cost <= best + tolerance or not found.proven, "it was not the best"


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_claimed_is_true(block: int) -> None:
    unproven = 0
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        asked = random_problem(seed)
        best, found = (
            least(asked),
            (assignment_search.cheapest_assignment if seed % 2 else assignment_search.search_mixed_layers)(asked),
        )
        check(asked, found, best)
        unproven += not found.proven
    assert unproven <= BLOCK // 20, "so small a problem is solved"


@pytest.mark.parametrize("block", BLOCKS)
def test_hurried_searches_claim_nothing_false(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poor prices and hardly any labels: the search has to do what elsewhere the bounds spare it."""
    monkeypatch.setattr(assignment_search, "WIDTHS", {True: (2, 4, 4000), False: (2,)})
    monkeypatch.setattr(gap_search, "STEPS", 2)
    monkeypatch.setattr(gap_search, "WIDE_PASS", 4)
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        asked = random_problem(seed)
        check(asked, assignment_search.search_mixed_layers(asked), least(asked))
        alone = GapSearch(asked, no_relays=True)
        alone.close_gap((4,), 10**8)
        check(asked, alone.result(), least(asked))


def star(seed: int) -> AssignmentProblem:
    """Devices that reach nobody but the source, with hardly room enough; two kinds of blocks."""
    r = np.random.default_rng(seed)
    layers, devices = 9, 4
    cut = int(r.integers(4, layers - 1))
    cost = np.tile(r.uniform(1, 5, devices), (layers, 1))
    memory = np.full((layers, devices), 10)
    cost[cut:] *= r.uniform(0.5, 2)
    memory[cut:] = 15
    memory[-1] = 3
    cost[:2, 1:] = np.inf
    links = np.full((devices, devices), np.inf)
    links[0], links[:, 0] = r.uniform(0.5, 2, devices), r.uniform(0.5, 2, devices)
    np.fill_diagonal(links, 0.0)
    room = r.integers(10, 45, devices)
    room[0] = r.integers(30, 65)
    return AssignmentProblem(cost, np.tile(links, (layers, 1, 1)), links[:, 0].copy(), memory, room)


@pytest.mark.timeout(60)
def test_a_star_of_devices_is_divided() -> None:
    feasible = 0
    for seed in (*range(8 if FULL else 2), 20, 21):
        asked = star(seed)
        best, found = least(asked), assignment_search.cheapest_assignment(asked)
        check(asked, found, best)
        assert found.proven and bool(found.placement) == np.isfinite(best)
        feasible += bool(found.placement)
    assert feasible


@pytest.mark.timeout(60)
def test_no_way_home_is_no_way() -> None:
    for seed in range(20):
        asked = replace(random_problem(seed), back=np.full(len(random_problem(seed).room), np.inf))
        found = assignment_search.search_mixed_layers(asked)
        assert not found.placement and found.proven


@pytest.mark.timeout(60)
def test_what_costs_nothing_is_found_and_proven() -> None:
    for seed in range(6 if FULL else 2):
        asked = random_problem(seed)
        asked = replace(
            asked, cost=np.zeros_like(asked.cost), hop=np.zeros_like(asked.hop), back=np.zeros_like(asked.back)
        )
        found = assignment_search.search_mixed_layers(asked)
        assert found.proven and (found.cost == 0.0 or np.isinf(least(asked)))


def test_rooms_beyond_counting_are_room_enough() -> None:
    for seed in range(10 if FULL else 1):
        asked = random_problem(seed)
        enough = assignment_search.search_mixed_layers(
            replace(asked, room=np.full(len(asked.room), asked.memory.sum()))
        )
        for room in (2**61, 2**62, 2**63 - 1):
            assert assignment_search.search_mixed_layers(replace(asked, room=np.full_like(asked.room, room))) == enough


def test_label_setting_gives_up_when_its_budget_is_spent() -> None:
    asked = star(20)
    held = visit_table(asked, layer_runs(asked))
    labels = LabelSetting(
        held,
        UsableMemory(asked),
        memory_bound(held, initial_memory_price(held)),
        np.inf,
        interchangeable_devices(asked),
    )
    assert labels.run(4000, budget=1) is None and not labels.complete


def test_a_search_without_a_budget_claims_nothing() -> None:
    given_up = 0
    for seed in range(60 if FULL else 20):
        asked = random_problem(seed)
        search = GapSearch(asked)
        search.close_gap((1,), -1)
        check(asked, search.result(), least(asked))
        given_up += not search.result().placement and not search.result().proven
    assert given_up


def test_hurried_head_searches_claim_nothing_false(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one label and no local search the best is often missed; then it is not called proven."""
    monkeypatch.setattr(head_search, "WIDTHS", {True: (1,), False: (1,)})
    monkeypatch.setattr(head_search, "iterated_local_search", lambda *_: None)
    poor = 0
    for seed in range(120 if FULL else 30):
        i = hub_household(seed)
        order = (i.source, *sorted(set(i.devices) - {i.source}))
        asked = assignment_problem(i.model, i.devices, i.links, order, workload=i.workload, working=i.working)
        blocks, best = equal_blocks(asked), least(asked)
        assert blocks is not None
        search = HeadSearch(blocks, partial(placement_cost, asked))
        search.run()
        assert search.bound <= best * (1 + 1e-9) and search.best >= best * (1 - 1e-9), f"seed {seed}"
        poor += search.best > best * (1 + 1e-9)
    assert poor


@pytest.mark.parametrize(("gap", "proven"), [(0.0, True), (1e-11, True), (1e-9, False), (1e-4, False)])
def test_a_plan_is_proven_only_if_its_bound_meets_it(gap: float, proven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spent:
        """A search that ended with a gap."""

        best, bound, placement, spent = 10.0, 10.0 * (1 - gap), (0, 0, 1), True

        def __init__(self, *_: object) -> None: ...
        def run(self) -> None: ...

    monkeypatch.setattr(assignment_search, "HeadSearch", Spent)
    monkeypatch.setattr(assignment_search, "equal_blocks", lambda _: "blocks")
    found = assignment_search.cheapest_assignment(star(20))
    assert found.proven == proven and found.placement == (0, 0, 1)
    assert found.bound == (10.0 if proven else 10.0 * (1 - gap))

    search = GapSearch(star(20))
    search.best, search.placement, search.bound = 10.0, (0, 0, 1), 10.0 * (1 - gap)
    assert search.done == search.result().proven == proven
