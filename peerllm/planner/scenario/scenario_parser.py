"""Read a scenario file: every key is checked, and errors name the key.

Unknown keys are ignored, so that a file may carry what a newer version or another tool reads.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, Links, layer_bytes
from peerllm.planner.scenario.json_value import JsonValue, ScenarioError
from peerllm.planner.scenario.scenario import Scenario
from peerllm.types import (
    MAX_STAGES,
    DeviceId,
    DeviceProfile,
    Layer,
    LinkProfile,
    Medium,
    ModelProfile,
    Workload,
)

MAX_LAYERS = MAX_STAGES  # repeats expanded; every layer may be a stage of its own
MAX_DEVICES = 512
MAX_HOPS = 1 << 25  # layers × devices²: the planner builds tables of that size, 256 MiB each
MAX_POINTS = 1024  # token counts measured per kind of layer
MAX_BYTES = 1 << 62  # sums over all devices or layers stay below 64 bits
MAX_TOKENS = 1 << 31
MAX_SEQUENCES = 4096  # the planner tries every batch size up to it
MAX_PIECES = 4096  # chunks of one prompt
MAX_MS = 1e15  # some thirty thousand years; sums of products stay finite
MIN_MBPS, MAX_MBPS = 1e-9, 1e15


def parse(raw: object) -> Scenario:
    """The scenario in decoded JSON. ScenarioError names the wrong key by its path."""
    root = JsonValue("", raw)
    model = _model(root["model"])
    devices = _devices(root["devices"], model)
    links = _links(root["links"], tuple(devices))
    source = _device(root["source"], devices)
    cloud = root.get("cloud")
    workload = _workload(root["workload"])
    needed = sum(layer_bytes(model, index, workload) for index in range(len(model.layers)))
    if needed > MAX_BYTES:
        raise root["model"].get("layers").wrong(f"need more than {MAX_BYTES} bytes with their KV")
    return Scenario(
        model,
        _bounded(devices, needed),
        links,
        source,
        None if cloud.value is None else _device(cloud, devices),
        workload,
        _media(root.get("shared_media", []), devices, links),
    )


def _model(field: JsonValue) -> ModelProfile:
    name, layers = field["name"].text(), field["layers"]
    found: list[Layer] = []
    for one in layers.items(1, MAX_LAYERS):
        repeat = one.get("repeat", 1).whole(1, MAX_LAYERS)
        if len(found) + repeat > MAX_LAYERS:
            raise one.get("repeat").wrong(f"leads to more than {MAX_LAYERS} layers")
        layer = _layer(one)
        for place in range(repeat):
            named = replace(layer, name=f"{layer.name}{place}") if repeat > 1 else layer
            found.append(replace(named, tied_to=_tied(one.get("tied_to"), found)))
    if len(found) < 3:
        raise layers.wrong(f"must make at least 3 layers (embedding, block, head), not {len(found)}")
    return ModelProfile(name, tuple(found))


def _layer(field: JsonValue) -> Layer:
    window = field.get("kv_window_tokens")
    return Layer(
        name=field["name"].text(),
        kind=field["kind"].text(),
        memory_bytes=field["memory_bytes"].whole(0, MAX_BYTES),
        kv_bytes_per_token=field["kv_bytes_per_token"].whole(0, MAX_BYTES),
        output_bytes_per_token=field["output_bytes_per_token"].whole(0, MAX_BYTES),
        kv_window_tokens=None if window.value is None else window.whole(1, MAX_TOKENS),
        state_bytes_per_sequence=field.get("state_bytes_per_sequence", 0).whole(0, MAX_BYTES),
    )


def _tied(field: JsonValue, earlier: Sequence[Layer]) -> int | None:
    """The layer whose weights are shared, by name or number: one that must lie on the source."""
    if field.value is None:
        return None
    candidates = range(min(SOURCE_LAYERS, len(earlier)))
    for index in candidates:
        if field.value == earlier[index].name or (type(field.value) is int and field.value == index):
            return index
    names = " or ".join(f"{index} ({earlier[index].name})" for index in candidates) or "none: this is layer 0"
    raise field.wrong(f"must be an earlier layer that lies on the source, by name or number: {names}")


def _devices(field: JsonValue, model: ModelProfile) -> dict[DeviceId, DeviceProfile]:
    found: dict[DeviceId, DeviceProfile] = {}
    kinds = dict.fromkeys(layer.kind for layer in model.layers)
    for one in field.items(1, MAX_DEVICES):
        name = one["name"].text()
        if name in found:
            raise one["name"].wrong(f"is the name of an earlier device: {name!r}")
        memory, tables = one["memory_bytes"].whole(0, MAX_BYTES), one["layer_ms"]
        speed = {kind: _points(table) for kind, table in tables.mapping().items()}
        for kind in kinds:
            if kind not in speed:
                raise tables[kind].wrong("is missing")
        found[name] = DeviceProfile(name, name, memory, speed)
    if len(model.layers) * len(found) ** 2 > MAX_HOPS:
        raise field.wrong(f"are too many for {len(model.layers)} layers: layers × devices² is at most {MAX_HOPS}")
    return found


def _points(field: JsonValue) -> tuple[tuple[int, float], ...]:
    """(tokens, milliseconds), ascending in tokens."""
    found: dict[int, float] = {}
    for text, ms in field.mapping().items():
        tokens = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
        if not 1 <= tokens <= MAX_TOKENS:
            raise ms.wrong(f"is no count of tokens from 1 to {MAX_TOKENS}")
        if tokens in found:
            raise ms.wrong(f"states {tokens} tokens a second time")
        found[tokens] = ms.number(0, MAX_MS)
    if not 1 <= len(found) <= MAX_POINTS:
        raise field.wrong(f"must have 1 to {MAX_POINTS} points, not {len(found)}")
    return tuple(sorted(found.items()))


def _bounded(devices: Mapping[DeviceId, DeviceProfile], needed: int) -> Mapping[DeviceId, DeviceProfile]:
    """The devices; where their memory would overflow a 64-bit sum, none lends more than the whole model needs."""
    if sum(device.memory_bytes for device in devices.values()) <= MAX_BYTES:
        return devices
    if needed * len(devices) > MAX_BYTES:
        raise ScenarioError(f"devices lend more than {MAX_BYTES} bytes together, and the model is as large")
    return {name: replace(one, memory_bytes=min(one.memory_bytes, needed)) for name, one in devices.items()}


def _device(field: JsonValue, known: Container[DeviceId]) -> DeviceId:
    name = field.text()
    if name not in known:
        raise field.wrong(f"names no device of this scenario: {name!r}")
    return name


def _links(field: JsonValue, names: tuple[DeviceId, ...]) -> Links:
    default = field.get("default")
    usual = None if default.value is None else _link(default)
    found: dict[tuple[DeviceId, DeviceId], LinkProfile] = {}
    if usual is not None:
        found = {(a, b): usual for a in names for b in names if a != b}
    known = set(names)
    stated: set[tuple[DeviceId, DeviceId]] = set()
    for pair in field.get("pairs", []).items(0, len(names) ** 2):
        one, other = (_device(pair[end], known) for end in ("from", "to"))
        if one == other:
            raise pair["to"].wrong(f"is the device that the link starts from: {one!r}")
        link = _link(pair)
        both = pair.get("symmetric", False).boolean()
        for ends in ((one, other), (other, one))[: 1 + both]:
            if ends in stated:
                raise pair.wrong(f"states the link from {ends[0]!r} to {ends[1]!r} a second time")
            stated.add(ends)
            if link is None:
                found.pop(ends, None)
            else:
                found[ends] = link
    return found


def _link(field: JsonValue) -> LinkProfile | None:
    """None where `mbps` is null: there is no link."""
    mbps, latency = field["mbps"], field.get("latency_ms", 0)
    if mbps.value is None:
        latency.number(0, MAX_MS)
        return None
    return LinkProfile(field["latency_ms"].number(0, MAX_MS), mbps.number(MIN_MBPS, MAX_MBPS))


def _media(field: JsonValue, known: Container[DeviceId], links: Links) -> tuple[Medium, ...]:
    """Each medium's links, as far as they exist: those listed, or all that touch one of its `devices`."""
    found: dict[str, Medium] = {}
    for one in field.items(0, MAX_DEVICES):
        name = one["name"].text()
        if name in found:
            raise one["name"].wrong(f"is the name of an earlier medium: {name!r}")
        listed, members = one.get("links"), one.get("devices")
        if (listed.value is None) == (members.value is None):
            raise one.wrong("must have either links or devices")
        if members.value is not None:
            ends = {_device(member, known) for member in members.items(1, MAX_DEVICES)}
            shared = frozenset(link for link in links if not ends.isdisjoint(link))
        else:
            pairs = [link.items(2, 2) for link in listed.items(1, MAX_DEVICES**2)]
            shared = frozenset((_device(a, known), _device(b, known)) for a, b in pairs) & links.keys()
        found[name] = Medium(name, shared)
    return tuple(found.values())


def _workload(field: JsonValue) -> Workload:
    chunk = field.get("prompt_chunk")
    prompt = field["prompt_tokens"].whole(1, MAX_TOKENS)
    if chunk.value is not None and -(-prompt // chunk.whole(1, MAX_TOKENS)) > MAX_PIECES:
        raise chunk.wrong(f"cuts the prompt into more than {MAX_PIECES} pieces")
    return Workload(
        prompt_tokens=prompt,
        output_tokens=field["output_tokens"].whole(1, MAX_TOKENS),
        sequences=field["sequences"].whole(1, MAX_SEQUENCES),
        context=field["context"].whole(1, MAX_TOKENS),
        prompt_chunk=None if chunk.value is None else chunk.whole(1, MAX_TOKENS),
    )
