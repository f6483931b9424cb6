"""EdgeShard's testbed (arXiv 2405.14371) as scenarios, and what the paper reports of it.

The profile of Llama2-7B is a public reimplementation's; those of 13B and 70B are its, scaled by the bytes of weights
that a layer reads: one token's decode is bound by memory, so its time is proportional to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peerllm.planner.scenario.scenario import Scenario
from peerllm.types import DeviceProfile, Layer, LinkProfile, ModelProfile, Workload

SourceKind = Literal["agx", "nx"]
GIB = 1 << 30
VOCABULARY, FLOAT = 32_000, 4  # tokens; bytes of full precision
PROMPT, OUTPUT = 32, 96  # tokens
SEQUENCES = 8  # the most in flight
LAN_MBPS, CLOUD_MBPS, HOP_MS = 1000.0, 1.0, 2.1
EMBEDDING_MS = 0.1  # the profile has blocks and a whole model; the head takes what is left
CLOUD = "3090"


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a Llama's config its layers' sizes follow from."""

    blocks: int
    hidden: int
    wide: int
    kv_width: int

    @property
    def block_bytes(self) -> int:
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return FLOAT * (attention + 3 * self.hidden * self.wide + 2 * self.hidden)

    @property
    def ends_bytes(self) -> int:
        """Of the embedding, and of the head."""
        return FLOAT * VOCABULARY * self.hidden


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device: milliseconds of Llama2-7B's block and of its 34 layers."""

    block_ms: float
    whole_ms: float
    usable_gib: int
    count: int


@dataclass(frozen=True, slots=True)
class Figure:
    """A published cell. `mark` as in the notes: M remembered, W from public abstracts."""

    ms_per_token: float
    tokens_per_second: float
    mark: str


MODELS = {
    "Llama2-7B": Shape(32, 4096, 11008, 4096),
    "Llama2-13B": Shape(40, 5120, 13824, 5120),
    "Llama2-70B": Shape(80, 8192, 28672, 1024),
}
PROFILED = MODELS["Llama2-7B"]
KINDS = {"agx": Kind(5.25, 174.0, 29, 12), "nx": Kind(6.0, 198.6, 14, 2), CLOUD: Kind(0.79, 26.1, 22, 1)}
STRATEGIES = ("edge-solo", "cloud-edge-even", "cloud-edge-opt", "edgeshard")
PUBLISHED: dict[str, dict[str, Figure | None]] = {
    "Llama2-7B": {
        "edge-solo": Figure(140.34, 24.36, "M"),
        "cloud-edge-even": Figure(227.35, 7.56, "M"),
        "cloud-edge-opt": Figure(140.34, 24.36, "M"),
        "edgeshard": Figure(75.88, 52.45, "W"),
    },
    "Llama2-13B": {
        "edge-solo": None,
        "cloud-edge-even": Figure(319.44, 4.68, "M"),
        "cloud-edge-opt": Figure(243.45, 4.74, "M"),
        "edgeshard": Figure(173.43, 10.45, "M"),
    },
    "Llama2-70B": {
        "edge-solo": None,
        "cloud-edge-even": None,
        "cloud-edge-opt": None,
        "edgeshard": Figure(3086.0, 1.25, "W"),
    },
}  # None: out of memory
PUBLISHED_NO_BUBBLE_GAIN = {"cloud-edge-even": 0.36, "edgeshard": 6.96}  # tokens/s
IMPLIED_SLOPE = (SEQUENCES * 1000 / 24.36 / 140.34 - 1) / (SEQUENCES - 1)  # of edge-solo, if its batch was SEQUENCES


def model_of(name: str) -> ModelProfile:
    """Embedding, blocks, head in full precision."""
    shape = MODELS[name]
    kv, hidden = 2 * FLOAT * shape.kv_width, FLOAT * shape.hidden
    blocks = (Layer(f"block{i}", "block", shape.block_bytes, kv, hidden) for i in range(shape.blocks))
    embedding = Layer("embedding", "embedding", shape.ends_bytes, 0, hidden)
    return ModelProfile(name, (embedding, *blocks, Layer("head", "head", shape.ends_bytes, 0, FLOAT)))


def scenario(
    name: str,
    *,
    source: SourceKind = "agx",
    mbps: float = CLOUD_MBPS,
    sequences: int = SEQUENCES,
    slope: float = 0.0,
) -> Scenario:
    """All 15 devices; `mbps` between source and cloud. Each further sequence of a batch costs `slope` of the first."""
    model, shape = model_of(name), MODELS[name]
    devices: dict[str, DeviceProfile] = {}
    for kind, one in KINDS.items():
        block = one.block_ms * shape.block_bytes / PROFILED.block_bytes
        head = (one.whole_ms - PROFILED.blocks * one.block_ms - EMBEDDING_MS) * shape.ends_bytes / PROFILED.ends_bytes
        speed = {"embedding": ((1, EMBEDDING_MS),), "block": _points(block, slope), "head": _points(head, slope)}
        for i in range(one.count):
            device = kind if one.count == 1 else f"{kind}{i:02}"
            devices[device] = DeviceProfile(device, device, one.usable_gib * GIB, speed)
    start = f"{source}00"
    links = {(a, b): LinkProfile(HOP_MS, LAN_MBPS) for a in devices for b in devices if a != b}
    links[start, CLOUD] = links[CLOUD, start] = LinkProfile(HOP_MS, mbps)
    return Scenario(model, devices, links, start, CLOUD, Workload(PROMPT, OUTPUT, sequences, PROMPT + OUTPUT))


def _points(one_ms: float, slope: float) -> tuple[tuple[int, float], ...]:
    return ((1, one_ms),) if not slope else ((1, one_ms), (SEQUENCES, one_ms * (1 + slope * (SEQUENCES - 1))))
