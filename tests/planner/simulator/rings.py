"""Rings of devices to simulate: by hand, and at random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from peerllm.planner.cost.layer_costs import stages_of
from peerllm.planner.cost.prediction import Lap, lap_of
from peerllm.planner.simulator.run_report import SimulatedRun
from peerllm.planner.simulator.simulation import simulate
from peerllm.types import DeviceProfile, Layer, LinkProfile, Medium, ModelProfile, Stage, Workload

Shape = Literal["once", "head", "visits"]  # each device once; the source holds the head too; any layer anywhere


@dataclass(frozen=True, slots=True)
class Ring:
    model: ModelProfile
    devices: dict[str, DeviceProfile]
    links: dict[tuple[str, str], LinkProfile]
    stages: tuple[Stage, ...]
    media: tuple[Medium, ...] = ()

    @property
    def where(self):
        return self.model, self.devices, self.links, self.stages

    def run(self, work: Workload | None = None, **how) -> SimulatedRun:
        return simulate(*self.where, work or Workload(), media=self.media, **how)

    def lap(self, batch: int = 1) -> Lap:
        return lap_of(*self.where, batch, self.media)


def by_hand(computes, hops, media=(), chain_bytes: int = 0) -> Ring:
    """A stage for each compute time in ms; `hops` are latencies, the last one leads back. Every stage has a block."""
    names = [f"d{place}" for place in range(len(computes))]
    count = len(computes)
    kinds = ["embedding", *("block" for _ in range(count)), "head"]
    layers = tuple(Layer(kind, kind, 0, 0, chain_bytes) for kind in kinds)
    cuts = [0, *range(2, count + 1), len(layers)]
    stages = tuple(Stage(name, cuts[i], cuts[i + 1] - 1) for i, name in enumerate(names))
    devices = {}
    for place, (name, ms) in enumerate(zip(names, computes, strict=True)):
        own = [layers[i].kind for i in range(stages[place].first_layer, stages[place].last_layer + 1)]
        devices[name] = DeviceProfile(name, name, 1, {k: ((1, ms / len(own)),) for k in dict.fromkeys(kinds)})
    links = {}
    for place, latency in enumerate(hops):
        if count > 1:
            links[names[place], names[(place + 1) % count]] = LinkProfile(latency, 8.0)  # 1 byte takes 1/1000 ms
    return Ring(ModelProfile("m", layers), devices, links, stages, tuple(media))


def at_random(seed: int, shape: Shape = "once", shared: bool = False) -> tuple[Ring, int, int]:
    """A ring, a micro-batch and how many of them."""
    r = random.Random(seed)
    count = r.randint(1 if shape == "once" else 2, 6)
    size = r.randint(count + 2, 14)
    names = [f"d{i}" for i in range(count)]
    end = size - (shape == "head")
    edges = [0, *sorted(r.sample(range(2, end), count - 1)), end]
    stages = [Stage(names[i], edges[i], edges[i + 1] - 1) for i in range(count)]
    if shape == "head":
        stages.append(Stage("d0", size - 1, size - 1))
    if shape == "visits":
        stages = list(stages_of(["d0", "d0", *(r.choice(names) for _ in range(size - 2))]))
    blocks = (Layer(f"b{i}", "block", 0, 0, r.choice([512, 4096, 16384])) for i in range(size - 2))
    model = ModelProfile("m", (Layer("e", "embedding", 0, 0, 4096), *blocks, Layer("h", "head", 0, 0, 4)))
    devices = {}
    for name in names:
        ms = r.uniform(0.1, 9)
        block = ((1, ms), (32, ms * r.uniform(1, 4)))
        speed = {"embedding": ((1, r.uniform(0, 1)),), "block": block, "head": ((1, r.uniform(0.1, 15)),)}
        devices[name] = DeviceProfile(name, name, 1, speed)
    links = {
        (a, b): LinkProfile(r.uniform(0, 10), r.choice([1, 10, 100, 1000])) for a in names for b in names if a != b
    }
    air = (Medium("air", frozenset(pair for pair in links if r.random() < 0.7)),) if shared else ()
    return Ring(model, devices, links, tuple(stages), air), r.randint(1, 4), r.randint(1, 10)
