"""Random households and models for the planner's tests: tight memory, asymmetric and missing links, equal devices."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from peerllm.types import DeviceId, DeviceProfile, Layer, LinkProfile, Medium, ModelProfile, Workload

INSTANCES, BLOCKS = 3600, 18  # more than 2,000 of them are feasible; a block is one test
EVERY_BLOCK = [pytest.param(block, marks=[pytest.mark.slow] if block else []) for block in range(BLOCKS)]


def seeds(block: int) -> range:
    return range(block * INSTANCES // BLOCKS, (block + 1) * INSTANCES // BLOCKS)


def shape(seed: int) -> tuple[int, int]:
    """Layers and devices of a seed's instance: 3 to 8 and 1 to 4."""
    return 3 + seed % 6, (4, 3, 2, 4, 3, 2, 4, 3, 1)[seed // 6 % 9]


@dataclass(frozen=True, slots=True)
class Instance:
    """What a planner is asked."""

    model: ModelProfile
    devices: dict[DeviceId, DeviceProfile]
    links: dict[tuple[DeviceId, DeviceId], LinkProfile]
    source: DeviceId
    workload: Workload
    working: dict[DeviceId, int]
    head_on_source: bool
    media: tuple[Medium, ...] = ()

    @property
    def asked(self):
        """The planners' positional arguments."""
        return self.model, self.devices, self.links, self.source, self.workload


def instance(seed: int, layers: int, count: int) -> Instance:
    r = random.Random(seed)
    model, work = _model(r, layers), _workload(r)
    names = [f"d{i}" for i in range(count)]
    alike = r.random() < 0.3
    devices = _devices(r, model, work, names, alike)
    links = _links(r, names, alike)
    working = dict.fromkeys(names, r.choice([0, 0, 5]))
    if r.random() < 0.1:
        working = {name: r.randint(0, 9) for name in names}
    return Instance(model, devices, links, r.choice(names), work, working, r.random() < 0.2)


def on_air(seed: int, layers: int, count: int) -> Instance:
    """The same household with slow links, most of which share one radio or two: airtime is what limits it."""
    r, wired = random.Random(seed), instance(seed, layers, count)
    links = {pair: LinkProfile(r.uniform(0, 0.2), r.choice([0.3, 0.5, 1])) for pair in wired.links}
    media = tuple(
        Medium(f"radio {i}", frozenset(pair for pair in sorted(links) if r.random() < 0.8))
        for i in range(r.randint(1, 2))
    )
    return replace(wired, links=links, media=media)


def _model(r: random.Random, layers: int) -> ModelProfile:
    variants = r.choice([1, 1, 2, layers])

    def size():
        state = r.choice([0, 0, 0, 7])
        return r.randint(1, 40), r.choice([0, 0, 1, 2]), r.choice([8, 512, 4096]), r.choice([None, 4]), state

    sizes = [size() for _ in range(variants)]
    many = r.random() < 0.5
    blocks = []
    for i in range(layers - 2):
        weights, kv, out, window, state = sizes[i % variants]
        kind = f"block:{i % variants}" if many else "block"
        blocks.append(Layer(f"b{i}", kind, weights, kv, out, kv_window_tokens=window, state_bytes_per_sequence=state))
    embedding = Layer("embedding", "embedding", r.randint(0, 40), 0, r.choice([8, 4096]))
    head = Layer("head", "head", r.randint(0, 40), 0, r.choice([4, 4, 2048]), tied_to=0 if r.random() < 0.4 else None)
    return ModelProfile("m", (embedding, *blocks, head))


def _workload(r: random.Random) -> Workload:
    chunk = r.choice([None, None, None, 7])
    return Workload(r.randint(1, 40), r.choice([1, 2, 30]), r.randint(1, 6), r.randint(1, 9), prompt_chunk=chunk)


def _pace(r: random.Random) -> tuple[tuple[int, float], ...]:
    """Milliseconds at some batch sizes: constant, rising, rising late, at random up and down, or nothing at all."""
    shape = r.random()
    if shape < 0.05:
        return ((1, 0.0),)
    if shape < 0.3:
        return ((1, r.uniform(0, 9)),)
    if shape < 0.6:
        return ((1, r.uniform(0.1, 9)), (32, r.uniform(9, 60)))
    if shape < 0.7:
        return ((3, r.uniform(0.1, 9)), (4, r.uniform(9, 30)))
    return tuple((n, r.uniform(0, 20)) for n in sorted(r.sample(range(1, 9), r.randint(2, 5))))


def _devices(
    r: random.Random, model: ModelProfile, work: Workload, names: list[str], alike: bool
) -> dict[DeviceId, DeviceProfile]:
    kinds = sorted({layer.kind for layer in model.layers})
    total = sum(
        x.memory_bytes
        + work.sequences
        * (min(work.context, x.kv_window_tokens or work.context) * x.kv_bytes_per_token + x.state_bytes_per_sequence)
        for x in model.layers
    )
    tight = r.random() < 0.5  # together the devices hold little more than the model
    shares = [1.0 if alike else r.uniform(0.3, 1) for _ in names]
    slack = r.uniform(1, 2) / sum(shares)
    devices: dict[DeviceId, DeviceProfile] = {}
    shared: tuple[int, dict[str, tuple[tuple[int, float], ...]]] | None = None
    for name, share in zip(names, shares, strict=True):
        if shared is None or not alike:
            speed = {kind: _pace(r) for kind in kinds}
            if r.random() < 0.05:
                del speed[r.choice(kinds)]  # never measured for it
            loose = r.uniform(0.25, 1.1) if r.random() < 0.8 else 2
            shared = (int(total * (share * slack if tight else loose)), speed)
        devices[name] = DeviceProfile(name, name, *shared)
    return devices


def _links(r: random.Random, names: list[str], alike: bool) -> dict[tuple[DeviceId, DeviceId], LinkProfile]:
    links = {}
    instant = r.random() < 0.15
    same = (0.0 if instant else r.uniform(0, 5), r.choice([1, 100, 1000]))
    for a in names:
        for b in names:
            if a != b and r.random() < 0.93:
                other = (0.0 if instant else r.uniform(0, 20), r.choice([1, 10, 1000, 10**7]))
                links[a, b] = LinkProfile(*(same if alike else other))
    return links


def hub_household(seed: int, heavy: int = 0) -> Instance:
    """Like blocks, short ways over one or two devices, long ones between the others: it pays to visit twice.

    The last `heavy` blocks weigh a half more.
    """
    r = random.Random(f"hub {seed}")
    layers, count = 5 + seed % 4, 3 + seed // 4 % 2
    blocks = (Layer(f"b{i}", "block", 15 if i >= layers - 2 - heavy else 10, 0, 4096) for i in range(layers - 2))
    model = ModelProfile("hub", (Layer("e", "embedding", 1, 0, 4096), *blocks, Layer("h", "head", 5, 0, 4)))
    names = [f"d{i}" for i in range(count)]
    hubs = set(r.sample(names, r.choice([1, 1, 2])))
    alike = r.random() < 0.3
    pace = {name: r.uniform(0.1, 3) if not alike or name in hubs else 1.0 for name in names}
    devices = {}
    for name in names:
        room = 11 + r.randint(0, 3) * 10 + r.choice([0, 5]) if not alike or name in hubs else 30
        speed = {kind: ((1, pace[name]),) for kind in ("embedding", "block", "head")}
        devices[name] = DeviceProfile(name, name, room, speed)
    links = {}
    for a in names:
        for b in names:
            if a != b and r.random() < 0.97:
                near = a in hubs or b in hubs
                ms = r.uniform(0.1, 1) if near and not alike else 0.5 if near else r.choice([3.0, 6.0])
                links[a, b] = LinkProfile(ms, 10_000)
    work = Workload(r.choice([1, 8]), r.choice([1, 20]), 1, 8)
    return Instance(model, devices, links, r.choice(names), work, dict.fromkeys(names, 0), r.random() < 0.1)


def full_household(seed: int, layers: int = 34, count: int = 6) -> Instance:
    """All devices and links different, and together hardly more memory than the model takes."""
    r = random.Random(seed)
    sizes = [(r.randint(300, 900) * 10**6, r.choice([512, 1024]), 8192) for _ in range(2)]
    others = r.choice([0, 0, 3, 8])  # the first few blocks are of another kind
    blocks = (Layer(f"b{i}", f"block:{int(i < others)}", *sizes[i < others]) for i in range(layers - 2))
    ends = r.randint(200, 900) * 10**6
    model = ModelProfile("full", (Layer("e", "embedding", ends, 0, 8192), *blocks, Layer("h", "head", ends, 0, 4)))
    work = Workload(r.choice([32, 128]), r.choice([16, 96]), r.randint(1, 4), 2048)
    needs = [x.memory_bytes + work.sequences * work.context * x.kv_bytes_per_token for x in model.layers]
    shares = [r.uniform(0.5, 2) for _ in range(count)]
    lent = sum(needs) * r.uniform(1.1, 1.5)
    devices = {}
    for i, share in enumerate(shares):
        pace = r.uniform(0.5, 12)
        speed = {k: ((1, pace * r.uniform(0.8, 1.2)), (64, 3 * pace)) for k in sorted({x.kind for x in model.layers})}
        room = max(int(lent * share / sum(shares)), needs[0] + needs[1])  # any of them could be the source
        devices[f"d{i}"] = DeviceProfile(f"d{i}", f"d{i}", room, speed)
    slow = r.choice([1, 5])  # hops that are small beside the computing, and such that are not
    links = {
        (a, b): LinkProfile(r.uniform(0.2, 3) * slow, r.uniform(50, 1000) / slow)
        for a in devices
        for b in devices
        if a != b
    }
    return Instance(model, devices, links, "d0", work, dict.fromkeys(devices, 0), False)
