"""The value of a plan over a horizon, less the cost of moving to it: what re-planning maximises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, stage_bytes, stages_of
from peerllm.planner.cost.prediction import predict_latency, predict_throughput
from peerllm.planner.replan.migration import Migration, Placement, RunningState
from peerllm.types import Medium, Plan, Prediction, Stage

SAME = 1e-10  # relative; values closer than this count as equal


@dataclass(frozen=True, slots=True)
class ReplanHorizon:
    """How long the next plan is expected to be used, and how many requests come in that time."""

    ms: float
    requests: float

    def __post_init__(self) -> None:
        if not (0 < self.ms < inf and 0 < self.requests < inf):
            raise ValueError(f"a horizon has some time and some requests: {self}")


@dataclass(frozen=True, slots=True)
class ReplanChoice:
    """The best plan found; the running one may be it. `net_value` has the cost of moving deducted."""

    plan: Plan
    net_value: float
    bound: float


@dataclass(frozen=True, slots=True)
class ReplanProblem:
    """What both objectives choose from."""

    state: RunningState
    horizon: ReplanHorizon
    head_on_source: bool
    media: tuple[Medium, ...] = ()
    running: Prediction | None = field(init=False)  # of the running plan; None if it does not serve

    def __post_init__(self) -> None:
        running = self.predict(stages_of(self.state.placement)) if self.state.serving else None
        object.__setattr__(self, "running", running)

    @property
    def latency(self) -> bool:
        return self.state.workload.objective == "latency"

    def predict(self, stages: Sequence[Stage]) -> Prediction:
        s = self.state
        if self.latency:
            return predict_latency(s.model, s.devices, s.links, stages, s.workload)
        return predict_throughput(s.model, s.devices, s.links, stages, s.workload, media=self.media)

    def allowed(self, placement: Placement) -> bool:
        """Whether the placement keeps every memory limit and leaves the private layers on the source."""
        s = self.state
        used = dict.fromkeys(placement, 0)
        stages = stages_of(placement)
        for stage, nbytes in zip(stages, stage_bytes(s.model, stages, s.workload), strict=True):
            used[stage.device] += nbytes
        pinned = placement[:SOURCE_LAYERS] + (placement[-1:] if self.head_on_source else ())
        room = {device: s.devices[device].memory_bytes - s.working.get(device, 0) for device in used}
        return set(pinned) == {s.source} and all(used[device] <= room[device] for device in used)

    @property
    def busy(self) -> float:
        """The share of the horizon in which a request is being served."""
        before = self.running
        return 1.0 if before is None else min(1.0, self.horizon.requests * before.request_ms / self.horizon.ms)

    def staying(self) -> float:
        """The value of the running plan over the horizon: minus milliseconds, or tokens."""
        before = self.running
        if self.latency:
            return -inf if before is None else -self.horizon.requests * before.request_ms
        return 0.0 if before is None else before.tokens_per_second / 1000 * self.horizon.ms

    def net_value(self, predicted: Prediction, migration: Migration) -> float:
        """The value of another plan over the horizon, less the cost of moving to it."""
        if self.latency:
            return (
                -self.horizon.requests * predicted.request_ms - self.busy * migration.background_ms - migration.pause_ms
            )
        before = self.running
        old = 0.0 if before is None else before.tokens_per_second
        left = self.horizon.ms - migration.background_ms
        until = old * min(migration.background_ms, self.horizon.ms)
        return (until + predicted.tokens_per_second * max(0.0, left - migration.pause_ms)) / 1000
