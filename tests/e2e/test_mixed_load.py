"""Requests of all kinds over all APIs at once, at every device of the demo's household: none is lost, nothing stays."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable

import psutil
import pytest

from tests.clients import clients
from tests.household import Device
from tests.mixed_requests import CHAT, QUESTIONS, TOKENS, alone, at_once, mixed
from tests.sizes import FULL

REQUESTS = 200 if FULL else 40
SETTLED_S = 60.0  # until connections between devices that nobody uses are closed


@pytest.mark.timeout(300)
async def test_mixed_requests_at_once_and_none_is_lost(demo: list[Device]) -> None:
    before = [counts(device) for device in demo]
    async with clients() as session:
        known = await alone(session, demo[0].url)
        wrong = await at_once(session, [device.url for device in demo], mixed(known, REQUESTS))
    assert not wrong, "\n".join(wrong)
    for device, (tasks, files) in zip(demo, before, strict=True):
        assert await eventually(lambda device=device: not device.slots_in_use())
        assert await eventually(lambda device=device: not device.get("/peerllm/v1/process")["answers"])
        if FULL:
            assert await eventually(lambda device=device, most=tasks + 5: counts(device)[0] <= most)
            assert await eventually(lambda device=device, most=files + 5: counts(device)[1] <= most)
        assert "Traceback" not in device.log_tail()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_all_of_them_may_ask_one_device_that_asks_another(demo: list[Device]) -> None:
    """Two hundred are within every bound that there is by default, in whatever way they come."""
    asked = {"model": "builtin", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 16}
    async with clients(demo[1].url) as session:

        async def ask() -> int:
            async with session.post(CHAT, json=asked) as response:
                await response.read()
                return response.status

        found = await asyncio.gather(*(ask() for _ in range(200)))
    assert found == [200] * 200


def test_one_id_is_in_the_logs_of_all_devices(demo: list[Device]) -> None:
    body = {"model": "builtin", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": TOKENS}
    headers = {"Content-Type": "application/json", "X-Request-Id": "everywhere-1"}
    with urllib.request.urlopen(urllib.request.Request(demo[2].url + CHAT, json.dumps(body).encode(), headers)) as got:
        assert got.headers["X-Request-Id"] == "everywhere-1"
    stages = {stage["device"] for stage in demo[0].status()["deployments"][0]["plan"]["stages"]}
    for device in demo:
        found = [line for line in device.log_tail().splitlines() if "[everywhere-1]" in line]
        assert any("is computed" in line for line in found) is (device.name in stages)
        assert any(" of jetson: 200" in line for line in found) is (device is demo[0])
        assert any(f"POST {CHAT} of 127.0.0.1: 200" in line for line in found) is (device is demo[2])


def counts(device: Device) -> tuple[int, int]:
    """Tasks, and open files."""
    assert device.process is not None
    return device.get("/peerllm/v1/process")["tasks"], psutil.Process(device.process.pid).num_fds()


async def eventually(there: Callable[[], bool]) -> bool:
    """Whether it is so before long."""
    until = time.monotonic() + SETTLED_S
    while time.monotonic() < until:
        if await asyncio.to_thread(there):
            return True
        await asyncio.sleep(0.1)
    return False
