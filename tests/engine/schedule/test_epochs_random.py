"""Plans change while sequences run, devices die and freeze, links break: every answer stays what it was."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peerllm.engine import base
from peerllm.engine.messages import Done, Failed, Submit, Tokens
from peerllm.engine.schedule import running_sequence
from peerllm.engine.schedule.source_feed import MOST_PATIENCE_S
from peerllm.logprobs import unpacked
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT
from tests.engine.schedule.adding_devices import CONTEXT, CUTS, DEVICES, LAYERS, World, expected
from tests.engine.state.test_reuse_random import SLACK, WORDS

EXAMPLES = 1000 if os.environ.get("PEERLLM_FULL") == "1" else 20


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
                asked = self.orders[number].logprobs
                entries = [unpacked(one) for one in event.logprobs]
                assert [one[0][0] for one in entries] == (list(event.ids) if asked is not None else [])
                assert all(len(one) == 1 + (asked or 0) for one in entries)
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
        order = Submit(DEPLOYMENT, number, tuple(prompt), count, (), Sampling(), client)
        order = self.orders[number] = replace(order, logprobs=(None, 0, 2)[number % 3])
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
    max_examples=EXAMPLES, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False,
)  # fmt: skip
TestEpochs = Epochs.TestCase
