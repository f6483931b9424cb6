"""Whether to leave the running plan, and for which one: the gain over a horizon less the cost of moving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.layer_costs import Links, stages_of
from peerllm.planner.replan.migration import Holdings, LoadRates, Migration, RunningState, placement_of
from peerllm.planner.replan.net_value import SAME, ReplanChoice, ReplanHorizon, ReplanProblem
from peerllm.planner.replan.replan_latency import replan_for_latency
from peerllm.planner.replan.replan_throughput import replan_for_throughput
from peerllm.types import DeviceId, DeviceProfile, Medium, ModelProfile, Plan, Workload

LEAST_GAIN = 0.05  # share of the horizon's work; smaller gains are within measurement noise, and plans would flap


@dataclass(frozen=True, slots=True)
class ReplanDecision:
    """`gain`: milliseconds of waiting saved (latency) or tokens gained (throughput) over the horizon, less the moving.

    It is 0 for "stay", and infinite (latency) where nothing served before. `bound` is a gain that no plan can exceed.
    """

    action: Literal["stay", "move"]
    plan: Plan
    gain: float
    pause_ms: float  # until the switch: the time in which nothing is served
    load_bytes: Mapping[DeviceId, int]
    kv_bytes: int
    reason: str
    optimal: bool
    bound: float


def replan(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
    *,
    current: Plan | None,
    held: Holdings,
    horizon: ReplanHorizon,
    in_flight: Sequence[int] = (),
    rates: LoadRates | None = None,
    least_gain: float = LEAST_GAIN,
    working_bytes: Mapping[DeviceId, int] | int = 0,
    head_on_source: bool = False,
    media: Sequence[Medium] = (),
) -> ReplanDecision:
    """Stay with `current`, or move to the plan of the greatest net gain in terms of `workload.objective`.

    Latency: requests · time saved, less every millisecond of pause, less every millisecond of loading times the share
    of the horizon in which requests are served. Throughput: tokens at the old rate until the switch, none in the pause,
    the rest at the new rate. Transfers count one after the other. A broken plan serves nothing: all moving is pause
    then, and staying is no option. InfeasibleError if nothing fits.
    """
    working = working_bytes if isinstance(working_bytes, Mapping) else dict.fromkeys(devices, working_bytes)
    placement = placement_of(current.stages) if current else ()
    state = RunningState(
        model, devices, links, source, workload, placement, held, rates or LoadRates(), in_flight, working
    )
    problem = ReplanProblem(state, horizon, head_on_source, tuple(media))
    choice = replan_for_latency(problem) if problem.latency else replan_for_throughput(problem)
    return _decide(problem, choice, least_gain)


def _decide(problem: ReplanProblem, choice: ReplanChoice, least_gain: float) -> ReplanDecision:
    """Stay unless the gain is large enough, or the running plan cannot stay."""
    s, stay = problem.state, problem.staying()
    before = problem.running
    gain, bound = choice.net_value - stay, choice.bound - stay
    placement, optimal = (
        placement_of(choice.plan.stages),
        choice.bound - choice.net_value <= SAME * abs(choice.net_value),
    )
    if (
        before
        and problem.allowed(s.placement)
        and (placement == s.placement or gain <= 0 or gain < least_gain * abs(stay))
    ):
        stages = stages_of(s.placement)
        same = choice.plan.stages == stages and choice.plan.optimal
        limit = min if problem.latency else max
        value = before.request_ms if problem.latency else before.tokens_per_second
        plan = Plan(stages, before, same, limit(choice.plan.bound, value))
        none = "no other plan is worth its moving" if placement == s.placement or gain <= 0 else ""
        reason = f"stay: {none or _least(problem, gain, least_gain)}"
        return ReplanDecision("stay", plan, 0.0, 0.0, {}, 0, reason, optimal, max(0.0, bound))
    migration = s.migration(placement)
    return ReplanDecision(
        "move", choice.plan, gain, migration.pause_ms, migration.load_bytes, migration.kv_bytes,
        _why(problem, choice, migration, gain), optimal, bound,
    )  # fmt: skip


def _least(problem: ReplanProblem, gain: float, least_gain: float) -> str:
    return f"the best move would save {_amount(problem, gain)}, less than {least_gain:.0%}"


def _amount(problem: ReplanProblem, gain: float) -> str:
    if problem.latency:
        return f"{gain / 1000:.1f} s over {problem.horizon.requests:g} requests"
    return f"{gain:.0f} tokens in {problem.horizon.ms / 1000:.0f} s"


def _why(problem: ReplanProblem, choice: ReplanChoice, migration: Migration, gain: float) -> str:
    s = problem.state
    names = [s.devices[device].name for device in choice.plan.devices]
    load = f"{human_bytes(sum(migration.load_bytes.values()))} to load, {migration.ready_ms / 1000:.1f} s"
    if not s.placement:
        why = "nothing runs yet"
    elif not problem.running:
        gone = sorted({s.placement[i] for i in s.lost} - set(s.devices))
        why = "the running plan has lost " + (
            f"{len(gone)} device{'s' * (len(gone) > 1)}" if gone else "layers or a link"
        )
    elif not problem.allowed(s.placement):
        why = "the running plan no longer fits"
    else:
        why = f"{'saves' if s.workload.objective == 'latency' else 'adds'} {_amount(problem, gain)}"
    return f"move to {', '.join(names)}: {why}; {load}"
