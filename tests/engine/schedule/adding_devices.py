"""Devices in one process: the real source, stages, slots and frames of several engines, and layers that add up.

Links deliver when they are told to. What a layer computes of a token depends on all tokens that it holds, so an answer
is right only if every layer held just the tokens it should.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peerllm.engine.base import Reach, StateForms, StatePart, Tensor
from peerllm.engine.messages import Hop, LoadStage, Switch
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import RingCounts
from peerllm.engine.schedule.held_shard import HeldShard, chain_of
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.running_sequence import chunk_length
from peerllm.engine.state.arriving_state import ArrivingSlot, state_forms
from peerllm.engine.state.state_kinds import LayerState, TokenArray
from peerllm.engine.wire.parcels import from_frame, head_limits, source_limits, stage_limits
from peerllm.errors import LinkError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.state.test_reuse_random import KINDS, WORDS, Adder, sums
from tests.transport.frames_support import encode

LAYERS, CONTEXT, CHUNK, DEVICES = 5, 40, 4, 4
RECURRENT = ("recurrent", "exact end")
CUTS: list[list[tuple[int, int]]] = []  # (device, last layer) of each stage
for _homes in itertools.product(range(DEVICES), repeat=LAYERS):
    _runs = [(home, len(list(group))) for home, group in itertools.groupby(_homes)]
    if _homes[0] == 0 and len(_runs) <= 4:
        _lasts = itertools.accumulate(length for _, length in _runs)
        CUTS.append([(home, last - 1) for (home, _), last in zip(_runs, _lasts, strict=True)])


def runs_of(prompt: Sequence[int], count: int) -> list[int]:
    """The lengths of the runs in which an undisturbed sequence is computed."""
    lengths, left = [], len(prompt)
    while left:
        lengths.append(chunk_length(left, CHUNK))
        left -= lengths[-1]
    return [*lengths, *[1] * count]


def expected(kind: str, prompt: Sequence[int], count: int) -> list[int]:
    said: list[int] = []
    while len(said) < count:
        hidden = [*prompt, *said]
        if kind == "never":
            at = 0
            for length in runs_of(prompt, len(said)):
                hidden[at] += length
                at += length
        for _ in range(LAYERS):
            hidden = sums(hidden)
        said.append(hidden[-1] % WORDS)
    return said


class Layers:
    """Layers first..last, each an Adder; of kind "never", what is computed depends on how tokens came together."""

    hidden_size, vocabulary, kv_bytes, form = 1, WORDS, 1, "adders"

    def __init__(self, kind: str, slots: int, first: int, last: int) -> None:
        self.reach: Reach | None = KINDS[kind]
        self.weights = {id(self): 1}
        self._marks = kind == "never" and first == 0
        self._layers = [Adder(kind, slots, head=layer == LAYERS - 1) for layer in range(first, last + 1)]
        self._kind, self._by_number = kind, dict(zip(range(first, last + 1), self._layers, strict=True))
        self._arriving: dict[int, ArrivingSlot] = {}
        self.closed = False

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        assert not self.closed
        if self._marks:
            inputs, start = inputs.copy(), 0
            for run in runs:
                inputs[start] += run.length
                start += run.length
        for layer in self._layers:
            inputs = layer.forward(inputs, runs)
        return inputs

    def release(self, slot: int) -> None:
        self._arriving.pop(slot, None)
        for layer in self._layers:
            layer.release(slot)

    # What a layer keeps goes to another shard as it would from a real one; windows do not.

    @property
    def _states(self) -> dict[int, LayerState]:
        if self._kind in RECURRENT:
            return {number: layer._slots.states[0] for number, layer in self._by_number.items()}
        inputs = LayerState((TokenArray("inputs", 1, 1, "float32"),))
        return dict.fromkeys(self._by_number, inputs) if self._kind in ("full", "never") else {}

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        return state_forms(self._states, [range(first_layer, last_layer + 1)])

    def held(self, slot: int, block: int) -> range:
        layer = self._by_number[block]
        return layer._slots.held(slot, 0) if self._kind in RECURRENT else range(len(layer._held[slot]))

    def steady(self, slot: int) -> int:
        layer = next(iter(self._by_number.values()))
        return layer._slots.steady(slot) if self._kind in RECURRENT else len(layer._held[slot])

    def export_part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        layer = self._by_number[block]
        if self._kind in RECURRENT:
            return replace(layer._slots.part(slot, 0, start, stop), block=block)
        return StatePart(block, start, {"inputs": np.array(layer._held[slot][start:stop], np.float32)[:, None]})

    def export_fixed(self, slot: int, block: int, position: int) -> StatePart:
        return replace(self._by_number[block]._slots.fixed_part(slot, 0, position), block=block)

    def import_part(self, slot: int, part: StatePart) -> None:
        layer = self._by_number[part.block]
        where = self._arriving.setdefault(slot, ArrivingSlot(self._states, CONTEXT)).place(part)
        if self._kind in RECURRENT:
            layer._slots.add(slot, replace(part, block=0))
        elif where is not None:
            layer._held[slot][where[1] :] = part.rows["inputs"][:, 0].astype(int).tolist()

    def settle(self, slot: int) -> tuple[int, int]:
        tokens, furthest, _ = self._arriving.pop(slot).settle()
        if not tokens:
            self.release(slot)
        for layer in self._layers if tokens else ():
            if self._kind in RECURRENT:
                assert layer._slots.settle(slot)[0] == tokens
            else:
                del layer._held[slot][tokens:]
        return tokens, furthest

    def close(self) -> None:
        self.closed = True


class Wire:
    """A link whose frames wait until somebody delivers them."""

    def __init__(self, sender: int, receiver: int, limits: Any) -> None:
        self.ends, self.limits = (sender, receiver), limits
        self.device = str(receiver) * 64
        self.frames: deque[bytes] = deque()
        self.cut = False

    def send(self, frame: Frame) -> None:
        if self.cut:
            raise LinkError("cut")
        self.frames.append(encode(frame))


class Device:
    def __init__(self, tell: Any, masks: Any = None) -> None:
        self.schedule: Scheduler[Any] = Scheduler()
        self.counts = RingCounts()
        self.deployment = LocalDeployment(DEPLOYMENT, self.schedule, tell, self.counts, masks)
        self.frozen = False


class World:
    def __init__(self, kind: str, slots: int, masks: Any = None, sampler: Any = None) -> None:
        """`masks` are made at the first device, its `sampler` minds them."""
        self.kind, self.slots, self.sampler = kind, slots, sampler or _greedy
        self.told: list[Any] = []
        self.devices = [Device(self.told.append, None if number else masks) for number in range(DEVICES)]
        self.ways_back: dict[int, Wire] = {}  # by epoch, from the source to a head elsewhere
        self.wires: dict[tuple[int, int], Wire] = {}  # by epoch and the stage that sends
        self.epoch = 0
        self.cuts: dict[int, list[tuple[int, int]]] = {}
        self.loads = 0

    def load(self, cut: list[tuple[int, int]]) -> None:
        """The plan as a new epoch, loaded and linked."""
        self.epoch += 1
        self.cuts[self.epoch] = cut
        first, specs = 0, list[LoadStage]()
        for place, (home, last) in enumerate(cut):
            after = cut[(place + 1) % len(cut)][0]
            hop = None if after == home else Hop(str(after) * 64, (), 1, place + 1)
            specs.append(stage(
                1, epoch=self.epoch, stage=place, stages=len(cut), first_layer=first, last_layer=last,
                slots=self.slots, context=CONTEXT, chunk=CHUNK, downstream=hop,
            ))  # fmt: skip
            first = last + 1
        for spec, (home, _) in zip(specs, cut, strict=True):
            chain, missing = chain_of(self.devices[home].deployment.shards, spec)
            for begin, end in missing:
                self.loads += 1
                part = replace(spec, first_layer=begin, last_layer=end)
                chain.append(HeldShard.of(part, Layers(self.kind, self.slots, begin, end)))  # type: ignore[arg-type]
            chain.sort(key=lambda one: one.first_layer)
            self.devices[home].deployment.loaded(LoadedStage(spec, chain, self.sampler))
        outlets: dict[int, dict[int, Wire]] = {}
        for spec, (home, _) in zip(specs, cut, strict=True):
            if spec.downstream is not None:
                place = spec.stage
                limits = stage_limits(specs[place + 1], 1) if place + 1 < len(cut) else source_limits(specs[0], 1)
                wire = self.wires[self.epoch, place] = Wire(home, cut[(place + 1) % len(cut)][0], limits)
                outlets.setdefault(home, {})[place] = wire
        if cut[-1][0] != cut[0][0]:
            back = self.ways_back[self.epoch] = Wire(cut[0][0], cut[-1][0], head_limits(specs[-1]))
            self.devices[cut[0][0]].deployment.head_linked(self.epoch, back)  # type: ignore[arg-type]
        for home in {home for home, _ in cut}:
            self.devices[home].deployment.linked(self.epoch, outlets.get(home, {}))  # type: ignore[arg-type]

    def deliver(self, key: tuple[int, int]) -> None:
        wire, (epoch, place) = self.wires[key], key
        frame = decode(wire.frames.popleft(), wire.limits)
        self.devices[wire.ends[1]].deployment.arrived(epoch, place + 1, from_frame(frame))

    def deliver_back(self, epoch: int) -> None:
        wire = self.ways_back[epoch]
        frame = decode(wire.frames.popleft(), wire.limits)
        self.devices[wire.ends[1]].deployment.arrived(epoch, frame.stage, from_frame(frame))

    def compute(self, home: int) -> bool:
        device = self.devices[home]
        batch = device.schedule.next()
        if batch is None:
            return False
        (_, epoch, index), taken = batch
        ring = device.deployment.rings[epoch]
        ring.computed(index, *ring.stages[index].compute(taken))
        return True

    def break_wire(self, key: tuple[int, int]) -> None:
        wire, (epoch, place) = self.wires[key], key
        wire.cut = True
        wire.frames.clear()
        for home, ingress in ((wire.ends[0], None), (wire.ends[1], place + 1)):
            ring = self.devices[home].deployment.rings.get(epoch)
            if ring is not None:
                ring.lost("d" * 64, ingress, "cut")

    def kill(self, home: int) -> None:
        """The device's engine has lost all that it had, and another begins."""
        self.devices[home] = Device(self.told.append)
        for key, wire in list(self.wires.items()):
            if home in wire.ends and not wire.cut:
                self.break_wire(key)

    def switch(self, epoch: int) -> None:
        self.devices[0].deployment.switch(Switch(epoch, DEPLOYMENT, epoch))

    def unload(self, epoch: int) -> None:
        for key in [key for key in self.wires if key[0] <= epoch]:
            del self.wires[key]
        for device in self.devices:
            rings = device.deployment.rings
            if rings and max(rings) <= epoch:
                device.deployment.close("unloaded")
                device.deployment = LocalDeployment(DEPLOYMENT, device.schedule, self.told.append, device.counts)
            elif rings:
                device.deployment.unload(epoch)

    def settle(self) -> None:
        while True:
            moved = False
            for key in list(self.wires):
                wire = self.wires[key]
                while wire.frames and not self.devices[wire.ends[1]].frozen:
                    self.deliver(key)
                    moved = True
            for home, device in enumerate(self.devices):
                while not device.frozen and self.compute(home):
                    moved = True
            if not moved:
                return


def _greedy(logits: Tensor, draws: Any) -> list[int]:
    return logits.argmax(1).tolist()
