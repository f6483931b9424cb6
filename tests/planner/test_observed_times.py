"""Layer times refined by running stages: what was seen is what the cost model then says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerllm.planner.cost.layer_costs import layer_ms
from peerllm.planner.cost.observed_times import MISJUDGED, SLIGHT_MS, Points, slower_than_measured, with_observed_times
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


def seen(a: float, b: float, scale: float = 20.0) -> dict[int, Points]:
    """What the stages take where `a` and `b` are so many times slower than measured; `scale`: of a large model."""
    stretched = {name: {k: tuple((n, scale * ms * r) for n, ms in p) for k, p in TIMES.items()}
                 for name, r in (("a", a), ("b", b))}  # fmt: skip
    times = {name: DeviceProfile(name, name, 99, layer_ms) for name, layer_ms in stretched.items()}
    return {
        place: tuple(
            (n, sum(layer_ms(times[s.device], layer, n) for layer in MODEL.layers[s.first_layer : s.last_layer + 1]))
            for n in (1, 4)
        )
        for place, s in enumerate(STAGES)
    }


def large(scale: float = 20.0) -> dict[str, DeviceProfile]:
    scaled = {kind: tuple((n, scale * ms) for n, ms in points) for kind, points in TIMES.items()}
    return {name: DeviceProfile(name, name, 99, scaled) for name in "abc"}


def test_a_device_much_slower_than_measured_is_told_and_how_many_times() -> None:
    def told(a: float, b: float) -> dict[str, float]:
        found = slower_than_measured(MODEL, large(), STAGES, seen(a, b))
        return {name: round(times, 3) for name, times in found.items()}

    assert told(1, 3) == {"b": 3} and told(3, 1) == {"a": 3}
    assert told(1, MISJUDGED - 0.1) == {}
    assert told(4, 4) == {} and told(2, 6) == {"b": 3}, "all are slower: the machine is, or the measurement"
    assert told(0.2, 1) == {}, "one that is faster than measured makes no other slow"


def test_what_is_slight_or_was_not_observed_is_not_told() -> None:
    slight = SLIGHT_MS / 4  # b's two blocks are measured at twice that
    assert not slower_than_measured(MODEL, large(slight), STAGES, seen(1, 2.5, slight))
    assert slower_than_measured(MODEL, large(slight), STAGES, seen(1, 4, slight)).keys() == {"b"}
    assert not slower_than_measured(MODEL, large(), STAGES, {1: seen(1, 9)[1]}), "nothing to compare it with"
    assert not slower_than_measured(MODEL, large(), STAGES, {})
