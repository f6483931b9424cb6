"""Households in memory for every test of the daemon."""

from __future__ import annotations

import pytest

from peerllm.daemon.decide.deployment_life import pacing
from tests.daemon.house import BLOCK, House, inspected

SPARE = 100_000  # bytes beside the blocks: working space and ends
QUICK = {"RETRY_SETTLE_S": 0.0, "JOIN_SETTLE_S": 0.0, "SETTLE_S": 0.0, "CONTENTION_S": 0.01}


@pytest.fixture
async def houses(tmp_path, monkeypatch, request):
    """Makes households whose devices lend room for so many blocks; of models that are numbers these are the blocks.

    All is given back at the end. A module's PACING says what else its deployments' pacing is.
    """
    for name, value in {**QUICK, **getattr(request.module, "PACING", {})}.items():
        monkeypatch.setattr(pacing, name, value)
    made = []

    def make(lent, machines="", **models):
        found = {name: inspected(name, one) if isinstance(one, int) else one for name, one in models.items()}
        house = House(tmp_path, [int(n * BLOCK) + SPARE for n in lent], found)
        for device, machine in zip(house.devices.values(), machines, strict=False):
            device.machine = machine
        made.append(house)
        return house

    yield make
    for house in made:
        await house.close()
        assert house.empty()
