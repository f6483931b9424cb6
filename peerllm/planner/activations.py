"""Which hops carry hidden states as int8: those whose links hold the whole plan up.

A token then takes one byte for each of its numbers and a scale (engine/wire/quantised.py). The cost model needs nothing
new for it: a layer whose output is rounded has fewer `output_bytes_per_token`. What the head sends is never rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import pairwise

from peerllm.planner.cost import hop_ms, predict, predict_throughput
from peerllm.planner.scenario import Scenario
from peerllm.types import ActivationForm, Activations, Layer, ModelProfile, Plan, Prediction, Stage

SCALE_BYTES = 4  # of one token
NOTICEABLE = 0.10  # of the objective: what rounding must gain before anything is rounded
SLIGHT = 0.01  # of the objective: what exact hops may cost; a fast link beside a slow one stays exact

Solve = Callable[[ModelProfile], Plan]


@dataclass(frozen=True, slots=True)
class Sent:
    """A plan, how each of its hops between two stages sends, and the scenario in which that is what hops cost."""

    plan: Plan
    forms: tuple[ActivationForm, ...]
    scenario: Scenario


def rounded(scenario: Scenario, itemsize: int, layers: Collection[int] | None = None) -> Scenario:
    """The same with the outputs of `layers` (None: of all but the head) as int8, not in `itemsize` bytes a number."""
    *inner, head = scenario.model.layers
    found = [_int8(one, itemsize) if layers is None or index in layers else one for index, one in enumerate(inner)]
    return replace(scenario, model=replace(scenario.model, layers=(*found, head)))


def sent(scenario: Scenario, wanted: Activations, itemsize: int, solve: Solve) -> Sent:
    """The plan that `solve` finds for the model, with its hops as `wanted`; `auto` weighs what rounding gains.

    The plan may be another one where bytes shrink. InfeasibleError as `solve` raises it.
    """
    if wanted == "int8":
        short = rounded(scenario, itemsize)
        plan = solve(short.model)
        return _sent(scenario, plan, itemsize, _cuts(plan.stages))
    exact = solve(scenario.model)
    if wanted == "exact":
        return _sent(scenario, exact, itemsize, ())
    plan = solve(rounded(scenario, itemsize).model)
    if _gain(scenario, exact.predicted, plan.predicted) < NOTICEABLE:
        return _sent(scenario, exact, itemsize, ())
    # Solved once more: among plans that send these few layers' outputs rounded and no others, it may not be the best.
    worth = _needed(scenario, plan, itemsize)
    plan = solve(rounded(scenario, itemsize, worth).model)
    if _gain(scenario, exact.predicted, plan.predicted) < NOTICEABLE:
        return _sent(scenario, exact, itemsize, ())
    return _sent(scenario, plan, itemsize, [cut for cut in _cuts(plan.stages) if cut in worth])


def forms(plan: Plan, layers: Collection[int]) -> tuple[ActivationForm, ...]:
    """How each hop between two stages of a plan sends, where the outputs of `layers` are rounded."""
    return tuple(
        "int8" if a.last_layer in layers and a.device != b.device else "exact" for a, b in pairwise(plan.stages)
    )


def _sent(scenario: Scenario, plan: Plan, itemsize: int, layers: Collection[int]) -> Sent:
    return Sent(plan, forms(plan, layers), rounded(scenario, itemsize, layers))


def _needed(scenario: Scenario, plan: Plan, itemsize: int) -> set[int]:
    """The layers whose outputs must be rounded, or more than SLIGHT of what rounding all of them gives is lost."""
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
        return predict(*known)
    return predict_throughput(*known, media=scenario.media)


def _gain(scenario: Scenario, before: Prediction, after: Prediction) -> float:
    """The share by which the objective is better: of a request's time, or of the tokens per second."""
    if scenario.workload.objective == "latency":
        return 1 - after.request_ms / before.request_ms if before.request_ms else 0.0
    return after.tokens_per_second / before.tokens_per_second - 1 if before.tokens_per_second else 0.0


def _int8(layer: Layer, itemsize: int) -> Layer:
    nbytes = layer.output_bytes_per_token
    return replace(layer, output_bytes_per_token=min(nbytes, nbytes // itemsize + SCALE_BYTES))
