"""What devices tell of their stages reaches the search for a better plan."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from peerllm.daemon.control_messages import Answer, Pace
from peerllm.daemon.deployment.planning import conditions_reader
from peerllm.daemon.deployment.planning.conditions_watch import AGREEING, FIRST
from peerllm.types import DeviceProfile, Layer, ModelProfile, Plan, Prediction, Stage
from tests.daemon.deployment.planning.test_conditions_watch import A, B, paces

WAIT_S = 5.0


class Around:
    """Devices whose stages take what `looks` say, the last of them for ever."""

    def __init__(self, looks):
        self.looks, self.asked = list(looks), 0
        self.over = asyncio.Event()

    def name(self, device):
        return {A: "laptop", B: "jetson"}[device]

    def candidates(self):
        return {}

    async def ask(self, device, question, timeout_s):
        assert isinstance(question, Pace)
        told = self.looks[min(self.asked // 2, len(self.looks) - 1)]
        self.asked += 1
        if self.asked // 2 > len(self.looks):
            self.over.set()
        places = (0, 2) if device == A else (1,)
        return Answer(1, stage_ms={str(place): told[place] for place in places})


async def told(monkeypatch, looks):
    """(device, times) and the sentences that are told of these looks."""
    monkeypatch.setattr(conditions_reader, "EVERY_S", 0)
    plan = Plan((Stage(A, 0, 2), Stage(B, 3, 5), Stage(A, 6, 6)), Prediction(1, 1, 1, 1))
    layers = (
        Layer("embedding", "embedding", 1, 0, 8),
        *(Layer("block", "block", 1, 1, 8) for _ in range(5)),
        Layer("head", "head", 1, 0, 4),
    )
    times = {"embedding": ((1, 0.0),), "block": ((1, 5.0), (2, 8.0)), "head": ((1, 1.0), (2, 1.2))}
    scenario = SimpleNamespace(
        model=ModelProfile("m", layers), devices={name: DeviceProfile(name, name, 99, times) for name in (A, B)}
    )
    epoch = SimpleNamespace(blueprint=SimpleNamespace(plan=plan, scenario=scenario), devices=(A, B))
    around, slower, changed = Around(looks), [], []
    reading = asyncio.create_task(
        conditions_reader.read_conditions(
            around, "d" * 32, lambda: epoch, lambda *told: slower.append(told), changed.append
        )
    )
    await asyncio.wait_for(around.over.wait(), WAIT_S)
    reading.cancel()
    return slower, changed


async def test_a_device_that_was_slow_from_the_start_is_told_once(monkeypatch):
    looks = [paces(10 + i / 10, 60 + i / 10) for i in range(FIRST + 5)]
    slower, changed = await told(monkeypatch, looks)
    assert [(device, round(times)) for device, times in slower] == [(B, 4)]
    assert changed == ["jetson takes 3.8 times as long as it was measured to take"]


async def test_one_that_becomes_slow_is_told_against_its_beginning(monkeypatch):
    looks = [paces(10 + i / 10, 15 + i / 10) for i in range(FIRST)] + [
        paces(10 + i / 10, 45 + i) for i in range(1, AGREEING + 1)
    ]
    slower, changed = await told(monkeypatch, looks)
    assert [(device, round(times)) for device, times in slower] == [(B, 3)]
    assert len(changed) == 1 and changed[0].endswith("times as long as before")
