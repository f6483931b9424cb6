"""Re-planning for throughput: the planner's optimum, the running plan, and all that single moves reach from them.

Each plan is valued exactly; that none beyond their reach is better is not proven: the bound forgets the moving.
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


def replan_for_throughput(desk: ReplanProblem) -> ReplanChoice:
    """The best plan found; `bound` holds for every plan, moved to at once."""
    s = desk.now
    free = plan_throughput(
        s.model, s.devices, s.links, s.source, s.workload,
        working_bytes=s.working, head_on_source=desk.head_on_source, media=desk.media,
    )  # fmt: skip
    s.reachable()
    seen: dict[tuple[Stage, ...], ReplanChoice | None] = {}

    def value(stages: tuple[Stage, ...]) -> ReplanChoice | None:
        homes = placement_of(stages)
        if not desk.allowed(homes):
            return None
        moving = s.moving(homes)
        try:
            predicted = desk.predict(stages)
        except InfeasibleError:
            return None
        if moving.background_ms + moving.pause_ms == inf:
            return None
        plan = Plan(stages, predicted, free.optimal and stages == free.stages, max(free.bound, _rate(predicted)))
        return ReplanChoice(plan, desk.worth(predicted, moving), inf)

    def valued(stages: tuple[Stage, ...]) -> ReplanChoice | None:
        if stages not in seen:
            seen[stages] = value(stages)
        return seen[stages]

    running = [stages_of(s.homes)] if s.homes and set(s.homes) <= set(s.devices) else []
    starts = [*running, free.stages, (Stage(s.source, 0, len(s.model.layers) - 1),)]
    if not any(valued(stages) for stages in starts):
        starts.append(_reached(desk))
    best = max(filter(None, map(valued, starts)), key=lambda choice: choice.worth)
    for start in starts:
        here: tuple[Stage, ...] | None = start
        while here and one_range_each(here, s.source):
            near = neighbour_plans(ranges_of(here, s.source), s.devices, s.source)
            steps = [valued(stages_of_ranges(r, s.source)) for r in near if len(seen) < MAX_VALUED]
            top = max(filter(None, steps), key=lambda step: step.worth, default=None)
            before = valued(here)
            here = top.plan.stages if top and (before is None or top.worth > before.worth) else None
            if top and top.worth > best.worth:
                best = top
    rate = max(best.plan.bound, _rate(desk.running) if desk.running else 0.0)
    return replace(best, bound=max(best.worth, rate / 1000 * desk.horizon.ms))


def _rate(predicted: Prediction) -> float:
    return predicted.tokens_per_second


def _reached(desk: ReplanProblem) -> tuple[Stage, ...]:
    """Some plan whose every layer can be had where it lies, though it may visit a device twice."""
    s = desk.now
    places = [(i, d) for i in range(len(s.model.layers)) for d in s.devices]
    extra = {place: s.load_ms(*place) + s.kv_ms(*place) for place in places}
    return plan_latency(
        s.model, s.devices, s.links, s.source, s.workload,
        working_bytes=s.working, head_on_source=desk.head_on_source, extra_ms=extra,
    ).stages  # fmt: skip
