"""Re-planning for throughput: local search from the planner's optimum, the running plan and the source alone.

Each plan is valued exactly. The result is not proven to be the best: the bound leaves out the cost of moving.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import stages_of
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.replan.migration import placement_of
from peerllm.planner.replan.neighbour_plans import neighbour_plans, one_range_each, ranges_of, stages_of_ranges
from peerllm.planner.replan.net_value import ReplanChoice, ReplanProblem
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.types import Plan, Prediction, Stage

MAX_VALUED = 1500  # plans in one decision


def replan_for_throughput(problem: ReplanProblem) -> ReplanChoice:
    """The best plan found; no plan can exceed `bound`, even if moving were free."""
    s = problem.state
    free = plan_throughput(
        s.model, s.devices, s.links, s.source, s.workload,
        working_bytes=s.working, head_on_source=problem.head_on_source, media=problem.media,
    )  # fmt: skip
    s.reachable()
    seen: dict[tuple[Stage, ...], ReplanChoice | None] = {}

    def value(stages: tuple[Stage, ...]) -> ReplanChoice | None:
        placement = placement_of(stages)
        if not problem.allowed(placement):
            return None
        migration = s.migration(placement)
        try:
            predicted = problem.predict(stages)
        except InfeasibleError:
            return None
        if migration.background_ms + migration.pause_ms == inf:
            return None
        plan = Plan(stages, predicted, free.optimal and stages == free.stages, max(free.bound, _rate(predicted)))
        return ReplanChoice(plan, problem.net_value(predicted, migration), inf)

    def valued(stages: tuple[Stage, ...]) -> ReplanChoice | None:
        if stages not in seen:
            seen[stages] = value(stages)
        return seen[stages]

    running = [stages_of(s.placement)] if s.placement and set(s.placement) <= set(s.devices) else []
    starts = [*running, free.stages, (Stage(s.source, 0, len(s.model.layers) - 1),)]
    if not any(valued(stages) for stages in starts):
        starts.append(_reached(problem))
    best = max(filter(None, map(valued, starts)), key=lambda choice: choice.net_value)
    for start in starts:
        here: tuple[Stage, ...] | None = start
        while here and one_range_each(here, s.source):
            near = neighbour_plans(ranges_of(here, s.source), s.devices, s.source)
            steps = [valued(stages_of_ranges(r, s.source)) for r in near if len(seen) < MAX_VALUED]
            top = max(filter(None, steps), key=lambda step: step.net_value, default=None)
            before = valued(here)
            here = top.plan.stages if top and (before is None or top.net_value > before.net_value) else None
            if top and top.net_value > best.net_value:
                best = top
    rate = max(best.plan.bound, _rate(problem.running) if problem.running else 0.0)
    return replace(best, bound=max(best.net_value, rate / 1000 * problem.horizon.ms))


def _rate(predicted: Prediction) -> float:
    return predicted.tokens_per_second


def _reached(problem: ReplanProblem) -> tuple[Stage, ...]:
    """A plan whose layers can all be loaded where they lie, even if it visits a device twice."""
    s = problem.state
    places = [(i, d) for i in range(len(s.model.layers)) for d in s.devices]
    extra = {place: s.load_ms(*place) + s.kv_ms(*place) for place in places}
    return plan_latency(
        s.model, s.devices, s.links, s.source, s.workload,
        working_bytes=s.working, head_on_source=problem.head_on_source, extra_ms=extra,
    ).stages  # fmt: skip
