"""One paired device that sends all it can: it is made to wait, and the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from peerllm.codec import encode
from peerllm.daemon.control_messages import (
    Answer,
    Ask,
    Control,
    DeviceView,
    Gossip,
    Have,
    Heartbeat,
    Question,
    Release,
)
from peerllm.daemon.household_events import HouseholdEvents
from peerllm.daemon.network import control_channel
from peerllm.daemon.network.control_channel import LAST, MORE, PART_BYTES
from peerllm.daemon.network.limits import traffic_budget
from peerllm.daemon.network.limits.message_sizes import MAX_BYTES
from peerllm.daemon.network.limits.traffic_budget import TrafficBudget
from tests.daemon.network.test_network_hostile import closed, rogue
from tests.daemon.networks import WAIT_S, Device, devices, pair

VIEW_15_MB = b'{"type":"DeviceView","promised_bytes":1,"resident_bytes":1,"engine":"' + b"x" * (15 << 20)


@asynccontextmanager
async def besieged(tmp_path: Path) -> AsyncIterator[tuple[Device, Device, Device]]:
    """Anna and cleo, who mean well, and bert, whose own network has gone and whose identity the test uses."""
    async with devices(tmp_path, "anna", "bert", "cleo") as (anna, bert, cleo):
        await pair(anna, bert)
        await pair(anna, cleo)

        async def answer(device: str, question: Question) -> Answer:
            return Answer(0, free_bytes=42)

        for device in (anna, cleo):
            device.network.answer_with(answer)
        await bert.network.close()
        await anna.until(lambda: anna.state(bert) != "online")
        yield anna, bert, cleo


def parts(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PART_BYTES):
        more = start + PART_BYTES < len(data)
        yield (MORE if more else LAST) + data[start : start + PART_BYTES]


def small() -> Iterator[str | bytes]:
    for number in count():
        yield encode(Heartbeat(number), Control).decode()
        yield encode(Ask(number, Release("d", 1)), Control).decode()
        yield encode(DeviceView(number, 2, "running", ()), Control).decode()


def large() -> Iterator[str | bytes]:
    whole = encode(Answer(1, "", "x" * (4 << 20)), Control)
    for _ in count():
        yield from parts(whole)


async def pour(websocket: aiohttp.ClientWebSocketResponse, frames: Iterator[str | bytes]) -> None:
    for frame in frames:
        await (websocket.send_str(frame) if isinstance(frame, str) else websocket.send_bytes(frame))
        await asyncio.sleep(0)  # the one that is flooded runs on the same loop


@pytest.mark.parametrize("kind", [small, large])
async def test_a_flood_makes_its_sender_wait_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Iterator[str | bytes]]
) -> None:
    monkeypatch.setattr(traffic_budget, "BURST_S", 0.2)
    async with besieged(tmp_path) as (anna, bert, cleo), rogue(anna, bert) as websocket:
        await websocket.send_str(encode(bert.hello(), Control).decode())
        await anna.sees(bert)
        budget, read_bytes = anna.network._links._shares.budget(bert.id), 0
        spend = budget.spend

        def counted(nbytes: int, busy_s: float, now: float) -> None:
            nonlocal read_bytes
            read_bytes += nbytes + traffic_budget.MESSAGE_BYTES
            spend(nbytes, busy_s, now)

        monkeypatch.setattr(TrafficBudget, "spend", lambda self, *args: counted(*args) if self is budget else None)
        tasks = [asyncio.create_task(pour(websocket, kind())), asyncio.create_task(closed(websocket))]
        began, slowest = time.monotonic(), 0.0
        while time.monotonic() < began + 1.0:
            asked = time.monotonic()
            for here, there in ((anna, cleo), (cleo, anna)):
                assert (await here.network.ask(there.id, Release("d", 1), WAIT_S)).free_bytes == 42
            slowest = max(slowest, time.monotonic() - asked)
        seconds = time.monotonic() - began
        assert not any(task.done() for task in tasks), "it is made to wait, not cut"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        most = (seconds + traffic_budget.BURST_S) * traffic_budget.BYTES_PER_S
        assert 0 < read_bytes < most + (4 << 20) + 2 * PART_BYTES
        assert slowest < 3.0
        assert [state for device, state, _ in anna.states if device == cleo.id] == ["online"]


async def test_a_view_of_15_mb_is_refused_before_it_is_taken_in(tmp_path: Path) -> None:
    async with besieged(tmp_path) as (anna, bert, cleo), rogue(anna, bert) as websocket:
        await websocket.send_str(encode(bert.hello(), Control).decode())
        await anna.sees(bert)
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            for part in parts(VIEW_15_MB):
                await websocket.send_bytes(part)
        said = await closed(websocket)
        assert f"the limit is {MAX_BYTES['DeviceView']}" in said
        assert int(said.split(" of ")[1].split()[0]) <= MAX_BYTES["DeviceView"] + PART_BYTES
        assert anna.state(cleo) == "online"


async def test_a_message_that_begins_as_another_is_refused(tmp_path: Path) -> None:
    async with besieged(tmp_path) as (anna, bert, _), rogue(anna, bert) as websocket:
        await websocket.send_str(encode(bert.hello(), Control).decode())
        await anna.sees(bert)
        fields = b'"promised_bytes":1,"resident_bytes":1,"engine":"%s","deployments":[]'
        view = b'{"type":"Answer",' + fields + b',"type":"DeviceView"}'
        for part in parts(view % (b"x" * (1 << 20))):
            await websocket.send_bytes(part)
        assert "begins as a Answer" in await closed(websocket)
        assert anna.network.peers()[bert.id].view is None


async def test_another_link_of_the_same_device_has_the_same_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with besieged(tmp_path) as (anna, bert, _):
        shares = anna.network._links._shares
        before = shares.budget(bert.id)
        before.spend(1 << 30, 0.0, time.monotonic())
        async with rogue(anna, bert) as websocket:
            await websocket.send_str(encode(bert.hello(), Control).decode())
            await anna.sees(bert)
            assert shares.budget(bert.id) is before and before.wait_s(time.monotonic()) > 100
            await websocket.send_str("not a message, but it is not even read")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(closed(websocket), 0.3)


async def test_large_messages_are_decoded_off_the_loop_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    decoded = control_channel._decoded

    def noted(data: bytes) -> object:
        names.append(threading.current_thread().name)
        return decoded(data)

    monkeypatch.setattr(control_channel, "_decoded", noted)
    async with besieged(tmp_path) as (anna, _, cleo):
        names.clear()
        gossip = Gossip(anna.network._roster.gossip().entries * 300)
        assert len(encode(gossip, Control)) > control_channel.LARGE_BYTES
        cleo.network.tell(anna.id, gossip)
        cleo.network.tell(anna.id, DeviceView(77, 2, "running", ()))
        await anna.until(lambda: (view := anna.network.peers()[cleo.id].view) and view.promised_bytes == 77)
        assert any(not name.startswith("MainThread") for name in names)
        assert names.count("MainThread") >= 1
        assert anna.state(cleo) == "online"


async def test_work_for_a_device_in_threads_counts_in_its_budget(tmp_path: Path) -> None:
    """Questions about weights are answered off the loop, where no message is read meanwhile."""
    async with devices(tmp_path, "anna") as (anna,):
        budget = anna.network._links._shares.budget("b" * 64)

        class Busy:
            def answer(self, question: Question) -> Answer:
                began = time.thread_time()
                while time.thread_time() - began < 0.02:
                    pass
                return Answer(7)

        parts: Any = SimpleNamespace(offers=Busy(), network=anna.network)
        before = budget._full_at
        assert await HouseholdEvents(parts)._answer("b" * 64, Have(("0" * 64,))) == Answer(7)
        assert budget._full_at - max(before, 0.0) >= 0.02 / traffic_budget.BUSY_SHARE
