"""The strategies against their plain definitions, and the published algorithms against the exact planner."""

from __future__ import annotations

import dataclasses
import math
from itertools import groupby, pairwise

import pytest

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, hop_ms, layer_bytes, layer_ms
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.scenario.json_value import ScenarioError
from peerllm.planner.scenario.scenario import STRATEGIES, Scenario
from peerllm.planner.strategies import published_algorithms
from peerllm.planner.strategies.strategy_plan import SINGLE, even, plan, value
from peerllm.types import DeviceProfile, Layer, LinkProfile, Medium, ModelProfile, Workload
from tests.planner.brute import fits, rate, request_ms
from tests.planner.instances import instance
from tests.sizes import FULL

NEAR = 1e-9


def scenario(seed: int, layers: int = 6, count: int = 3, media: bool = False) -> Scenario:
    """An instance as a scenario; the cloud is the device named first among the others."""
    made = instance(seed, layers, count)
    cloud = next((name for name in made.devices if name != made.source), None)
    return Scenario(
        made.model, made.devices, made.links, made.source, cloud, made.workload, made.media if media else ()
    )


def household(count: int = 3, layers: int = 8, kinds: int = 1, memory: int = 10**6, **work: int) -> Scenario:
    blocks = tuple(Layer(f"b{i}", "block", 100, 1, 8192) for i in range(layers - 2))
    model = ModelProfile("big", (Layer("e", "e", 50, 0, 8192), *blocks, Layer("h", "h", 50, 0, 4)))
    devices = {}
    for i in range(count):
        speed = {kind: ((1, 5.0 + i % kinds), (8, 12.0)) for kind in ("block", "e", "h")}
        devices[f"d{i:02}"] = DeviceProfile(f"d{i:02}", f"d{i:02}", memory, speed)
    links = {(a, b): LinkProfile(1.0, 100) for a in devices for b in devices if a != b}
    workload = Workload(**{"prompt_tokens": 4, "output_tokens": 5, "sequences": 4, "context": 16, **work})
    return Scenario(model, devices, links, "d00", None, workload)


def homes_of(found):
    return tuple(stage.device for stage in found.stages for _ in range(stage.first_layer, stage.last_layer + 1))


def tried(asked: Scenario, strategy: str, objective: str):
    try:
        return plan(asked, strategy, objective)
    except InfeasibleError:
        return None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_every_plan_keeps_every_limit_and_says_what_it_costs(strategy: str, objective: str) -> None:
    feasible = 0
    for seed in range(60):
        asked = scenario(seed, 4 + seed % 3, 1 + seed % 4, media=True)
        if asked.cloud is None and strategy.startswith("cloud"):
            with pytest.raises(ScenarioError, match=r"^cloud is missing"):
                plan(asked, strategy, objective)
            continue
        found = tried(asked, strategy, objective)
        if found is None:
            continue
        feasible += 1
        homes = homes_of(found)
        assert homes[:2] == (asked.source, asked.source)
        assert fits(asked.model, asked.devices, homes, asked.workload, {})
        if objective == "latency":
            assert found.predicted.request_ms == pytest.approx(
                request_ms(asked.model, asked.devices, asked.links, homes, asked.workload)
            )
            assert found.bound <= found.predicted.request_ms * (1 + NEAR)
        else:
            b, m = found.predicted.micro_batch, found.predicted.micro_batches
            said = rate(asked.model, asked.devices, asked.links, homes, b, m, asked.media)
            assert b * m <= asked.workload.sequences
            assert found.predicted.tokens_per_second == pytest.approx(1000 * said)
            assert found.bound >= found.predicted.tokens_per_second * (1 - NEAR)
        worth = value(found.predicted, objective)
        assert not found.optimal or found.bound == pytest.approx(worth, rel=NEAR)
        assert found.optimal or strategy not in SINGLE
    assert feasible >= 3


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_no_strategy_beats_edgeshard(objective: str) -> None:
    compared = 0
    for seed in range(40 if FULL else 15):
        asked = scenario(seed, 6, 3)
        best = tried(asked, "edgeshard", objective)
        for strategy in STRATEGIES[1:]:
            found = tried(asked, strategy, objective)
            if found is None:
                continue
            assert best is not None, f"seed {seed}: {strategy} found a plan where edgeshard found none"
            if best.optimal and objective == "latency":
                assert found.predicted.request_ms >= best.predicted.request_ms * (1 - NEAR)
            elif best.optimal:
                assert found.predicted.tokens_per_second <= best.predicted.tokens_per_second * (1 + NEAR)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    ("layers", "count", "sizes"),
    [(34, 2, [17, 17]), (34, 4, [9, 9, 8, 8]), (5, 2, [3, 2]), (3, 1, [3]), (4, 6, [1] * 4)],
)
def test_even_splits_give_the_first_stages_the_remainder(layers: int, count: int, sizes: list[int]) -> None:
    stages = even(layers, [f"d{i}" for i in range(count)])
    assert [stage.last_layer - stage.first_layer + 1 for stage in stages] == sizes
    assert [stage.device for stage in stages] == [f"d{i}" for i in range(len(sizes))]


def test_which_devices_the_even_splits_use() -> None:
    asked = dataclasses.replace(household(4), source="d02", cloud="d01")
    assert [stage.device for stage in plan(asked, "even").stages] == ["d02", "d00", "d01", "d03"]
    assert [stage.device for stage in plan(asked, "cloud-edge-even").stages] == ["d02", "d01"]
    assert [stage.device for stage in plan(asked, "edge-solo").stages] == ["d02"]
    for seed in range(30):
        asked = scenario(seed)
        best, found = tried(asked, "edgeshard", "throughput"), tried(asked, "edgeshard-even", "throughput")
        if best and found:
            assert found.stages == even(6, best.devices)


def test_cloud_edge_opt_is_the_exact_plan_of_the_two() -> None:
    shared = 0
    for seed in range(40):
        asked = scenario(seed)
        two = {name: asked.devices[name] for name in (asked.source, asked.cloud)}
        found = tried(asked, "cloud-edge-opt", "latency")
        if found is None:
            with pytest.raises(InfeasibleError):
                plan_latency(asked.model, two, asked.links, asked.source, asked.workload)
            continue
        assert found == plan_latency(asked.model, two, asked.links, asked.source, asked.workload)
        shared += len(found.devices) == 2
    assert shared


def test_baselines_choose_the_batch_too() -> None:
    found = plan(household(3, sequences=8), "even", "throughput").predicted
    assert found.micro_batch > 1 and found.micro_batches > 1


def test_shared_airtime_counts() -> None:
    asked = household(3)
    slow = {pair: LinkProfile(0.0, 1.0) for pair in asked.links}
    alone = dataclasses.replace(asked, links=slow)
    shared = dataclasses.replace(alone, media=(Medium("wifi", frozenset(slow)),))
    apart, together = (plan(one, "even", "throughput").predicted for one in (alone, shared))
    assert together.tokens_per_second < apart.tokens_per_second
    assert together.bottleneck == "medium wifi"


def test_the_bytes_missing_are_those_of_the_devices_used() -> None:
    asked = household(3, memory=500)
    needed = 600 + 100 + 6 * 4 * 16  # weights, and the KV of four slots
    with pytest.raises(InfeasibleError, match=r"d00 lends 500 bytes: .* are missing") as caught:
        plan(asked, "edge-solo")
    assert caught.value.missing_bytes == needed - 500
    assert plan(asked, "even").optimal


def test_the_layer_that_overflows_an_even_split_is_named() -> None:
    asked = household(2, memory=700)
    small = dataclasses.replace(asked.devices["d01"], memory_bytes=450)
    asked = dataclasses.replace(asked, devices={**asked.devices, "d01": small})
    with pytest.raises(InfeasibleError, match=r"layer 6 \(b5\) of big does not fit on d01") as caught:
        plan(asked, "even")  # layers 4 to 7: three blocks of 164 bytes and the head
    assert caught.value.missing_bytes == 0


def test_a_split_that_would_send_layer_1_away_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="layers 0 and 1 of big must lie on d00"):
        plan(household(5, layers=5), "even")


def test_a_missing_link_is_named() -> None:
    asked = household(3)
    links = {pair: link for pair, link in asked.links.items() if pair != ("d02", "d00")}
    with pytest.raises(InfeasibleError, match="no link leads from d02 to d00"):
        plan(dataclasses.replace(asked, links=links), "even", "throughput")


def test_an_unknown_strategy_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no strategy is called"):
        plan(household(), "best")


def plain_latency(asked: Scenario) -> tuple[str, ...] | None:
    """DP(i,j) of the paper with one table of memory per state, as plainly as it can be said."""
    model, work = asked.model, asked.workload
    order = (asked.source, *(name for name in asked.devices if name != asked.source))
    steps, last = work.output_tokens - 1, len(model.layers) - 1

    def needs(i, name):
        tied = model.layers[i].tied_to is not None and name == asked.source
        return layer_bytes(model, i, work, tied)

    def compute(i, name):
        prompt = work.pieces if i < last else (1,)
        one = layer_ms(asked.devices[name], model.layers[i], 1)
        first = sum(layer_ms(asked.devices[name], model.layers[i], n) for n in prompt)
        return first + (steps * one if steps else 0.0)

    def hop(i, a, b):
        each, prompt = model.layers[i].output_bytes_per_token, work.pieces if i < last - 1 else (1,)
        first = sum(hop_ms(asked.links, a, b, n * each) for n in prompt)
        return first + (steps * hop_ms(asked.links, a, b, each) if steps else 0.0)

    rooms = {name: asked.devices[name].memory_bytes for name in order}
    states = {}
    if needs(0, asked.source) <= rooms[asked.source] and math.isfinite(compute(0, asked.source)):
        left = {**rooms, asked.source: rooms[asked.source] - needs(0, asked.source)}
        states = {asked.source: (compute(0, asked.source), left, (asked.source,))}
    for i in range(1, last + 1):
        grown = {}
        for name in order if i >= SOURCE_LAYERS else order[:1]:
            for before in order:
                if before not in states:
                    continue
                cost, left, way = states[before]
                total = cost + compute(i, name) + hop(i - 1, before, name)
                if left[name] < needs(i, name) or math.isinf(total):
                    continue
                if name not in grown or total < grown[name][0]:
                    grown[name] = (total, {**left, name: left[name] - needs(i, name)}, (*way, name))
        states = grown
    ends = [(cost + hop(last, way[-1], asked.source), way) for cost, _, way in states.values()]
    cost, way = min(ends, default=(math.inf, ()))
    return way if math.isfinite(cost) else None


def plain_throughput(asked: Scenario) -> float:
    """g(m, S, j) of the paper over every sequence of devices and every cut: the least bottleneck without a way back."""
    model, work, count = asked.model, asked.workload, len(asked.model.layers)

    def run(i, m, name):
        beside = name == asked.source
        held = sum(layer_bytes(model, index, work, beside) for index in range(i, m))
        fit = held <= asked.devices[name].memory_bytes
        return sum(layer_ms(asked.devices[name], model.layers[index], 1) for index in range(i, m)) if fit else math.inf

    def grow(i, used, slowest):
        best = slowest if i == count else math.inf
        for name in asked.devices.keys() - set(used):
            hop = hop_ms(asked.links, used[-1], name, model.layers[i - 1].output_bytes_per_token) if i < count else 0.0
            for m in range(i + 1, count + 1):
                worst = max(slowest, hop, run(i, m, name))
                if math.isfinite(worst):
                    best = min(best, grow(m, (*used, name), worst))
        return best

    starts = ((m, run(0, m, asked.source)) for m in range(SOURCE_LAYERS, count + 1))
    return min((grow(m, (asked.source,), ms) for m, ms in starts if math.isfinite(ms)), default=math.inf)


def published_bottleneck(asked: Scenario, stages) -> float:
    homes = [stage.device for stage in stages]
    slow = [
        sum(
            layer_ms(asked.devices[s.device], layer, 1)
            for layer in asked.model.layers[s.first_layer : s.last_layer + 1]
        )
        for s in stages
    ]
    for (a, b), stage in zip(pairwise(homes), stages, strict=False):
        slow.append(hop_ms(asked.links, a, b, asked.model.layers[stage.last_layer].output_bytes_per_token))
    return max(slow)


def asked_of(asked: Scenario):
    return asked.model, asked.devices, asked.links, asked.source, asked.workload


def test_the_published_latency_algorithm_is_the_plain_one() -> None:
    feasible = 0
    for seed in range(300):
        asked = scenario(seed, 3 + seed % 6, 1 + seed % 4)
        expected = plain_latency(asked)
        try:
            found = published_algorithms.latency(*asked_of(asked))
        except InfeasibleError:
            assert expected is None, f"seed {seed}"
            continue
        assert expected is not None, f"seed {seed}"
        homes = [stage.device for stage in found for _ in range(stage.first_layer, stage.last_layer + 1)]
        ours, plain = (
            request_ms(asked.model, asked.devices, asked.links, way, asked.workload) for way in (homes, expected)
        )
        assert ours == pytest.approx(plain, rel=NEAR), f"seed {seed}"
        feasible += 1
    assert feasible > 80


def test_the_published_throughput_algorithm_is_the_plain_one() -> None:
    feasible = shared = 0
    for seed in range(150):
        asked = scenario(seed, 3 + seed % 5, 1 + seed % 4)
        expected = plain_throughput(asked)
        try:
            found = published_algorithms.throughput(*asked_of(asked))
        except InfeasibleError:
            assert math.isinf(expected), f"seed {seed}"
            continue
        homes = [stage.device for stage in found]
        assert len(set(homes)) == len(homes) == len(list(groupby(homes))) and found[0].last_layer >= 1
        assert published_bottleneck(asked, found) == pytest.approx(expected, rel=NEAR), f"seed {seed}"
        feasible += 1
        shared += len(found) > 2
    assert feasible > 40 and shared > 5


def greedy_trap(*spare: DeviceProfile) -> Scenario:
    """Layer 2 is quicker on x, but then the head, which no other device but a slow spare one holds, finds x taken."""
    sizes = (("e", 1), ("first", 1), ("second", 3), ("third", 2), ("h", 6))
    model = ModelProfile("m", tuple(Layer(kind, kind, nbytes, 0, 8) for kind, nbytes in sizes))
    even_speed = {kind: ((1, 5.0),) for kind, _ in sizes}
    quick = {**even_speed, "second": ((1, 1.0),)}
    devices = [DeviceProfile("s", "s", 2, even_speed), DeviceProfile("x", "x", 6, quick)]
    devices += [DeviceProfile("y", "y", 5, even_speed), *spare]
    names = [device.name for device in devices]
    links = {(a, b): LinkProfile(0.1, 1000) for a in names for b in names if a != b}
    return Scenario(model, dict(zip(names, devices, strict=True)), links, "s", None, Workload(1, 1, 1, 1))


def test_the_published_latency_algorithm_may_call_a_feasible_instance_infeasible() -> None:
    asked = greedy_trap()
    best = plan(asked, "edgeshard")
    assert best.optimal and homes_of(best) == ("s", "s", "y", "y", "x")
    with pytest.raises(InfeasibleError, match=r"layer 4 \(h\).*the published algorithm"):
        plan(asked, "edgeshard-paper")


def test_the_published_latency_algorithm_may_miss_the_best_plan() -> None:
    asked = greedy_trap(
        DeviceProfile("z", "z", 6, {kind: ((1, 50.0),) for kind in ("e", "first", "second", "third", "h")})
    )
    best, found = plan(asked, "edgeshard"), plan(asked, "edgeshard-paper")
    assert best.optimal and homes_of(best) == ("s", "s", "y", "y", "x")
    assert not found.optimal and homes_of(found)[-1] == "z"
    assert found.predicted.request_ms > 2 * best.predicted.request_ms
    assert found.bound == best.predicted.request_ms


def test_a_plan_that_is_hardly_worse_than_the_best_is_not_called_optimal() -> None:
    even_but_head = {**{kind: ((1, 50.0),) for kind in ("e", "first", "second", "third")}, "h": ((1, 9.005),)}
    asked = greedy_trap(DeviceProfile("z", "z", 6, even_but_head))
    best, found = plan(asked, "edgeshard"), plan(asked, "edgeshard-paper")
    assert homes_of(best) == ("s", "s", "y", "y", "x") and homes_of(found) == ("s", "s", "x", "x", "z")
    assert 1 < found.predicted.request_ms / best.predicted.request_ms < 1.0003
    assert not found.optimal and found.bound == best.bound == best.predicted.request_ms


def test_the_published_latency_algorithm_is_often_right_and_often_not() -> None:
    right = wrong = 0
    for seed in range(100 if FULL else 40):
        best, found = (tried(scenario(seed), strategy, "latency") for strategy in ("edgeshard", "edgeshard-paper"))
        if best and found and best.optimal:
            same = math.isclose(found.predicted.request_ms, best.predicted.request_ms, rel_tol=NEAR)
            assert found.optimal == same, f"seed {seed}"
            right, wrong = right + same, wrong + (not same)
    assert right > 4 and wrong


def test_the_published_throughput_algorithm_knows_one_sequence_only() -> None:
    """It balances the computing of one token, not of the batch that is then run."""
    better = 0
    for seed in range(60):
        asked = scenario(seed)
        best, found = tried(asked, "edgeshard", "throughput"), tried(asked, "edgeshard-paper", "throughput")
        if best and found:
            better += best.predicted.tokens_per_second > 1.05 * found.predicted.tokens_per_second
            assert found.optimal == math.isclose(found.predicted.tokens_per_second, found.bound, rel_tol=2 * NEAR)
    assert better


def test_fifteen_devices_of_two_kinds_are_few_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = household(15, layers=34, kinds=2)
    monkeypatch.setattr(published_algorithms, "MAX_STATES", 8 * 8 * 2 * 35)
    found = published_algorithms.throughput(*asked_of(asked))
    assert published_bottleneck(asked, found) == 15.0  # 34 layers on 15 devices: some device has three of 5 ms
    assert len({stage.device for stage in found}) == len(found) > 12


def test_too_many_different_devices_are_refused_in_words() -> None:
    asked = household(30, layers=34, kinds=30)
    with pytest.raises(ScenarioError, match=f"devices make {2**29} subsets"):
        published_algorithms.throughput(*asked_of(asked))
