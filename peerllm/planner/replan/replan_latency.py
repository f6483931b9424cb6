"""Re-planning for latency, exactly: the cost of moving is a sum over (layer, device), so one latency plan minimises it.

It is no such sum where new layers do not fit beside the old ones; there the search branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from math import inf

from peerllm.errors import InfeasibleError
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.replan.migration import RunningState, placement_of
from peerllm.planner.replan.net_value import SAME, ReplanChoice, ReplanProblem
from peerllm.types import DeviceId, Plan

MAX_SEARCHES = 12  # in one decision; then the best found is returned with its bound
Paused = frozenset[DeviceId]  # devices whose loading counts as pause
Blocked = frozenset[tuple[int, DeviceId]]  # layers that may not move there


def replan_for_latency(problem: ReplanProblem) -> ReplanChoice:
    """Best-first branch and bound: the plan of the greatest net value, with the bound proven."""
    s, requests, order = problem.state, problem.horizon.requests, count()
    places = [(i, d) for i in range(len(s.model.layers)) for d in s.devices]
    load = {place: s.load_ms(*place) for place in places}
    wait = {place: s.kv_ms(*place) for place in places}

    def search(paused: Paused, blocked: Blocked) -> Plan:
        extra = {
            (i, d): inf if (i, d) in blocked else ((1.0 if d in paused else problem.busy) * ms + wait[i, d]) / requests
            for (i, d), ms in load.items()
        }
        return fastest(s, problem, extra)

    free = fastest(s, problem, {})
    s.reachable()
    best: ReplanChoice | None = None
    waiting: list[tuple[float, int, Plan, Paused, Blocked]] = []
    searches, unproven = 0, -inf
    todo: list[tuple[Paused, Blocked]] = [(frozenset(), frozenset())]
    while True:
        for paused, blocked in todo:
            searches += 1
            try:
                plan = search(paused, blocked)
            except InfeasibleError:
                if best is None:
                    raise
                continue
            net_value = problem.net_value(plan.predicted, s.migration(placement_of(plan.stages)))
            if best is None or net_value > best.net_value:
                proven = free.optimal and plan.stages == free.stages
                known = replace(plan, optimal=proven, bound=min(free.bound, plan.predicted.request_ms))
                best = ReplanChoice(known, net_value, net_value)
            heappush(waiting, (plan.bound * requests, next(order), plan, paused, blocked))
        assert best is not None
        ceiling = max(-waiting[0][0] if waiting else -inf, unproven)
        if not waiting or searches >= MAX_SEARCHES or ceiling <= best.net_value + SAME * abs(best.net_value):
            return replace(best, bound=max(best.net_value, ceiling))
        least, _, plan, paused, blocked = heappop(waiting)
        todo = list(branches(s, plan, paused, blocked))
        if not todo:
            unproven = max(unproven, -least)  # no branch is left, so its bound stays open


def fastest(s: RunningState, problem: ReplanProblem, extra: dict[tuple[int, DeviceId], float]) -> Plan:
    """The plan with the least request time plus extra cost."""
    return plan_latency(
        s.model, s.devices, s.links, s.source, s.workload,
        working_bytes=s.working, head_on_source=problem.head_on_source, extra_ms=extra,
    )  # fmt: skip


def branches(s: RunningState, plan: Plan, paused: Paused, blocked: Blocked) -> Iterator[tuple[Paused, Blocked]]:
    """Either an overflowing device pauses to load, or one layer of a minimal overflowing set is not moved there."""
    new: dict[DeviceId, list[int]] = {}
    for i, home in enumerate(placement_of(plan.stages)):
        if not s.placement or s.placement[i] != home:
            new.setdefault(home, []).append(i)
    for device, layers in new.items():
        if s.serving and device not in paused and s.overflows(device, layers):
            overflow = list(layers)
            for i in layers:
                if s.overflows(device, [x for x in overflow if x != i]):
                    overflow.remove(i)
            yield paused | {device}, blocked
            for i in overflow:
                yield paused, blocked | {(i, device)}
            return
