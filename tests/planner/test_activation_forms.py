"""When hidden states travel as int8: where a link holds the plan up, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.prediction import predict_latency, predict_throughput
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.scenario.scenario_export import scenario_file
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.planner.transfers.activation_forms import (
    NOTICEABLE,
    SCALE_BYTES,
    SLIGHT,
    PlanWithForms,
    forms,
    plan_with_forms,
    rounded,
)
from peerllm.types import Activations, DeviceProfile, Layer, LinkProfile, ModelProfile, Objective, Plan, Stage, Workload
from tests.planner.instances import instance, shape
from tests.sizes import FULL

HIDDEN = 4096
ITEMSIZE = 2
SLOW, FAST = LinkProfile(0.3, 5.0), LinkProfile(0.3, 5000.0)
FIGURE = {"latency": "request_ms", "throughput": "tokens_per_second"}


def layer(index: int, kind: str, out: int = HIDDEN * ITEMSIZE) -> Layer:
    return Layer(f"l{index}", kind, 100, 0, out)


MODEL = ModelProfile("m", (layer(0, "embedding"), *(layer(i, "block") for i in range(1, 10)), layer(10, "head", 4)))


def household(
    links: dict[tuple[str, str], LinkProfile], objective: Objective = "latency", names: str = "abc", rooms: int = 4
) -> Scenario:
    """Devices alike that hold `rooms` layers each; what `links` does not name is fast."""
    times = {"embedding": ((1, 0.01),), "block": ((1, 1.0), (128, 20.0)), "head": ((1, 0.5),)}
    devices = {name: DeviceProfile(name, name, 100 * rooms, times) for name in names}
    every = {(a, b): links.get((a, b), FAST) for a in names for b in names if a != b}
    return Scenario(MODEL, devices, every, "a", None, Workload(32, 64, 4, 512, objective))


def solve(scenario: Scenario, model: ModelProfile) -> Plan:
    planner = plan_throughput if scenario.workload.objective == "throughput" else plan_latency
    return planner(model, scenario.devices, scenario.links, scenario.source, scenario.workload)


def decide(scenario: Scenario, wanted: Activations = "auto") -> PlanWithForms:
    return plan_with_forms(scenario, wanted, ITEMSIZE, partial(solve, scenario))


def worth(found: Plan, objective: Objective) -> float:
    return float(getattr(found.predicted, FIGURE[objective]))


ALL_SLOW = {(a, b): SLOW for a in "abc" for b in "abc" if a != b}


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_slow_links_carry_int8_and_fast_ones_do_not(objective: Objective) -> None:
    slow, fast = household(ALL_SLOW, objective), household({}, objective)
    found, exact = decide(slow), decide(slow, "exact")
    assert set(found.forms) == {"int8"} and len(found.forms) == len(found.plan.stages) - 1 >= 2
    change = worth(found.plan, objective) / worth(exact.plan, objective)
    assert change <= 1 - NOTICEABLE if objective == "latency" else change >= 1 + NOTICEABLE
    assert set(decide(fast).forms) == {"exact"} and decide(fast) == decide(fast, "exact")


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_fast_link_beside_a_slow_one_stays_exact(objective: Objective) -> None:
    """The way to b is slow whatever the order; c is reached fast from both."""
    scenario = household({("a", "b"): SLOW, ("c", "b"): SLOW, ("b", "a"): SLOW, ("b", "c"): FAST}, objective)
    found = decide(scenario)
    by_way = {(a.device, b.device): form for (a, b), form in zip(pairwise(found.plan.stages), found.forms, strict=True)}
    assert "int8" in by_way.values(), found
    assert all((form == "int8") == (scenario.links[way] is SLOW) for way, form in by_way.items())


def test_what_is_asked_for_is_done_whatever_it_gains() -> None:
    assert set(decide(household({}), "int8").forms) == {"int8"}
    assert set(decide(household(ALL_SLOW), "exact").forms) == {"exact"}
    alone = decide(household({}, names="a", rooms=11), "int8")
    assert alone.forms == () and alone.scenario.model == MODEL


def test_the_plan_itself_may_change() -> None:
    """A model that one device holds alone goes over two once bytes are few enough."""
    scenario = household({("a", "b"): LinkProfile(0.1, 8.0)}, names="ab", rooms=11)
    quick = replace(
        scenario.devices["b"], layer_ms={"embedding": ((1, 0.1),), "block": ((1, 0.1),), "head": ((1, 0.1),)}
    )
    scenario = replace(
        scenario,
        devices={**scenario.devices, "b": quick},
        workload=replace(scenario.workload, prompt_tokens=1),
    )
    found = decide(scenario)
    assert len(decide(scenario, "exact").plan.stages) == 1
    assert len(found.plan.stages) == 2 and found.forms == ("int8",)


def test_a_rounded_hop_costs_a_byte_a_number_and_a_scale() -> None:
    layers = rounded(household({}), ITEMSIZE).model.layers
    assert {one.output_bytes_per_token for one in layers[:-1]} == {HIDDEN + SCALE_BYTES}
    assert layers[-1] == MODEL.layers[-1], "what goes back are token ids"
    some = rounded(household({}), ITEMSIZE, {3, 10}).model.layers
    assert [i for i, one in enumerate(some) if one != MODEL.layers[i]] == [3]
    tiny = replace(
        household({}),
        model=replace(MODEL, layers=tuple(replace(one, output_bytes_per_token=6) for one in MODEL.layers)),
    )
    assert rounded(tiny, ITEMSIZE) == tiny, "nothing grows"


def fixed(links: dict[tuple[str, str], LinkProfile], total_ms: float) -> PlanWithForms:
    """A plan over a, b and c whose request takes `total_ms` with every hop rounded; one token travels once."""
    scenario = replace(household(links), workload=Workload(1, 1))
    stages = (Stage("a", 0, 3), Stage("b", 4, 7), Stage("c", 8, 10))

    def predicted(model: ModelProfile, ms: float) -> Plan:
        times = {"embedding": ((1, ms),), "block": ((1, 0.0),), "head": ((1, 0.0),)}
        devices = {name: DeviceProfile(name, name, 400, times) for name in "abc"}
        return Plan(stages, predict_latency(model, devices, scenario.links, stages, scenario.workload))

    short = predicted(rounded(scenario, ITEMSIZE).model, 0.0).predicted.request_ms
    times = {"embedding": ((1, total_ms - short),), "block": ((1, 0.0),), "head": ((1, 0.0),)}
    devices = {name: DeviceProfile(name, name, 400, times) for name in "abc"}
    scenario = replace(scenario, devices=devices)
    return plan_with_forms(scenario, "auto", ITEMSIZE, lambda model: predicted(model, total_ms - short))


SAVED = (HIDDEN * ITEMSIZE - HIDDEN - SCALE_BYTES) / 1000  # ms for a hop of one token at 8 Mbit/s


@pytest.mark.parametrize(("gain", "form"), [(0.096, "exact"), (0.099, "exact"), (0.101, "int8"), (0.104, "int8")])
def test_rounding_must_gain_a_tenth(gain: float, form: str) -> None:
    found = fixed({("a", "b"): LinkProfile(0, 8.0), ("b", "c"): LinkProfile(0, 1e12)}, SAVED / gain - SAVED)
    assert found.forms[0] == form


@pytest.mark.parametrize(("lost", "form"), [(0.006, "exact"), (0.0099, "exact"), (0.0101, "int8"), (0.014, "int8")])
def test_a_hop_stays_exact_if_that_loses_a_hundredth_at_most(lost: float, form: str) -> None:
    total = 3 * SAVED
    slower = SAVED / (
        lost * total / (1 - lost)
    )  # times 8 Mbit/s: with this hop exact the request takes total/(1 - lost)
    found = fixed({("a", "b"): LinkProfile(0, 8.0), ("b", "c"): LinkProfile(0, 8.0 * slower)}, total)
    assert found.forms == ("int8", form)


def test_random_households_gain_what_they_were_promised() -> None:
    """Over every kind of household: auto is never worse than exact, and its scenario file leads to the same plan."""
    changed = 0
    for seed in range(120 if FULL else 25):
        i = instance(seed, *shape(seed))
        objective: Objective = "throughput" if seed % 2 else "latency"
        blocks = [replace(one, output_bytes_per_token=4096) for one in i.model.layers[:-1]]
        model = replace(i.model, layers=(*blocks, i.model.layers[-1]))
        links = {pair: replace(link, mbps=link.mbps / 50) for pair, link in i.links.items()}
        scenario = Scenario(model, i.devices, links, i.source, None, replace(i.workload, objective=objective))
        try:
            exact, found = decide(scenario, "exact"), decide(scenario)
        except InfeasibleError:
            continue
        rounds = [
            stage.last_layer for stage, form in zip(found.plan.stages, found.forms, strict=False) if form == "int8"
        ]
        assert forms(found.plan, rounds) == found.forms, seed
        assert found.scenario == rounded(scenario, ITEMSIZE, rounds), seed
        again = (predict_throughput if seed % 2 else predict_latency)(
            found.scenario.model, i.devices, links, found.plan.stages, scenario.workload
        )
        assert again == found.plan.predicted, seed
        if not rounds:
            assert found == exact, seed
            continue
        changed += 1
        resolved = solve(found.scenario, found.scenario.model)
        assert worth(resolved, objective) == pytest.approx(worth(found.plan, objective)), seed
        change = worth(found.plan, objective) / worth(exact.plan, objective)
        assert change <= 1 - NOTICEABLE + 1e-9 if objective == "latency" else change >= 1 + NOTICEABLE - 1e-9, seed
        best = worth(decide(scenario, "int8").plan, objective)
        lost = worth(found.plan, objective) / best
        assert lost <= 1 / (1 - SLIGHT) + 1e-9 if objective == "latency" else lost >= 1 / (1 + SLIGHT) - 1e-9, seed
    assert changed > 2


def test_a_decided_scenario_is_a_plain_scenario_file() -> None:
    found = decide(household(ALL_SLOW))
    again = parse(scenario_file(found.scenario))
    sizes = [[one.output_bytes_per_token for one in s.model.layers] for s in (again, found.scenario)]
    assert sizes[0] == sizes[1]
    assert solve(again, again.model).stages == found.plan.stages
