"""Households to plan for: the paper's testbed, seeded ones of all-different devices, and large ones of a few kinds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import exp, log

from benchmarks.edgeshard_testbed import CLOUD_MBPS, SEQUENCES, SourceKind, scenario
from peerllm.planner.cost.layer_costs import Links, kv_bytes
from peerllm.types import DeviceId, DeviceProfile, Layer, LinkProfile, ModelProfile, Workload

Instance = tuple[ModelProfile, Mapping[DeviceId, DeviceProfile], Links, DeviceId, Workload]

BATCHES = (1, 4, 16, 64, 256)  # tokens at which a household's devices were measured


def model_of(layers: int, block_bytes: int, ends_bytes: int, kv_per_token: int, hidden_bytes: int) -> ModelProfile:
    """Embedding, like blocks, head."""
    blocks = (Layer(f"block {i}", "block", block_bytes, kv_per_token, hidden_bytes) for i in range(1, layers - 1))
    embedding = Layer("embedding", "embedding", ends_bytes, 0, hidden_bytes)
    return ModelProfile(f"{layers} layers", (embedding, *blocks, Layer("head", "head", ends_bytes, 0, 4)))


def testbed(source: SourceKind = "agx", mbps: float = CLOUD_MBPS, sequences: int = SEQUENCES) -> Instance:  # noqa: PT028
    """Llama2-7B on the paper's 15 devices; `mbps` between source and cloud."""
    asked = scenario("Llama2-7B", source=source, mbps=mbps, sequences=sequences)
    return asked.model, asked.devices, asked.links, asked.source, asked.workload


def all_different(layers: int, devices: int, seed: int, sequences: int | None = None) -> Instance:
    """No two devices or links alike; a quarter to two thirds of the household's memory is needed."""
    return kinds(layers, devices, devices, seed, sequences)


def kinds(layers: int, devices: int, kinds: int, seed: int, sequences: int | None = None) -> Instance:
    """Like `all_different`, but devices of one kind are the same in all they are and in all their links."""
    r = random.Random(f"{layers} {devices} {kinds} {seed}")
    drawn = _log_uniform_int(r, 1, 16)
    model = model_of(layers, r.randint(100, 500) * 10**6, r.randint(200, 900) * 10**6, 4096, 8192)
    work = Workload(r.choice([32, 128, 512]), r.choice([64, 128, 256]), sequences or drawn, r.choice([512, 1024, 2048]))
    profiles = [(_speed(r), _log_uniform(r, 1, 8)) for _ in range(kinds)]
    needed = [layer.memory_bytes + kv_bytes(layer, work.sequences, work.context) for layer in model.layers]
    lent = sum(needed) / r.uniform(0.25, 0.66)
    share = lent / sum(profiles[i % kinds][1] for i in range(devices))
    names = [f"d{i:03}" for i in range(devices)]
    source = r.choice(names)
    household = {}
    for i, name in enumerate(names):
        speed, weight = profiles[i % kinds]
        household[name] = DeviceProfile(name, name, max(int(weight * share), needed[0] + needed[1]), speed)
    wires = [[_link(r) for _ in range(kinds)] for _ in range(kinds)]
    links = {(a, b): wires[i % kinds][j % kinds] for i, a in enumerate(names) for j, b in enumerate(names) if a != b}
    return model, household, links, source, work


def _log_uniform(r: random.Random, low: float, high: float) -> float:
    return exp(r.uniform(log(low), log(high)))


def _log_uniform_int(r: random.Random, low: int, high: int) -> int:
    return min(high, int(_log_uniform(r, low, high + 1)))


def _link(r: random.Random) -> LinkProfile:
    return LinkProfile(_log_uniform(r, 0.2, 5), _log_uniform(r, 50, 1000))


def _speed(r: random.Random) -> Mapping[str, tuple[tuple[int, float], ...]]:
    """A block takes 0.5 to 20 ms for one token; each further token adds a share of that."""
    block, more = _log_uniform(r, 0.5, 20), _log_uniform(r, 0.005, 0.2)
    ends = {"embedding": 0.02, "block": 1.0, "head": r.uniform(0.8, 2)}
    return {kind: tuple((n, block * x * (1 + more * (n - 1))) for n in BATCHES) for kind, x in ends.items()}
