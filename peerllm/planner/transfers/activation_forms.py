"""Which hops carry hidden states as int8: those whose links slow the whole plan down.

A token then takes one byte per number plus a scale (engine/wire/quantised.py). The cost model needs nothing new: a
layer whose output is rounded has fewer `output_bytes_per_token`. What the head sends is never rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import pairwise

from peerllm.planner.cost.layer_costs import hop_ms
from peerllm.planner.cost.prediction import predict_latency, predict_throughput
from peerllm.planner.scenario.scenario import Scenario
from peerllm.types import ActivationForm, Activations, Layer, ModelProfile, Plan, Prediction, Stage

SCALE_BYTES = 4  # for each token
NOTICEABLE = 0.10  # share of the objective that rounding must gain, or nothing is rounded
SLIGHT = 0.01  # share of the objective that exact hops may cost: a fast link beside a slow one stays exact

Solve = Callable[[ModelProfile], Plan]


@dataclass(frozen=True, slots=True)
class PlanWithForms:
    """A plan, the form of each of its hops, and the scenario in which hops cost what these forms send."""

    plan: Plan
    forms: tuple[ActivationForm, ...]
    scenario: Scenario


def rounded(scenario: Scenario, itemsize: int, layers: Collection[int] | None = None) -> Scenario:
    """The scenario with the outputs of `layers` (None: all but the head) as int8, not `itemsize` bytes a number."""
    *inner, head = scenario.model.layers
    found = [_int8(one, itemsize) if layers is None or index in layers else one for index, one in enumerate(inner)]
    return replace(scenario, model=replace(scenario.model, layers=(*found, head)))


def plan_with_forms(scenario: Scenario, wanted: Activations, itemsize: int, solve: Solve) -> PlanWithForms:
    """The plan that `solve` finds, with its hops as `wanted`; `auto` rounds only where that gains enough.

    With fewer bytes per hop the plan may be another one. InfeasibleError as `solve` raises it.
    """
    if wanted == "int8":
        short = rounded(scenario, itemsize)
        plan = solve(short.model)
        return _with_forms(scenario, plan, itemsize, _cuts(plan.stages))
    exact = solve(scenario.model)
    if wanted == "exact":
        return _with_forms(scenario, exact, itemsize, ())
    plan = solve(rounded(scenario, itemsize).model)
    if _gain(scenario, exact.predicted, plan.predicted) < NOTICEABLE:
        return _with_forms(scenario, exact, itemsize, ())
    # Solved again: with only these outputs rounded, another plan may be better.
    needed = _needed(scenario, plan, itemsize)
    plan = solve(rounded(scenario, itemsize, needed).model)
    if _gain(scenario, exact.predicted, plan.predicted) < NOTICEABLE:
        return _with_forms(scenario, exact, itemsize, ())
    return _with_forms(scenario, plan, itemsize, [cut for cut in _cuts(plan.stages) if cut in needed])


def forms(plan: Plan, layers: Collection[int]) -> tuple[ActivationForm, ...]:
    """The form of each hop between two stages, if the outputs of `layers` are rounded."""
    return tuple(
        "int8" if a.last_layer in layers and a.device != b.device else "exact" for a, b in pairwise(plan.stages)
    )


def _with_forms(scenario: Scenario, plan: Plan, itemsize: int, layers: Collection[int]) -> PlanWithForms:
    return PlanWithForms(plan, forms(plan, layers), rounded(scenario, itemsize, layers))


def _needed(scenario: Scenario, plan: Plan, itemsize: int) -> set[int]:
    """The layers that must be rounded to keep all but SLIGHT of what rounding every hop gains."""
    stages = plan.stages
    kept = set(_cuts(stages))
    short = rounded(scenario, itemsize)

    def saved_ms(place: int) -> float:
        a, b, layer = stages[place].device, stages[place + 1].device, stages[place].last_layer
        whole, part = (one.model.layers[layer].output_bytes_per_token for one in (scenario, short))
        return hop_ms(scenario.links, a, b, whole) - hop_ms(scenario.links, a, b, part)

    for place in sorted(range(len(stages) - 1), key=saved_ms):
        fewer = kept - {stages[place].last_layer}
        now = _predicted(rounded(scenario, itemsize, fewer), stages)
        if _gain(scenario, now, plan.predicted) <= SLIGHT:
            kept = fewer
    return kept


def _cuts(stages: tuple[Stage, ...]) -> list[int]:
    return [stage.last_layer for stage in stages[:-1]]


def _predicted(scenario: Scenario, stages: tuple[Stage, ...]) -> Prediction:
    known = scenario.model, scenario.devices, scenario.links, stages, scenario.workload
    if scenario.workload.objective == "latency":
        return predict_latency(*known)
    return predict_throughput(*known, media=scenario.media)


def _gain(scenario: Scenario, before: Prediction, after: Prediction) -> float:
    """By what share the objective gets better: of a request's time, or of the tokens per second."""
    if scenario.workload.objective == "latency":
        return 1 - after.request_ms / before.request_ms if before.request_ms else 0.0
    return after.tokens_per_second / before.tokens_per_second - 1 if before.tokens_per_second else 0.0


def _int8(layer: Layer, itemsize: int) -> Layer:
    nbytes = layer.output_bytes_per_token
    return replace(layer, output_bytes_per_token=min(nbytes, nbytes // itemsize + SCALE_BYTES))
