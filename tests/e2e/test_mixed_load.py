"""Requests of all kinds over all APIs at once, at every device of the demo's household: none is lost, nothing stays."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from peerllm.api.bodies import decoded
from peerllm.api.core.kept.repeat import fingerprint
from peerllm.api.openai.chat_requests import ChatBody
from tests.clients import clients
from tests.household import Device, household
from tests.loop_watch import longest
from tests.mixed_requests import CHAT, QUESTIONS, TOKENS, Request, alone, at_once, mixed
from tests.sizes import FULL

REQUESTS = 200 if FULL else 40
LONG_MEASURES = 8  # of what reading a large body takes: 15 ms where this was written
SETTLED_S = 60.0  # until connections between devices that nobody uses are closed


@pytest.mark.timeout(300)
async def test_mixed_requests_at_once_and_none_is_lost(demo: list[Device]) -> None:
    before = [counts(device) for device in demo]
    async with clients() as session:
        known = await alone(session, demo[0].url)
        wrong = await at_once(session, [device.url for device in demo], mixed(known, REQUESTS))
    assert not wrong, "\n".join(wrong)
    for device, (answers, tasks, files) in zip(demo, before, strict=True):
        assert await eventually(lambda device=device: not device.slots_in_use())
        assert await eventually(lambda device=device, most=answers: counts(device)[0] <= most)
        if FULL:
            assert await eventually(lambda device=device, most=tasks + 5: counts(device)[1] <= most)
            assert await eventually(lambda device=device, most=files + 5: counts(device)[2] <= most)
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


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_no_loop_computes_for_long_at_a_time(tmp_path: Path) -> None:
    """Whatever is asked, everybody else gets a turn; what takes longer is computed elsewhere.

    The measure is what this machine takes for the largest thing that is done in one go: reading a large body.
    """
    files = {name: tmp_path / f"{name}.jsonl" for name in ("anna", "ben")}
    prefixes = {name: (sys.executable, "-m", "tests.loop_watch", str(file)) for name, file in files.items()}
    large = json.dumps({"model": "builtin", "messages": [{"role": "user", "content": "word " * (6 << 18)}]}).encode()
    since = time.thread_time()
    fingerprint(decoded(large, ChatBody).generations()[0])
    measure_ms = 1000 * (time.thread_time() - since)
    with household(tmp_path, list(files), prefixes=prefixes) as devices:
        devices[0].cli("run", "builtin", "--context", "1024")
        urls = [device.url for device in devices]
        async with clients() as session:
            known, began = await alone(session, urls[0]), time.time()
            asked = [*mixed(known, REQUESTS), *(Request("large", CHAT, large, 400) for _ in urls)]
            wrong = await at_once(session, urls, asked)
    assert not wrong, "\n".join(wrong)
    for file in files.values():
        assert file.exists()
        for one in longest(file, began):
            assert one["worked_ms"] < LONG_MEASURES * measure_ms, one


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


def counts(device: Device) -> tuple[int, int, int]:
    """Answers that are under way or kept, also for earlier tests; tasks; open files."""
    assert device.process is not None
    told = device.get("/peerllm/v1/process")
    return told["answers"], told["tasks"], psutil.Process(device.process.pid).num_fds()


async def eventually(there: Callable[[], bool]) -> bool:
    """Whether it is so before long."""
    until = time.monotonic() + SETTLED_S
    while time.monotonic() < until:
        if await asyncio.to_thread(there):
            return True
        await asyncio.sleep(0.1)
    return False
