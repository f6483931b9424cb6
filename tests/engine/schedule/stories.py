"""A household whose frames a test delivers one by one."""

from __future__ import annotations

from collections.abc import Sequence

from peerllm.engine.messages import CarryState, Hop, Submit, Tokens
from peerllm.engine.schedule.source_feed import MOST_PATIENCE_S
from peerllm.engine.schedule.state_export import StateExport
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT
from tests.engine.schedule.adding_devices import World, expected

Wires = Sequence[tuple[int, int]]  # each by its epoch and the stage that sends
CUT = [(0, 1), (1, 3), (0, 4)]  # (device, last layer): the second device holds layers 2 and 3
ELSEWHERE = [(0, 1), (2, 3), (0, 4)]
GREEDY = Sampling()
PROMPT = [1, 2, 3, 1, 0, 2, 2, 3, 1, 1]


class Story:
    """One household in its first epoch."""

    def __init__(self, kind: str = "full", cut: list[tuple[int, int]] = CUT) -> None:
        self.world = World(kind, 2)
        self.world.load(cut)

    def asks(self, number: int, prompt: Sequence[int] = PROMPT, count: int = 8, sampling: Sampling = GREEDY) -> None:
        order = Submit(DEPLOYMENT, number, tuple(prompt), count, (), sampling, "anna")
        self.world.devices[0].deployment.submit(order)

    def told(self, number: int) -> list[Tokens]:
        return [one for one in self.world.told if isinstance(one, Tokens) and one.sequence == number]

    def said(self, number: int) -> list[int]:
        return [token for told in self.told(number) for token in told.ids]

    def all_but(self, held: Wires = (), until: int = 99, number: int = 1) -> None:
        """Everything goes on, but for frames on `held` wires, until the sequence has said so many tokens."""
        moved = True
        while moved and len(self.said(number)) < until:
            moved = False
            for key, wire in self.world.wires.items():
                if wire.frames and key not in held:
                    self.world.deliver(key)
                    moved = True
            moved = any([self.world.compute(home) for home in range(len(self.world.devices))]) or moved

    def frames(self, wire: tuple[int, int]) -> int:
        return len(self.world.wires[wire].frames)

    def plan(self, cut: list[tuple[int, int]]) -> None:
        """Another epoch, loaded beside the others, in which sequences are fed from now on."""
        self.world.load(cut)
        self.world.switch(self.world.epoch)

    def carries(self, home: int, to: int, layer: int, stage: int) -> None:
        """What a device keeps in a layer goes to a stage of the last epoch."""
        epoch, there = self.world.epoch, Hop(str(to) * 64, (), 1, stage)
        export = StateExport(CarryState(1, DEPLOYMENT, epoch - 1, layer, layer, epoch, there))
        while parts := export.turn(self.world.devices[home].deployment):
            for carried in parts:
                self.world.devices[to].deployment.state_came(epoch, stage, carried)

    def waits_long(self) -> None:
        """What has not come back from the epoch that is left is given up."""
        self.world.devices[0].deployment.feed._old_at -= MOST_PATIENCE_S + 1
        self.world.devices[0].deployment.hurry()

    def dropped(self, home: int) -> int:
        return self.world.devices[home].counts.dropped_frames

    def replayed(self) -> int:
        return sum(device.counts.replayed_tokens for device in self.world.devices)

    def is_over(self, number: int, prompt: Sequence[int] = PROMPT, count: int = 8) -> None:
        """With the tokens that an undisturbed sequence says."""
        assert self.said(number) == expected(self.world.kind, prompt, count)
        assert self.told(number)[-1].finish == "length"
