"""A stage moves to another device while answers are written: what it keeps is carried, the tokens are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peerllm.engine.messages import CarryState, Connect, EngineLoad, Hop, Switch, Unload
from peerllm.types import Sampling
from tests.engine.engines import WAIT_S, Cut, Deployed, Device, deploy, devices, stage_specs
from tests.engine.tiny import make_llama, prompt

pytestmark = pytest.mark.timeout(240)

BEFORE: Cut = ((0, 0, 2), (1, 3, 4), (0, 5, 5))
AFTER: Cut = ((0, 0, 2), (2, 3, 4), (0, 5, 5))
CONTEXT = 256
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=6),
)


async def establish(deployed: Deployed, epoch: int, cut: Cut, state_from: Sequence[Device] = ()) -> None:
    """Load and connect another epoch beside the one that runs."""
    deployed.epoch = epoch
    senders = tuple(device.id for device in state_from)
    specs = [(device, replace(spec, state_from=senders)) for device, spec in
             stage_specs(deployed.devices, deployed.inspected, cut, deployed, context=CONTEXT)]  # fmt: skip
    await asyncio.gather(*(device.host.ask(spec, WAIT_S) for device, spec in specs))
    for device in {id(device): device for device, _ in specs}.values():
        await device.host.ask(Connect(device.host.next_request(), deployed.id, epoch), WAIT_S)


async def carry(deployed: Deployed, holder: Device, to: Device, layers: tuple[int, int], stage: int) -> Any:
    """From the epoch before the one that was established last."""
    hop = Hop(to.id, to.hosts, to.port, stage)
    epoch = deployed.epoch
    order = CarryState(holder.host.next_request(), deployed.id, epoch - 1, *layers, epoch, hop)
    return await holder.host.ask(order, WAIT_S)


async def switch(deployed: Deployed) -> None:
    source = deployed.source
    await source.host.ask(Switch(source.host.next_request(), deployed.id, deployed.epoch), WAIT_S)
    for device in deployed.devices:
        await device.host.ask(Unload(device.host.next_request(), deployed.id, deployed.epoch - 1), WAIT_S)


async def replayed(deployed: Deployed) -> int:
    loads: list[EngineLoad] = [await device.load() for device in deployed.devices]
    return sum(load.replayed_tokens for load in loads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.usefixtures("calm")
async def test_answers_go_on_with_what_was_carried(model: Path, tmp_path: Path) -> None:
    async with devices(3, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, BEFORE, context=CONTEXT)
        prompts = [prompt(40, 1), prompt(70, 2), prompt(5, 3)]
        expected = [await deployed.generate(ids, 90, how) for ids, how in zip(prompts, SAMPLINGS, strict=True)]
        running = [deployed.submit(ids, 90, how) for ids, how in zip(prompts, SAMPLINGS, strict=True)]
        for sequence in running:
            await deployed.some(sequence, 10)
        await establish(deployed, 2, AFTER, [made[1]])
        await carry(deployed, made[1], made[2], (3, 4), 1)
        before = await replayed(deployed)
        await switch(deployed)
        for sequence, wanted in zip(running, expected, strict=True):
            ids, end = await deployed.finished(sequence)
            assert (ids, end.finish) == (wanted, "length")
        print("replayed", await replayed(deployed) - before)
