"""What one lap costs, and which micro-batches are chosen among equals."""

from __future__ import annotations

from math import inf

import pytest

from peerllm.planner.cost.layer_costs import batch_ms
from peerllm.planner.cost.prediction import Lap, best_lap, lap_of, predict_throughput
from peerllm.planner.simulator.simulation import simulate
from peerllm.types import DeviceProfile, Layer, LinkProfile, Medium, ModelProfile, Stage, Workload

MODEL = ModelProfile("m", tuple(Layer(kind, kind, 1, 0, 1000) for kind in ("embedding", "block", "head")))


def device(ident: str, ms: float, name: str | None = None, most: int = 8) -> DeviceProfile:
    """Each layer takes `ms` a token, whatever the batch."""
    return DeviceProfile(ident, name or ident, 99, {one.kind: ((1, ms), (most, ms * most)) for one in MODEL.layers})


def test_of_equal_batches_the_smallest_is_chosen_and_as_few_groups_as_reach_the_rate() -> None:
    devices, stages = {"a": device("a", 4.0)}, (Stage("a", 0, 2),)
    work = Workload(4, 4, sequences=8)
    assert best_lap(MODEL, devices, {}, stages, work).batch == 1
    found = predict_throughput(MODEL, devices, {}, stages, work)
    assert (found.micro_batch, found.micro_batches) == (1, 1) and found.tokens_per_second == pytest.approx(1000 / 12)


@pytest.mark.parametrize(
    ("lap", "sequences", "groups"),
    [
        (Lap(1, 10.0, 5.0, ""), 9, 2),  # the ring is exactly twice the bottleneck
        (Lap(1, 10.1, 5.0, ""), 9, 3),
        (Lap(1, 10.0, 5.0, ""), 1, 1),
        (Lap(4, 99.0, 1.0, ""), 9, 2),  # no third group of four
        (Lap(4, 99.0, 1.0, ""), 3, 1),
    ],
)
def test_no_more_groups_than_the_bottleneck_takes_or_the_sequences_fill(lap: Lap, sequences: int, groups: int) -> None:
    assert lap.fewest_micro_batches(sequences) == groups


def test_devices_of_one_name_are_not_added_up() -> None:
    devices = {"a1": device("a1", 3.0, "box"), "b2": device("b2", 5.0, "box")}
    links = {pair: LinkProfile(1.0, 1000) for pair in (("a1", "b2"), ("b2", "a1"))}
    lap = lap_of(MODEL, devices, links, (Stage("a1", 0, 1), Stage("b2", 2, 2)), 1)
    assert (lap.bottleneck_ms, lap.bottleneck) == (6.0, "box")


def test_a_link_that_a_lap_takes_twice_is_busy_twice_as_long() -> None:
    model = ModelProfile("m", (*MODEL.layers[:2], *MODEL.layers[1:2] * 2, MODEL.layers[2]))
    devices = {name: device(name, 0.1) for name in "ab"}
    links = {pair: LinkProfile(4.0, 8.0) for pair in (("a", "b"), ("b", "a"))}
    stages = (Stage("a", 0, 1), Stage("b", 2, 2), Stage("a", 3, 3), Stage("b", 4, 4))
    lap = lap_of(model, devices, links, stages, 1)
    assert (lap.bottleneck, lap.bottleneck_ms) == ("a to b", 10.0)
    run = simulate(model, devices, links, stages, Workload(), micro_batches=9, steps=99, prefill=False)
    assert run.steady_tokens_per_second == pytest.approx(1000 * lap.rate(9), rel=0.02)


def test_the_slowest_of_devices_hops_and_media_is_named() -> None:
    devices = {name: device(name, 0.1) for name in "ab"}
    stages = (Stage("a", 0, 1), Stage("b", 2, 2))
    links = {("a", "b"): LinkProfile(2.0, 8.0), ("b", "a"): LinkProfile(1.0, 8.0)}  # 1000 bytes take 1 ms
    lap = lap_of(MODEL, devices, links, stages, 1)
    assert (lap.bottleneck, lap.bottleneck_ms, lap.ring_ms) == ("a to b", 3.0, pytest.approx(0.3 + 3 + 2))
    air = Medium("air", frozenset(links))
    assert lap_of(MODEL, devices, links, stages, 1, [air]).bottleneck == "a to b"  # 2 ms of air for both hops
    shared = lap_of(MODEL, devices, links, stages, 4, [air])
    assert (shared.bottleneck, shared.bottleneck_ms) == ("medium air", 8.0)


@pytest.mark.parametrize(("tokens", "ms"), [(1, 3.0), (2, 3.0), (3, 4.0), (4, 5.0), (8, 10.0)])
def test_times_are_constant_then_linear_then_proportional(tokens: int, ms: float) -> None:
    assert batch_ms(((2, 3.0), (4, 5.0)), tokens) == ms


def test_one_measured_size_holds_for_all_and_none_for_no_size() -> None:
    assert [batch_ms(((2, 3.0),), tokens) for tokens in (1, 2, 3, 50)] == [3.0] * 4
    assert batch_ms((), 1) == inf
