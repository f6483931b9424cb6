"""The scenario file: what it means, and that a malformed one is refused by the name of its key."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.errors import BadInputError, InfeasibleError
from peerllm.planner.scenario import scenario_parser as module
from peerllm.planner.scenario.json_value import ScenarioError
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.scenario.scenario_export import scenario_file
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.strategies.strategy_plan import plan
from peerllm.types import LinkProfile, Medium
from tests.sizes import examples

Raw = dict[str, Any]
SPEED = {"block": {"1": 5.2, "32": 9.0}, "embedding": {"1": 0.1}, "head": {"1": 1.0}}


def layer(name: str, **more: Any) -> Raw:
    sizes = {"memory_bytes": 1, "kv_bytes_per_token": 0, "output_bytes_per_token": 8192}
    return {"name": name, "kind": name, **sizes, **more}


def valid() -> Raw:
    return {
        "model": {"name": "m", "layers": [layer("embedding"), layer("block", repeat=3), layer("head")]},
        "devices": [{"name": name, "memory_bytes": 100, "layer_ms": copy.deepcopy(SPEED)} for name in "abc"],
        "links": {
            "default": {"mbps": 1000, "latency_ms": 0.5},
            "pairs": [
                {"from": "a", "to": "b", "mbps": 1, "latency_ms": 2.1, "symmetric": True},
                {"from": "a", "to": "c", "mbps": None},
            ],
        },
        "source": "a",
        "cloud": "b",
        "workload": {"prompt_tokens": 32, "output_tokens": 96, "sequences": 2, "context": 128},
        "shared_media": [{"name": "wifi", "devices": ["c"]}],
    }


def changed(path: str, value: Any = ..., **more: Any) -> Raw:
    """A valid scenario with one key set (dotted path, numbers for places), or removed."""
    raw = valid()
    for at, new in ((path, value), *more.items()):
        target: Any = raw
        *way, last = (int(part) if part.isdecimal() else part for part in at.split("."))
        for part in way:
            target = target[part]
        if new is ...:
            del target[last]
        else:
            target[last] = new
    return raw


def test_what_the_file_says() -> None:
    found = parse(valid())
    assert [one.name for one in found.model.layers] == ["embedding", "block0", "block1", "block2", "head"]
    assert {one.kind for one in found.model.layers} == {"embedding", "block", "head"}
    assert list(found.devices) == ["a", "b", "c"]
    assert found.devices["a"].layer_ms["block"] == ((1, 5.2), (32, 9.0))
    assert found.links["a", "b"] == found.links["b", "a"] == LinkProfile(2.1, 1)
    assert found.links["c", "a"] == LinkProfile(0.5, 1000)
    assert ("a", "c") not in found.links
    assert (found.source, found.cloud) == ("a", "b")
    assert (found.workload.prompt_tokens, found.workload.output_tokens) == (32, 96)
    assert (found.workload.sequences, found.workload.context) == (2, 128)
    assert found.media[0].links == {("c", "a"), ("c", "b"), ("b", "c")}


def test_points_are_sorted_by_tokens() -> None:
    found = parse(changed("devices.0.layer_ms.block", {"100": 3, "9": 2, "32": 1}))
    assert found.devices["a"].layer_ms["block"] == ((9, 2.0), (32, 1.0), (100, 3.0))


def test_what_may_be_left_out() -> None:
    raw = valid()
    del raw["cloud"], raw["shared_media"], raw["links"]["default"]
    raw["somebody's"] = raw["model"]["layers"][0]["note"] = object()
    found = parse(raw)
    assert found.cloud is None and found.media == ()
    assert set(found.links) == {("a", "b"), ("b", "a")}
    assert parse(changed("links", {})).links == {}


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert parse(changed("devices.1.memory_bytes", 14e9)).devices["b"].memory_bytes == 14_000_000_000


def test_options_of_the_live_system() -> None:
    more = {"kv_window_tokens": 4, "state_bytes_per_sequence": 7}
    layers = [layer("embedding"), layer("block", repeat=2, **more), layer("head", tied_to="embedding")]
    raw = changed("model.layers", layers)
    raw["workload"]["prompt_chunk"] = 10
    found = parse(raw)
    assert (found.model.layers[2].kv_window_tokens, found.model.layers[2].state_bytes_per_sequence) == (4, 7)
    assert found.model.layers[-1].tied_to == 0
    assert found.workload.pieces == (10, 10, 10, 2)
    raw["model"]["layers"][-1]["tied_to"] = 1
    assert parse(raw).model.layers[-1].tied_to == 1


def test_a_medium_may_list_its_links() -> None:
    raw = changed("shared_media", [{"name": "wifi", "links": [["a", "b"], ["a", "c"]]}])
    assert parse(raw).media[0].links == {("a", "b")}  # there is no link from a to c


def test_memory_that_would_overflow_a_sum_counts_as_room_for_everything() -> None:
    raw = valid()
    for device in raw["devices"]:
        device["memory_bytes"] = 2**61
    lent = [one.memory_bytes for one in parse(raw).devices.values()]
    assert lent == [5, 5, 5]  # the model's five bytes; there is no KV
    for one in raw["model"]["layers"]:
        one["memory_bytes"] = 2**59
    with pytest.raises(ScenarioError, match="devices"):
        parse(raw)


MALFORMED: list[tuple[str, Any, str]] = [
    ("model", ..., "model is missing"),
    ("devices", ..., "devices is missing"),
    ("links", ..., "links is missing"),
    ("source", ..., "source is missing"),
    ("workload", ..., "workload is missing"),
    ("model.name", ..., "model.name is missing"),
    ("model.name", 7, "model.name must be a string"),
    ("model.layers", [], "model.layers must have 1 to"),
    ("model.layers", {}, "model.layers must be a list"),
    ("model.layers", [layer("embedding"), layer("block")], "model.layers must make at least 3 layers"),
    ("model.layers.1.kind", ..., "model.layers[1].kind is missing"),
    ("model.layers.1.kind", "mamba", "devices[0].layer_ms.mamba is missing"),
    ("model.layers.1.repeat", 0, "model.layers[1].repeat must be a whole number from 1"),
    ("model.layers.1.repeat", None, "model.layers[1].repeat must be"),
    ("model.layers.1.repeat", 1023, "model.layers[2].repeat leads to more than 1024 layers"),
    ("model.layers.1.repeat", 10**9, "model.layers[1].repeat must be"),
    ("model.layers.0.memory_bytes", -1, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", 1.5, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", True, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", "1", "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", 2**62 + 1, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", 2**62, "model.layers need more than"),
    ("model.layers.0.memory_bytes", 10**5000, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.memory_bytes", math.inf, "model.layers[0].memory_bytes must be"),
    ("model.layers.0.kv_bytes_per_token", math.nan, "model.layers[0].kv_bytes_per_token must be"),
    ("model.layers.0.kv_bytes_per_token", 2**60, "model.layers need more than"),
    ("model.layers.2.output_bytes_per_token", ..., "model.layers[2].output_bytes_per_token is missing"),
    ("model.layers.0.tied_to", 0, "model.layers[0].tied_to must be an earlier layer"),
    ("model.layers.2.tied_to", 2, "model.layers[2].tied_to must be an earlier layer"),
    ("model.layers.2.tied_to", True, "model.layers[2].tied_to must be an earlier layer"),
    ("model.layers.2.tied_to", "head", "model.layers[2].tied_to must be an earlier layer"),
    ("model.layers.1.kv_window_tokens", 0, "model.layers[1].kv_window_tokens must be"),
    ("model.layers.1.state_bytes_per_sequence", -1, "model.layers[1].state_bytes_per_sequence must be"),
    ("devices", [], "devices must have 1 to"),
    ("devices.0", 3, "devices[0] must be an object"),
    ("devices.1.name", "a", "devices[1].name is the name of an earlier device"),
    ("devices.1.name", "", "devices[1].name must have 1 to 200 characters"),
    ("devices.1.name", "x" * 201, "devices[1].name must have 1 to 200 characters"),
    ("devices.1.name", "\ud800", "devices[1].name must be valid text"),
    ("devices.2.memory_bytes", ..., "devices[2].memory_bytes is missing"),
    ("devices.2.layer_ms", [], "devices[2].layer_ms must be an object"),
    ("devices.2.layer_ms.block", ..., "devices[2].layer_ms.block is missing"),
    ("devices.2.layer_ms.block", {}, "devices[2].layer_ms.block must have 1 to"),
    ("devices.2.layer_ms.block", {"0": 1}, "devices[2].layer_ms.block.0 is no count of tokens"),
    ("devices.2.layer_ms.block", {"-1": 1}, "devices[2].layer_ms.block.-1 is no count of tokens"),
    ("devices.2.layer_ms.block", {"1.5": 1}, "devices[2].layer_ms.block.1.5 is no count of tokens"),
    ("devices.2.layer_ms.block", {"one": 1}, "devices[2].layer_ms.block.one is no count of tokens"),
    ("devices.2.layer_ms.block", {"٣": 1}, "devices[2].layer_ms.block.٣ is no count of tokens"),
    ("devices.2.layer_ms.block", {"9" * 5000: 1}, "devices[2].layer_ms.block.'999"),
    ("devices.2.layer_ms.block", {"1": 1, "01": 2}, "devices[2].layer_ms.block.01 states 1 tokens a second time"),
    ("devices.2.layer_ms.block", {"1": -0.1}, "devices[2].layer_ms.block.1 must be a number from 0"),
    ("devices.2.layer_ms.block", {"1": math.nan}, "devices[2].layer_ms.block.1 must be a number"),
    ("devices.2.layer_ms.block", {"1": math.inf}, "devices[2].layer_ms.block.1 must be a number"),
    ("devices.2.layer_ms.block", {"1": None}, "devices[2].layer_ms.block.1 must be a number"),
    ("devices.2.layer_ms.block", {"1": False}, "devices[2].layer_ms.block.1 must be a number"),
    ("links", [], "links must be an object"),
    ("links.default.mbps", 0, "links.default.mbps must be a number from"),
    ("links.default.latency_ms", ..., "links.default.latency_ms is missing"),
    ("links.default.latency_ms", -1, "links.default.latency_ms must be a number from 0"),
    ("links.default", {}, "links.default.mbps is missing"),
    ("links.pairs.0.mbps", -1, "links.pairs[0].mbps must be a number from"),
    ("links.pairs.0.mbps", math.nan, "links.pairs[0].mbps must be a number from"),
    ("links.pairs.0.mbps", ..., "links.pairs[0].mbps is missing"),
    ("links.pairs.0.from", "z", "links.pairs[0].from names no device"),
    ("links.pairs.0.to", ..., "links.pairs[0].to is missing"),
    ("links.pairs.0.to", "a", "links.pairs[0].to is the device that the link starts from"),
    ("links.pairs.0.symmetric", 1, "links.pairs[0].symmetric must be true or false"),
    ("links.pairs.1.latency_ms", "slow", "links.pairs[1].latency_ms must be a number"),
    ("links.pairs.1", {"from": "a", "to": "b", "mbps": 1, "latency_ms": 0}, "links.pairs[1] states the link from 'a'"),
    ("links.pairs.1", {"from": "b", "to": "a", "mbps": None}, "links.pairs[1] states the link from 'b' to 'a'"),
    ("source", "z", "source names no device"),
    ("source", ["a"], "source must be a string"),
    ("cloud", "z", "cloud names no device"),
    ("workload.context", ..., "workload.context is missing"),
    ("workload.context", 0, "workload.context must be a whole number from 1"),
    ("workload.prompt_tokens", 1.5, "workload.prompt_tokens must be"),
    ("workload.output_tokens", True, "workload.output_tokens must be"),
    ("workload.sequences", 10**6, "workload.sequences must be a whole number from 1 to"),
    ("workload.prompt_chunk", 0, "workload.prompt_chunk must be"),
    ("shared_media", {}, "shared_media must be a list"),
    ("shared_media.0.name", ..., "shared_media[0].name is missing"),
    ("shared_media.0.devices", ..., "shared_media[0] must have either links or devices"),
    ("shared_media.0.devices", ["z"], "shared_media[0].devices[0] names no device"),
    ("shared_media.0.links", [["a", "b"]], "shared_media[0] must have either links or devices"),
    ("shared_media", [{"name": "w", "links": [["a"]]}], "shared_media[0].links[0] must have 2 to 2 members"),
    ("shared_media", [{"name": "w", "devices": ["a"]}] * 2, "shared_media[1].name is the name of an earlier medium"),
]


@pytest.mark.parametrize(("path", "value", "text"), MALFORMED, ids=range(len(MALFORMED)))
def test_the_offending_key_is_named(path: str, value: Any, text: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(changed(path, value))
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 500


def points(count: int) -> Raw:
    return {str(tokens): 1.0 for tokens in range(1, count + 1)}


def named(count: int) -> list[Raw]:
    return [{"name": f"{'abc'[i]}" if i < 3 else f"d{i}", "memory_bytes": 1, "layer_ms": SPEED} for i in range(count)]


AT_THE_BOUND: list[tuple[str, Any, Any]] = [  # (key, the last value that is taken, the first that is not)
    ("model.name", "x" * 200, "x" * 201),
    ("model.layers.1.repeat", 1022, 1023),
    ("model.layers.0.memory_bytes", 2**62 - 4, 2**62 - 3),  # the other four layers weigh a byte each
    ("model.layers.0.output_bytes_per_token", 2**62, 2**62 + 1),
    ("model.layers.1.kv_window_tokens", 2**31, 2**31 + 1),
    ("devices", named(512), named(513)),
    ("devices.0.memory_bytes", 0, -1),
    ("devices.2.layer_ms.block", points(1024), points(1025)),
    ("devices.2.layer_ms.block", {str(2**31): 1}, {str(2**31 + 1): 1}),
    ("devices.2.layer_ms.block", {"1": 1e15}, {"1": 1.1e15}),
    ("links.default.mbps", 1e-9, 0.9e-9),
    ("links.default.mbps", 1e15, 1.1e15),
    ("links.default.latency_ms", 1e15, 1.1e15),
    ("workload.sequences", 4096, 4097),
    ("workload.sequences", 1, 0),
    ("workload.context", 2**31, 2**31 + 1),
    ("workload.output_tokens", 1, 0),
    ("workload.prompt_tokens", 2**31, 2**31 + 1),
]


@pytest.mark.parametrize(("path", "taken", "refused"), AT_THE_BOUND, ids=range(len(AT_THE_BOUND)))
def test_every_limit_is_where_it_is_said_to_be(path: str, taken: Any, refused: Any) -> None:
    parse(changed(path, taken))
    with pytest.raises(ScenarioError):
        parse(changed(path, refused))


def test_a_prompt_is_not_cut_into_countless_pieces() -> None:
    parse(changed("workload.prompt_chunk", 10, **{"workload.prompt_tokens": 40960}))
    with pytest.raises(ScenarioError, match=r"workload\.prompt_chunk"):
        parse(changed("workload.prompt_chunk", 10, **{"workload.prompt_tokens": 40961}))


def test_tables_too_large_for_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HOPS", 5 * 9)
    parse(valid())
    monkeypatch.setattr(module, "MAX_HOPS", 5 * 9 - 1)
    with pytest.raises(ScenarioError, match="devices are too many for 5 layers"):
        parse(valid())


def test_memory_is_kept_as_lent_while_its_sum_is_in_bounds() -> None:
    def lent(*each: int) -> list[int]:
        raw = valid()
        for device, nbytes in zip(raw["devices"], each, strict=True):
            device["memory_bytes"] = nbytes
        return [one.memory_bytes for one in parse(raw).devices.values()]

    assert lent(2**61, 2**61, 0) == [2**61, 2**61, 0]
    assert lent(2**61, 2**61, 1) == [5, 5, 1]


def test_a_written_file_reads_back_and_devices_of_one_name_stay_apart() -> None:
    found = parse(valid())
    assert parse(scenario_file(found)) == replace(
        found, model=replace(found.model, layers=parse(scenario_file(found)).model.layers)
    )
    ids = {"a": "1111111122", "b": "2222222233", "c": "c"}
    devices = {
        ids[one]: replace(d, device=ids[one], name="c" if one == "c" else "box") for one, d in found.devices.items()
    }
    links = {(ids[a], ids[b]): link for (a, b), link in found.links.items()}
    media = tuple(Medium(m.name, frozenset((ids[a], ids[b]) for a, b in m.links)) for m in found.media)
    twice = replace(found, devices=devices, links=links, source=ids["a"], cloud=ids["b"], media=media)
    again = parse(scenario_file(twice))
    assert list(again.devices) == ["box 11111111", "box 22222222", "c"]
    assert (again.source, again.cloud) == ("box 11111111", "box 22222222")
    assert again.links["box 11111111", "box 22222222"] == found.links["a", "b"]
    assert again.media[0].links == {("c", "box 11111111"), ("c", "box 22222222"), ("box 22222222", "c")}


def test_the_error_is_bad_input() -> None:
    assert issubclass(ScenarioError, BadInputError)


@pytest.mark.parametrize("raw", [None, [], "x", 3, True, {1: 2}])
def test_what_is_no_scenario_at_all(raw: object) -> None:
    with pytest.raises(ScenarioError):
        parse(raw)


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**62, 2**63, 1e300, math.inf]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["a", "b", "block"]))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, one in inner for found in places(one, (*way, key)))]


def hold(raw: object) -> Scenario | None:
    """Parses or refuses; what parses can be planned for."""
    try:
        found = parse(raw)
    except ScenarioError as error:
        str(error).encode()  # else it could not be printed
        return None
    for strategy in ("edge-solo", "even"):
        try:
            assert math.isfinite(plan(found, strategy).bound)
        except InfeasibleError:
            continue
    return found


@given(VALUES)
@settings(max_examples=examples(100))
def test_anything_else_is_refused(raw: object) -> None:
    assert hold(raw) is None


@given(st.data())
@settings(max_examples=examples(400))
def test_a_mutated_scenario_parses_or_is_refused(data: st.DataObject) -> None:
    raw = valid()
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from([way for way in places(raw) if way]))
        target: Any = raw
        for part in way[:-1]:
            target = target[part]
        action: Callable[[], None] = data.draw(
            st.sampled_from([
                lambda target=target, way=way: target.__delitem__(way[-1]),
                lambda target=target, way=way: target.__setitem__(way[-1], data.draw(VALUES)),
                lambda target=target, way=way: target.__setitem__(way[-1], data.draw(NUMBERS)),
            ])
        )  # fmt: skip
        action()
    hold(raw)
