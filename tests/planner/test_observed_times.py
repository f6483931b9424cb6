"""Layer times refined by running stages: what was seen is what the cost model then says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerllm.planner.cost.layer_costs import layer_ms
from peerllm.planner.cost.observed_times import Points, with_observed_times
from peerllm.types import DeviceProfile, Layer, ModelProfile, Stage

MODEL = ModelProfile("m", (
    Layer("embedding", "embedding", 1, 0, 8),
    *(Layer("block", "block", 1, 1, 8) for _ in range(4)),
    Layer("head", "head", 1, 0, 4),
))  # fmt: skip
TIMES = {"embedding": ((1, 0.1),), "block": ((1, 1.0), (8, 2.0), (32, 6.0)), "head": ((1, 0.5), (8, 0.9))}
STAGES = (Stage("a", 0, 2), Stage("b", 3, 4), Stage("a", 5, 5))


def devices() -> dict[str, DeviceProfile]:
    return {name: DeviceProfile(name, name, 99, TIMES) for name in "abc"}


def total(device: DeviceProfile, tokens: int, name: str = "a") -> float:
    return sum(
        layer_ms(device, MODEL.layers[index], tokens)
        for stage in STAGES
        if stage.device == name
        for index in range(stage.first_layer, stage.last_layer + 1)
    )


sizes = st.dictionaries(st.integers(1, 16), st.floats(0.01, 50), min_size=1, max_size=5)


@given(sizes, sizes)
def test_stages_then_cost_what_they_were_seen_to_take(one: dict[int, float], other: dict[int, float]) -> None:
    common = one.keys() & other.keys()
    paces: dict[int, Points] = {0: tuple(sorted(one.items())), 2: tuple(sorted(other.items()))}
    refined = with_observed_times(MODEL, devices(), STAGES, paces)
    for size in common:
        assert abs(total(refined["a"], size) - one[size] - other[size]) < 1e-6 * (one[size] + other[size])
    if not common:
        assert refined["a"] == devices()["a"]
    assert refined["b"] == devices()["b"] and refined["c"] == devices()["c"], "nothing was seen of them"
    for kind, points in refined["a"].layer_ms.items():
        assert [n for n, _ in points] == sorted({n for n, _ in points})
        assert all(ms > 0 for _, ms in points)
        if kind == "block":
            assert dict(points)[32] == 6.0, "prompts' chunks stay as they were measured"


def test_a_device_with_a_silent_stage_stays_as_profiled() -> None:
    assert with_observed_times(MODEL, devices(), STAGES, {0: ((1, 9.0),)}) == devices()
    assert with_observed_times(MODEL, devices(), STAGES, {1: ((1, 4.0),)})["b"].layer_ms["block"][0] == (1, 2.0)


def test_a_profile_without_any_time_cannot_be_scaled() -> None:
    idle = {name: DeviceProfile(name, name, 99, dict.fromkeys(TIMES, ((1, 0.0),))) for name in "abc"}
    assert with_observed_times(MODEL, idle, STAGES, {1: ((1, 4.0),)}) == idle
