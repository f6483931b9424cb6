"""A mask may come at any time, before its sequence is known at the head and long after the logits: nothing changes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from peerllm.engine.base import Tensor
from peerllm.engine.masks.mask_maker import MadeMask
from peerllm.engine.messages import Constraint, Submit, Tokens
from peerllm.engine.sampler import SeededSampler
from peerllm.logprobs import unpacked
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT
from tests.engine.schedule.adding_devices import LAYERS, Layers, World, sums
from tests.engine.state.test_reuse_random import WORDS
from tests.sizes import FULL

PROMPT, COUNT = (1, 2, 3, 1, 0, 2), 8
CUTS = ([(0, 1), (1, 3), (2, 4)], [(0, 2), (3, 4)], [(0, 1), (1, 3), (0, 4)], [(0, 0), (2, 1), (1, 4)], [(0, 4)])


def rule(ids: Sequence[int]) -> set[int]:
    """What an answer may go on with."""
    return {one for one in range(WORDS) if (one + len(ids) + sum(ids)) % 3} or {0}


def expected() -> list[int]:
    said: list[int] = []
    while len(said) < COUNT:
        hidden = [*PROMPT, *said]
        for _ in range(LAYERS):
            hidden = sums(hidden)
        wanted, allowed = hidden[-1] % WORDS, rule(said)
        said.append(wanted if wanted in allowed else min(allowed))
    return said


class Made:
    """In a MaskMaker's place: masks wait until the test hands them over."""

    def __init__(self) -> None:
        self.answers: dict[int, list[int]] = {}
        self.waiting: deque[MadeMask] = deque()
        self.ended: list[int] = []

    def begin(
        self, key: tuple[str, int], constraint: Constraint, vocabulary: int, stops: object, ids: Sequence[int]
    ) -> None:
        assert vocabulary == WORDS
        self.answers[key[1]] = list(ids)
        self._make(key)

    def advance(self, key: tuple[str, int], token: int) -> None:
        self.answers[key[1]].append(token)
        self._make(key)

    def end(self, key: tuple[str, int]) -> None:
        self.ended.append(key[1])

    def _make(self, key: tuple[str, int]) -> None:
        ids = self.answers[key[1]]
        bits = np.packbits([one in rule(ids) for one in range(WORDS)], bitorder="little").tobytes()
        self.waiting.append(MadeMask(*key, len(ids), bits))


class House:
    def __init__(self, cut: list[tuple[int, int]], answer: tuple[int, ...] = ()) -> None:
        self.masks = Made()
        self.world = World("full", 2, self.masks, SeededSampler())
        self.world.load(cut)
        order = Submit(DEPLOYMENT, 1, PROMPT, COUNT, (), Sampling(), "anna", answer, Constraint("", ""), logprobs=1)
        self.world.devices[0].deployment.submit(order)

    def told(self) -> list[Tokens]:
        return [one for one in self.world.told if isinstance(one, Tokens)]

    def said(self) -> list[int]:
        return [token for told in self.told() for token in told.ids]

    def hand_over(self) -> None:
        made = self.masks.waiting.popleft()
        self.world.devices[0].deployment.mask_made(made)

    def backs(self) -> list[int]:
        return [epoch for epoch, wire in self.world.ways_back.items() if wire.frames]

    def settle(self) -> None:
        """All but masks."""
        self.world.settle()

    def masks_arrive(self) -> None:
        while self.masks.waiting or self.backs():
            while self.masks.waiting:
                self.hand_over()
            for epoch in self.backs():
                self.world.deliver_back(epoch)
            self.settle()


def test_nothing_is_drawn_before_its_mask_is_there() -> None:
    house = House(CUTS[0])
    house.settle()
    assert not house.said(), "the logits wait at the head"
    house.hand_over()
    house.settle()
    assert not house.said(), "the mask is on its way"
    house.world.deliver_back(1)
    house.settle()
    assert house.said() == expected()[:1]
    house.masks_arrive()
    assert house.said() == expected() and house.told()[-1].finish == "length"
    assert house.masks.ended == [1]


def test_a_mask_that_comes_twice_draws_once() -> None:
    house = House(CUTS[0])
    house.settle()
    house.hand_over()
    back = house.world.ways_back[1]
    back.frames.append(back.frames[0])
    house.world.deliver_back(1)
    house.world.deliver_back(1)
    house.settle()
    assert house.said() == expected()[:1] and house.world.devices[0].counts.dropped_frames == 0


def test_logits_that_wait_are_the_heads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may write its next output to where the last one was."""
    outputs = list[Tensor]()
    forward = Layers.forward

    def noting(self: Layers, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        outputs.append(forward(self, inputs, runs))
        return outputs[-1]

    monkeypatch.setattr(Layers, "forward", noting)
    house = House(CUTS[0])
    house.settle()
    for output in outputs:
        output[...] = 0
        output[:, 2 % output.shape[1]] = 9
    house.hand_over()
    house.world.deliver_back(1)
    house.settle()
    assert house.said() == expected()[:1] != [0]


def test_a_mask_may_overtake_all_that_it_is_for() -> None:
    """Straight to the head it comes before the OPEN, which goes through the stages between."""
    house = House(CUTS[0])
    assert house.masks.waiting
    for _ in range(3):  # the prompt is fed once its chunks have room
        house.world.compute(0)
    house.hand_over()
    assert house.backs() == [1]
    house.world.deliver_back(1)
    house.settle()
    assert house.said() == expected()[:1]


@pytest.mark.parametrize("moment", ["waiting", "on the way", "at the head"])
def test_a_mask_goes_along_into_another_epoch(moment: str) -> None:
    house = House(CUTS[0])
    house.settle()
    house.hand_over()
    if moment != "waiting":
        house.world.deliver_back(1)
        house.settle()
        house.hand_over()  # of the second token
        if moment == "at the head":
            house.world.devices[1].frozen = True  # its step does not arrive
            house.world.deliver_back(1)
    house.world.devices[1].frozen = False
    house.world.load(CUTS[1])
    house.world.break_wire((1, 1))
    house.world.switch(2)
    house.settle()
    house.masks_arrive()
    assert house.said() == expected()


def test_a_way_back_that_comes_late_gets_what_is_known() -> None:
    house = House(CUTS[0])
    back = house.world.ways_back[1]
    back.cut = True
    house.settle()
    house.hand_over()
    assert not back.frames
    back.cut = False
    house.world.devices[0].deployment.head_linked(1, back)  # type: ignore[arg-type]
    house.masks_arrive()
    assert house.said() == expected()


@pytest.mark.parametrize(("error", "finish"), [("too complex", "error"), ("", "stop")])
def test_an_error_ends_the_answer_and_so_does_a_mask_of_nothing(error: str, finish: str) -> None:
    house = House(CUTS[0])
    house.settle()
    house.world.devices[0].deployment.mask_made(MadeMask(DEPLOYMENT, 1, 0, b"\0", error))
    house.settle()
    (end,) = house.told()
    assert (end.finish, end.error, end.ids) == (finish, error, ())
    assert all(not stage.in_use for one in house.world.devices for ring in one.deployment.rings.values()
               for stage in ring.stages.values())  # fmt: skip


@pytest.mark.parametrize("seed", range(120 if FULL else 30))
def test_in_any_order_and_over_any_moves_the_answer_is_the_same(seed: int) -> None:
    chance = random.Random(seed)
    known = expected()[: chance.choice([0, 0, 3])]
    house = House(chance.choice(CUTS), tuple(known))
    world = house.world
    for _ in range(4000):
        ready = [("wire", key) for key, wire in world.wires.items() if wire.frames]
        ready += [("back", epoch) for epoch in house.backs()]
        ready += [("mask", 0)] if house.masks.waiting else []
        ready += [("compute", home) for home in range(len(world.devices))]
        what, which = chance.choice(ready)
        if chance.random() < 0.01 and world.epoch < 5:
            world.load(chance.choice(CUTS))
            if chance.random() < 0.5 and (places := [key for key in world.wires if key[0] == world.epoch - 1]):
                world.break_wire(chance.choice(places))
            world.switch(world.epoch)
        elif what == "wire":
            world.deliver(which)  # type: ignore[arg-type]
        elif what == "back":
            world.deliver_back(which)  # type: ignore[arg-type]
        elif what == "mask":
            house.hand_over()
        else:
            world.compute(which)  # type: ignore[arg-type]
        if house.told() and house.told()[-1].finish:
            break
    assert [*known, *house.said()] == expected(), house.told()[-1:]
    assert [unpacked(one)[0][0] for told in house.told() for one in told.logprobs] == house.said()
