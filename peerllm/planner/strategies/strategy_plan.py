"""The plan of each strategy of a scenario: EdgeShard's exact planner, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, stage_bytes
from peerllm.planner.cost.prediction import predict_latency, predict_throughput
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.scenario.json_value import ScenarioError
from peerllm.planner.scenario.scenario import STRATEGIES, Scenario
from peerllm.planner.strategies import published_algorithms
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.types import DeviceId, Objective, Plan, Prediction, Stage

__all__ = ["SINGLE", "STRATEGIES", "plan"]

SINGLE = ("edge-solo", "cloud-edge-even", "even", "edgeshard-even")  # strategies with a single plan to choose from
SAME = 1e-9  # relative; values closer than this count as equal


def plan(scenario: Scenario, strategy: str = "edgeshard", objective: Objective = "latency") -> Plan:
    """The strategy's plan; `optimal` and `bound` speak of what the strategy itself may choose from.

    So a strategy of a single plan is optimal; `edgeshard-paper` is held against every plan. InfeasibleError says what
    does not fit, ScenarioError which key the strategy lacks.
    """
    order = tuple(dict.fromkeys((scenario.source, *scenario.devices)))
    match strategy:
        case "edgeshard":
            return _exact(scenario, objective, order)
        case "edge-solo":
            return _single(scenario, objective, order[:1])
        case "cloud-edge-even":
            return _single(scenario, objective, _pair(scenario, strategy))
        case "cloud-edge-opt":
            return _exact(scenario, objective, _pair(scenario, strategy))
        case "even":
            return _single(scenario, objective, order)
        case "edgeshard-even":
            return _single(scenario, objective, _exact(scenario, objective, order).devices)
        case "edgeshard-paper":
            return _paper(scenario, objective, order)
    raise ValueError(f"no strategy is called {strategy!r}; there are {', '.join(STRATEGIES)}")


def even(layers: int, devices: Sequence[DeviceId]) -> tuple[Stage, ...]:
    """As many layers on each device, the first ones taking the remainder; surplus devices get none."""
    share, rest = divmod(layers, len(devices))
    stages: list[Stage] = []
    first = 0
    for place, device in enumerate(devices):
        count = share + (place < rest)
        if count:
            stages.append(Stage(device, first, first + count - 1))
            first += count
    return tuple(stages)


def _pair(scenario: Scenario, strategy: str) -> tuple[DeviceId, ...]:
    if scenario.cloud is None:
        raise ScenarioError(f"cloud is missing: {strategy} divides the model between the source and it")
    return tuple(dict.fromkeys((scenario.source, scenario.cloud)))


def _exact(scenario: Scenario, objective: Objective, among: Sequence[DeviceId]) -> Plan:
    model, source, work = scenario.model, scenario.source, scenario.workload
    devices = {device: scenario.devices[device] for device in among}
    if objective == "latency":
        return plan_latency(model, devices, scenario.links, source, work)
    return plan_throughput(model, devices, scenario.links, source, work, media=scenario.media)


def _single(scenario: Scenario, objective: Objective, devices: Sequence[DeviceId]) -> Plan:
    stages = even(len(scenario.model.layers), devices)
    _check(scenario, stages)
    predicted = _predicted(scenario, objective, stages)
    return Plan(stages, predicted, optimal=True, bound=value(predicted, objective))


def _paper(scenario: Scenario, objective: Objective, among: Sequence[DeviceId]) -> Plan:
    best = _exact(scenario, objective, among)
    solve = published_algorithms.latency if objective == "latency" else published_algorithms.throughput
    stages = solve(scenario.model, scenario.devices, scenario.links, scenario.source, scenario.workload)
    _check(scenario, stages)
    predicted = _predicted(scenario, objective, stages)
    found = value(predicted, objective)
    bound = min(best.bound, found) if objective == "latency" else max(best.bound, found)
    return Plan(stages, predicted, optimal=found == bound or abs(found - bound) <= SAME * bound, bound=bound)


def value(predicted: Prediction, objective: Objective) -> float:
    """What the objective counts: milliseconds of a request, or tokens per second."""
    return predicted.request_ms if objective == "latency" else predicted.tokens_per_second


def _predicted(scenario: Scenario, objective: Objective, stages: Sequence[Stage]) -> Prediction:
    model, devices, links, work = scenario.model, scenario.devices, scenario.links, scenario.workload
    if objective == "latency":
        return predict_latency(model, devices, links, stages, work)
    return predict_throughput(model, devices, links, stages, work, media=scenario.media)


def _check(scenario: Scenario, stages: Sequence[Stage]) -> None:
    """InfeasibleError where stages that nobody searched for break a limit."""
    model, source = scenario.model, scenario.source
    used: dict[DeviceId, int] = {}
    for stage, nbytes in zip(stages, stage_bytes(model, stages, scenario.workload), strict=True):
        used[stage.device] = used.get(stage.device, 0) + nbytes
    needed, lent = sum(used.values()), sum(scenario.devices[device].memory_bytes for device in used)
    if needed > lent:
        who = f"{source} lends" if len(used) == 1 else f"the {len(used)} devices of this split lend"
        sizes = f"needs {human_bytes(needed)}, {who} {human_bytes(lent)}"
        raise InfeasibleError(f"{model.name} {sizes}: {human_bytes(needed - lent)} are missing", needed - lent)
    if stages[0].last_layer < SOURCE_LAYERS - 1:
        raise InfeasibleError(f"layers 0 and 1 of {model.name} must lie on {source}; this split sends layer 1 away")
    for device, nbytes in used.items():
        over = nbytes - scenario.devices[device].memory_bytes
        if over > 0:
            layer = _overflowing(scenario, stages, device)
            which = f"layer {layer} ({model.layers[layer].name})"
            raise InfeasibleError(
                f"{which} of {model.name} does not fit on {device} beside the others: {human_bytes(over)} too much"
            )
    for a, b in pairwise((*(stage.device for stage in stages), source)):
        if a != b and (a, b) not in scenario.links:
            raise InfeasibleError(f"no link leads from {a} to {b}")


def _overflowing(scenario: Scenario, stages: Sequence[Stage], device: DeviceId) -> int:
    """The first layer on `device` that its memory no longer holds."""
    held: list[Stage] = []
    room = scenario.devices[device].memory_bytes
    for stage in stages:
        for index in range(stage.first_layer, stage.last_layer + 1):
            held.append(Stage(stage.device, index, index))
            sizes = stage_bytes(scenario.model, held, scenario.workload)
            if sum(size for one, size in zip(held, sizes, strict=True) if one.device == device) > room:
                return index
    raise AssertionError(f"{device} holds everything")
