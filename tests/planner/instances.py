"""Random households and models for the planner's tests: tight memory, asymmetric and missing links, equal devices."""

from __future__ import annotations

import random

from peerllm.types import DeviceProfile, Layer, LinkProfile, ModelProfile, Workload


def instance(seed: int, layers: int, count: int):
    r = random.Random(seed)
    variants = r.choice([1, 1, 2, layers])

    def size():
        return r.randint(1, 40), r.choice([0, 0, 1, 2]), r.choice([8, 512, 4096]), r.choice([None, 4])

    def pace():
        return ((1, r.uniform(0.1, 9)), (32, r.uniform(9, 60))) if r.random() < 0.7 else ((1, r.uniform(0, 9)),)

    sizes = [size() for _ in range(variants)]
    blocks = []
    for i in range(layers - 2):
        weights, kv, out, window = sizes[i % variants]
        kind = f"block:{i % variants}" if variants < layers else "block"
        blocks.append(Layer(f"b{i}", kind, weights, kv, out, kv_window_tokens=window))
    tied = r.random() < 0.4
    model = ModelProfile(
        "m",
        (
            Layer("embedding", "embedding", r.randint(0, 40), 0, 4096),
            *blocks,
            Layer("head", "head", r.randint(0, 40), 0, 4, tied_to=0 if tied else None),
        ),
    )
    work = Workload(r.randint(1, 40), r.choice([1, 2, 30]), r.randint(1, 2), r.randint(1, 9))
    kinds = {layer.kind for layer in model.layers}
    total = sum(x.memory_bytes + work.sequences * work.context * x.kv_bytes_per_token for x in model.layers)
    names = [f"d{i}" for i in range(count)]
    alike = r.random() < 0.3
    devices, shared = {}, None
    for name in names:
        if shared is None or not alike:
            speed = {kind: pace() for kind in sorted(kinds)}
            memory = int(total * r.uniform(0.15, 1.1)) if r.random() < 0.8 else total * 2
            shared = (memory, speed)
        devices[name] = DeviceProfile(name, name, *shared)
    links = {}
    same = (r.uniform(0, 5), r.choice([1, 100, 1000]))
    for a in names:
        for b in names:
            if a != b and r.random() < 0.93:
                latency, mbps = same if alike else (r.uniform(0, 20), r.choice([1, 10, 1000]))
                links[a, b] = LinkProfile(latency, mbps)
    return model, devices, links, r.choice(names), work, r.choice([0, 0, 5]), r.random() < 0.2
