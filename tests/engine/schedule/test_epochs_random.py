"""Plans that change while sequences run, devices that die and freeze, links that break: every answer stays what it was.

The real source, stages, slots and frames of several engines, over links that deliver when the machine says so, and
layers that add up what they hold: an answer is right only if every layer held just the tokens it should.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peerllm.engine import base
from peerllm.engine.base import Reach, StateForms, StatePart, Tensor
from peerllm.engine.messages import Done, Failed, Hop, LoadStage, Submit, Switch, Tokens
from peerllm.engine.schedule import running_sequence
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import RingCounts
from peerllm.engine.schedule.held_shard import HeldShard, chain_of
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.running_sequence import chunk_length
from peerllm.engine.schedule.source_feed import MOST_PATIENCE_S
from peerllm.engine.state.arriving_state import ArrivingSlot, state_forms
from peerllm.engine.state.state_kinds import LayerState, TokenArray
from peerllm.engine.wire.parcels import from_frame, source_limits, stage_limits
from peerllm.errors import LinkError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.state.test_reuse_random import KINDS, SLACK, WORDS, Adder, sums
from tests.transport.frames_support import encode

EXAMPLES = 1000 if os.environ.get("PEERLLM_FULL") == "1" else 20
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
    def __init__(self, tell: Any) -> None:
        self.schedule: Scheduler[Any] = Scheduler()
        self.counts = RingCounts()
        self.deployment = LocalDeployment(DEPLOYMENT, self.schedule, tell, self.counts)
        self.frozen = False


class World:
    def __init__(self, kind: str, slots: int) -> None:
        self.kind, self.slots = kind, slots
        self.told: list[Any] = []
        self.devices = [Device(self.told.append) for _ in range(DEVICES)]
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
            self.devices[home].deployment.loaded(LoadedStage(spec, chain, _greedy))
        outlets: dict[int, dict[int, Wire]] = {}
        for spec, (home, _) in zip(specs, cut, strict=True):
            if spec.downstream is not None:
                place = spec.stage
                limits = stage_limits(specs[place + 1], 1) if place + 1 < len(cut) else source_limits(specs[0])
                wire = self.wires[self.epoch, place] = Wire(home, cut[(place + 1) % len(cut)][0], limits)
                outlets.setdefault(home, {})[place] = wire
        for home in {home for home, _ in cut}:
            self.devices[home].deployment.linked(self.epoch, outlets.get(home, {}))  # type: ignore[arg-type]

    def deliver(self, key: tuple[int, int]) -> None:
        wire, (epoch, place) = self.wires[key], key
        frame = decode(wire.frames.popleft(), wire.limits)
        self.devices[wire.ends[1]].deployment.arrived(epoch, place + 1, from_frame(frame))

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


class Epochs(RuleBasedStateMachine):
    """Clients ask, go on and hang up, while plans and devices change."""

    @initialize(
        kind=st.sampled_from(["full", "window", "window", "recurrent", "hybrid", "exact end", "never"]),
        slots=st.integers(1, 3),
        cut=st.sampled_from(CUTS),
    )
    def begin(self, kind: str, slots: int, cut: list[tuple[int, int]]) -> None:
        self._patched = pytest.MonkeyPatch()
        self._patched.setattr(base, "ROLLBACK_TOKENS", SLACK)
        self._patched.setattr(running_sequence, "TAIL", 2)
        self._patched.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 2)
        self.world, self.slots = World(kind, slots), slots
        self.world.load(cut)
        self.orders: dict[int, Submit] = {}
        self.before: dict[int, list[int]] = {}  # said before the source's engine was started anew

    @property
    def source(self) -> Any:
        return self.world.devices[0].deployment.feed.sequences

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for device in self.world.devices:
            device.frozen = False
        self.recover([(0, LAYERS - 1)])
        self.world.settle()
        for number in self.orders:
            self.check(number, settled=True)
        assert not self.source._under_way and not self.source._draining and not self.source.running
        assert sum(one.in_use for one in self.world.devices[0].deployment.rings[self.world.epoch].stages.values()) == 0
        self._patched.undo()

    def recover(self, cut: list[tuple[int, int]]) -> None:
        self.world.load(cut)
        self.world.switch(self.world.epoch)
        self.world.settle()
        self.world.devices[0].deployment.feed._old_at -= MOST_PATIENCE_S + 1
        self.world.devices[0].deployment.hurry()
        self.world.settle()
        assert any(isinstance(one, Done) and one.request == self.world.epoch for one in self.world.told)
        self.world.unload(self.world.epoch - 1)

    def said(self, number: int) -> tuple[list[int], Tokens | None]:
        said: list[int] = []
        for event in self.world.told:
            if isinstance(event, Tokens) and event.sequence == number:
                if event.finish == "error" and event.error == "killed":
                    continue
                assert event.start == len(said), (event, said)
                said += event.ids
                if event.finish is not None:
                    return said, event
        return said, None

    def check(self, number: int, settled: bool = False) -> None:
        order = self.orders[number]
        said, end = self.said(number)
        assert said == expected(self.world.kind, order.prompt, len(said))
        assert end is None or end.finish != "error", end
        if settled:
            assert end is not None
            assert end.finish != "length" or len(said) == min(order.max_tokens, CONTEXT - len(order.prompt) + 1)

    @precondition(lambda self: len(self.source.running) < self.slots)
    @rule(
        data=st.data(),
        client=st.sampled_from(["anna", "ben"]),
        new=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=14),
        count=st.integers(1, 9),
    )
    def ask(self, data: st.DataObject, client: str, new: list[int], count: int) -> None:
        prompt = new
        if self.orders and data.draw(st.booleans(), label="goes on"):
            earlier = data.draw(st.sampled_from(sorted(self.orders)), label="with")
            client = self.orders[earlier].client
            before = [*self.orders[earlier].prompt, *self.said(earlier)[0]]
            back = data.draw(st.sampled_from([0, 1, 2, 3, 6, 20]), label="but for")
            prompt = [*before[: max(len(before) - back, 0)], *new]
        if len(prompt) >= CONTEXT:
            return
        number = len(self.orders) + 1
        order = self.orders[number] = Submit(DEPLOYMENT, number, tuple(prompt), count, (), Sampling(), client)
        self.world.devices[0].deployment.submit(order)

    @precondition(lambda self: self.source.running)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        self.world.devices[0].deployment.cancel(data.draw(st.sampled_from(self.source.running)))

    @rule(data=st.data(), count=st.integers(1, 5))
    def deliver(self, data: st.DataObject, count: int) -> None:
        keys = [key for key, wire in self.world.wires.items() if wire.frames]
        keys = [key for key in keys if not self.world.devices[self.world.wires[key].ends[1]].frozen]
        if keys:
            key = data.draw(st.sampled_from(keys))
            for _ in range(min(count, len(self.world.wires[key].frames))):
                if key in self.world.wires and self.world.wires[key].frames:
                    self.world.deliver(key)

    @rule(home=st.integers(0, DEVICES - 1), count=st.integers(1, 5))
    def compute(self, home: int, count: int) -> None:
        for _ in range(0 if self.world.devices[home].frozen else count):
            self.world.compute(home)

    @rule(rounds=st.integers(1, 6))
    def go_on(self, rounds: int) -> None:
        """All for a while."""
        for _ in range(rounds):
            for key in list(self.world.wires):
                wire = self.world.wires[key]
                if wire.frames and not self.world.devices[wire.ends[1]].frozen:
                    self.world.deliver(key)
            for home in range(DEVICES):
                self.compute(home, 1)

    @precondition(lambda self: len(self.world.cuts) < 12 and not any(one.frozen for one in self.world.devices))
    @rule(cut=st.sampled_from(CUTS), waits=st.booleans())
    def change_plan(self, cut: list[tuple[int, int]], waits: bool) -> None:
        self.world.load(cut)
        if not waits:
            self.world.switch(self.world.epoch)

    @precondition(lambda self: len(self.world.cuts) > 1)
    @rule(data=st.data())
    def change_to_any(self, data: st.DataObject) -> None:
        rings = self.world.devices[0].deployment.rings
        self.world.switch(data.draw(st.sampled_from(sorted(rings))))

    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        rings = self.world.devices[0].deployment.rings
        if len(rings) > 1:
            self.world.unload(data.draw(st.sampled_from(sorted(rings)[:-1])))

    @rule(home=st.integers(1, DEVICES - 1))
    def die(self, home: int) -> None:
        self.world.kill(home)

    @precondition(lambda self: len(self.world.cuts) < 12)
    @rule(home=st.integers(1, DEVICES - 1), cut=st.sampled_from(CUTS))
    def die_and_be_replaced(self, home: int, cut: list[tuple[int, int]]) -> None:
        self.world.kill(home)
        for device in self.world.devices:
            device.frozen = False
        self.recover(cut)

    @rule(home=st.integers(1, DEVICES - 1))
    def freeze(self, home: int) -> None:
        self.world.devices[home].frozen = not self.world.devices[home].frozen

    @rule(data=st.data())
    def break_a_link(self, data: st.DataObject) -> None:
        keys = [key for key, wire in self.world.wires.items() if not wire.cut]
        if keys:
            self.world.break_wire(data.draw(st.sampled_from(keys)))

    @precondition(lambda self: len(self.world.cuts) < 12)
    @rule(cut=st.sampled_from(CUTS))
    def the_sources_engine_dies(self, cut: list[tuple[int, int]]) -> None:
        running = self.source.running
        self.world.kill(0)
        self.world.load(cut)
        for number in running:
            answer = tuple(self.said(number)[0])
            self.world.devices[0].deployment.submit(replace(self.orders[number], answer=answer))

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "world"):
            slots = [self.source.slot(number) for number in self.source.running]
            assert len(set(slots)) == len(slots)
            assert not [one for one in self.world.told if isinstance(one, Failed) and one.kind != "LinkError"]
            for number in self.orders:
                self.check(number)


Epochs.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False,
)  # fmt: skip
TestEpochs = Epochs.TestCase
