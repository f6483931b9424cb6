"""A pipeline in virtual time: every device's real deployment, Scheduler and stages; shards and links that only last.

No clock, no threads: a device computes one batch at a time, a link carries one frame at a time, everything else takes
no time. One run differs from another by its numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from peerllm.engine.base import Draw, Tensor
from peerllm.engine.messages import Cancel, FromEngine, Submit, Tokens
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import StageKey
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.wire.parcels import TokenBatch, from_frame
from peerllm.planner.cost.prediction import Lap
from peerllm.planner.simulator.event_queue import DECIDES, EventQueue, Resource
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling, ScheduleName
from tests.engine.fakes import DEPLOYMENT, stage

TOKEN = 7  # the only one that the head ever draws


@dataclass(frozen=True, slots=True)
class Ring:
    """Stage i takes base + each · sequences for a step and `per_token` a token of a prompt; so does the hop after it.

    `homes` says which device holds which stage; a hop within a device takes no time.
    """

    homes: tuple[int, ...]
    stages: tuple[tuple[float, float], ...]
    hops: tuple[tuple[float, float], ...]
    per_token: float = 0.05

    def compute_ms(self, index: int, size: int) -> float:
        base, each = self.stages[index]
        return base + each * size

    def hop_ms(self, index: int, size: int) -> float:
        base, each = self.hops[index]
        return 0.0 if self.next_home(index) == self.homes[index] else base + each * size

    def next_home(self, index: int) -> int:
        return self.homes[(index + 1) % len(self.homes)]

    def lap(self, size: int) -> Lap:
        """By the planner's formula."""
        every = range(len(self.homes))
        computes = [self.compute_ms(index, size) for index in every]
        hops = [self.hop_ms(index, size) for index in every]
        devices = (sum(t for t, home in zip(computes, self.homes, strict=True) if home == d) for d in set(self.homes))
        return Lap(size, sum(computes) + sum(hops), max(*devices, *hops), "")


class _Shard:
    reach = None  # no slot is taken up again
    hidden_size, vocabulary, kv_bytes = 1, TOKEN + 1, 0

    def __init__(self, head: bool) -> None:
        self._head = head

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        rows = sum(one.sample for one in runs) if self._head else sum(one.length for one in runs)
        return np.zeros((rows, 1), np.float32)

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    return [TOKEN] * len(draws)


class _Device:
    """The compute thread: `_handle` and `_compute` of engine/process/compute.py with another clock."""

    def __init__(self, number: int, world: World) -> None:
        self.schedule: Scheduler[StageKey] = Scheduler()
        self._number, self._world, self._busy = number, world, False
        ring, limits = world.ring, world.limits
        mine = [index for index, home in enumerate(ring.homes) if home == number]
        specs = [
            stage(
                0, stage=index, stages=len(ring.homes), downstream=None if ring.next_home(index) == number else "away",
                upstream=None, **limits,
            )
            for index in mine
        ]  # fmt: skip
        self.deployment = LocalDeployment(DEPLOYMENT, self.schedule, world.hear)
        for spec in specs:
            self.deployment.loaded(
                LoadedStage(spec, [HeldShard.of(spec, _Shard(spec.stage == len(ring.homes) - 1))], _draw)
            )  # type: ignore[arg-type]
        self.deployment.linked(1, {index: _Hop(index, world) for index in mine if ring.next_home(index) != number})

    def kick(self) -> None:
        self._world.agenda.after(0.0, self._begin, DECIDES)

    def _begin(self) -> None:
        batch = None if self._busy else self.schedule.next()
        if batch is None:
            return
        (_, _, index), taken = batch
        self._busy = True
        if all(run.length == 1 for run in taken.runs):
            self._world.steps.append((index, [run.sequence for run in taken.runs]))
        self._world.agenda.after(self._world.takes(index, taken.runs), partial(self._end, index, taken))

    def _end(self, index: int, batch: TokenBatch) -> None:
        self._busy = False
        self.deployment.rings[1].computed(index, *self.deployment.rings[1].stages[index].compute(batch))
        self.kick()


class _Hop:
    """The link after a stage."""

    device = "away"

    def __init__(self, index: int, world: World) -> None:
        self._index, self._world, self._link = index, world, Resource(world.agenda)

    def send(self, frame: Frame) -> None:
        carried = len(frame.runs) if frame.kind in (FrameKind.ACTIVATION, FrameKind.TOKEN) else 0
        took = self._world.ring.hop_ms(self._index, carried) if carried else 0.0
        self._link.ask(lambda: self._world.agenda.after(took, partial(self._arrive, frame)))

    def _arrive(self, frame: Frame) -> None:
        self._link.free()
        device = self._world.devices[self._world.ring.next_home(self._index)]
        device.deployment.arrived(1, frame.stage, from_frame(frame))
        device.kick()


@dataclass
class World:
    """`submit` and `cancel` at the present; `until` lets time pass."""

    ring: Ring
    slots: int
    micro_batch: int
    micro_batches: int
    schedule: ScheduleName = "no-bubble"
    agenda: EventQueue = field(default_factory=EventQueue)
    tokens: dict[int, list[float]] = field(default_factory=dict)  # by sequence, when each of its tokens was there
    ends: dict[int, Tokens] = field(default_factory=dict)
    steps: list[tuple[int, list[int]]] = field(default_factory=list)  # batches computed: (stage, sequences)
    ended: Callable[[int], None] = lambda sequence: None

    def __post_init__(self) -> None:
        self.limits = {
            "slots": self.slots, "micro_batch": self.micro_batch, "micro_batches": self.micro_batches,
            "schedule": self.schedule, "chunk": 16,
        }  # fmt: skip
        self.devices = [_Device(number, self) for number in range(max(self.ring.homes) + 1)]
        self._source = self.devices[0]

    def submit(self, sequence: int, prompt: int = 4, answer: int = 60) -> None:
        self.tokens[sequence] = []
        self._source.deployment.submit(Submit(DEPLOYMENT, sequence, (1,) * prompt, answer, (), Sampling()))
        self._source.kick()

    def submit_at(self, at_ms: float, sequence: int, prompt: int = 4, answer: int = 60) -> None:
        self.agenda.after(at_ms - self.agenda.now, partial(self.submit, sequence, prompt, answer))

    def cancel(self, sequence: int) -> None:
        self._source.deployment.cancel(Cancel(DEPLOYMENT, sequence).sequence)
        self._source.kick()

    def run(self) -> None:
        self.agenda.run()

    def hear(self, event: FromEngine) -> None:
        assert isinstance(event, Tokens), event
        self.tokens[event.sequence] += [self.agenda.now] * len(event.ids)
        if event.finish is not None:
            assert event.finish != "error", event
            self.ends[event.sequence] = event
            self.agenda.after(0.0, partial(self.ended, event.sequence))

    def takes(self, index: int, runs: Sequence[TokenRun]) -> float:
        if all(run.length == 1 for run in runs):
            return self.ring.compute_ms(index, len(runs))
        return self.ring.per_token * sum(run.length for run in runs)

    def rate(self, skip: int = 0, of: Sequence[int] | None = None) -> float:
        """Tokens a millisecond: the sum of each sequence's rate while all decode, each past its first `skip` tokens."""
        times = [self.tokens[sequence] for sequence in of or self.tokens]
        start, end = max(one[skip] for one in times), min(one[-1] for one in times)
        total = 0.0
        for one in times:
            within = [at for at in one if start <= at <= end]
            total += (len(within) - 1) / (within[-1] - within[0])
        return total

    def batches(self, index: int = 0) -> list[list[int]]:
        """Of steps, that a stage computed."""
        return [batch for stage, batch in self.steps if stage == index]
