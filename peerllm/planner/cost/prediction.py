"""What a whole plan is predicted to take: time to first token, step, request, and tokens per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import Links, hop_ms, layer_ms, pass_ms
from peerllm.types import DeviceId, DeviceProfile, Medium, ModelProfile, Prediction, Stage, Workload


def predict_latency(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    workload: Workload,
) -> Prediction:
    """The latency figures of a plan. InfeasibleError if it uses a missing link or an unmeasured device."""
    first = pass_ms(model, devices, links, stages, workload.pieces)
    lap = lap_of(model, devices, links, stages, 1)
    if inf in (first, lap.ring_ms):
        raise InfeasibleError("the plan crosses a link that is not there, or a device that was never measured")
    request = first + (workload.output_tokens - 1) * lap.ring_ms
    return Prediction(
        time_to_first_token_ms=first,
        step_ms=lap.ring_ms,
        request_ms=request,
        tokens_per_second=1000 * workload.output_tokens / request if request else 0.0,
        bottleneck=lap.bottleneck,
    )


@dataclass(frozen=True, slots=True)
class Lap:
    """One lap of a batch of one-token sequences around the ring of stages."""

    batch: int
    ring_ms: float  # all computes and hops, one after another
    bottleneck_ms: float  # the busiest device, hop or shared medium
    bottleneck: str  # its name; a hop is "a to b"

    def rate(self, micro_batches: int) -> float:
        """Tokens per millisecond without bubbles: b·min(1/T_bottleneck, m/T_ring), as in EdgeShard."""
        slowest = max(self.bottleneck_ms, self.ring_ms / micro_batches)
        return self.batch / slowest if slowest > 0 else inf

    def fewest_micro_batches(self, sequences: int) -> int:
        """The fewest micro-batches that reach the best rate of at most `sequences` sequences."""
        most = max(1, sequences // self.batch)
        return next((m for m in range(1, most) if self.ring_ms <= m * self.bottleneck_ms), most)


def lap_of(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    batch: int,
    media: Sequence[Medium] = (),
) -> Lap:
    """The cost of one lap of `batch` sequences; infinite where a link is missing."""
    # Keys are ids of a device or of a hop's two devices, since several devices may have one name.
    busy: dict[tuple[DeviceId, ...], float] = {}
    air = dict.fromkeys((medium.name for medium in media), 0.0)
    ring = 0.0
    for place, stage in enumerate(stages):
        device = devices[stage.device]
        held = model.layers[stage.first_layer : stage.last_layer + 1]
        compute = sum(layer_ms(device, layer, batch) for layer in held)
        busy[stage.device,] = busy.get((stage.device,), 0.0) + compute
        after = stages[(place + 1) % len(stages)].device
        nbytes = batch * model.layers[stage.last_layer].output_bytes_per_token
        hop = hop_ms(links, stage.device, after, nbytes)
        if after != stage.device:
            busy[stage.device, after] = busy.get((stage.device, after), 0.0) + hop
            for medium in media:
                if (stage.device, after) in medium.links and (link := links.get((stage.device, after))) is not None:
                    air[medium.name] += nbytes * 8 / (link.mbps * 1000)
        ring += compute + hop
    slowest = max(busy, key=lambda ids: busy[ids])
    medium_name = max(air, key=lambda name: air[name], default="")
    if air and air[medium_name] > busy[slowest]:
        return Lap(batch, ring, air[medium_name], f"medium {medium_name}")
    return Lap(batch, ring, busy[slowest], " to ".join(devices[one].name for one in slowest))


def best_lap(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    workload: Workload,
    media: Sequence[Medium] = (),
) -> Lap:
    """The lap of the batch size with which these stages serve the most tokens; of equals, the smallest batch."""
    laps = (lap_of(model, devices, links, stages, b, media) for b in range(1, workload.sequences + 1))
    return max(laps, key=lambda lap: lap.rate(workload.sequences // lap.batch))


def predict_throughput(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    workload: Workload,
    lap: Lap | None = None,
    media: Sequence[Medium] = (),
) -> Prediction:
    """The throughput figures of a plan (EdgeShard's eq. 9-13, with batches); without `lap`, of its best batch."""
    lap = lap or best_lap(model, devices, links, stages, workload, media)
    first = pass_ms(model, devices, links, stages, workload.pieces)
    if inf in (first, lap.ring_ms):
        raise InfeasibleError("the plan crosses a link that is not there, or a device that was never measured")
    groups = lap.fewest_micro_batches(workload.sequences)
    return Prediction(
        time_to_first_token_ms=first,
        step_ms=lap.ring_ms,
        request_ms=first + (workload.output_tokens - 1) * lap.ring_ms,
        tokens_per_second=1000 * lap.rate(groups),
        micro_batch=lap.batch,
        micro_batches=groups,
        bottleneck=lap.bottleneck,
    )
