"""/peerllm/v1, as the command line and the page use it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from peerllm.api import admin, tasks
from peerllm.api.server import ApiServer
from peerllm.errors import EngineError
from tests.api.fake import BOUND_S, FakeHousehold


@pytest.fixture
async def owner(server: ApiServer, token: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {token}"}) as session:
        yield session


async def post(owner: aiohttp.ClientSession, name: str, /, **body: Any) -> tuple[int, Any]:
    async with owner.post(f"/peerllm/v1/{name}", json=body) as response:
        return response.status, await response.json()


async def lines(owner: aiohttp.ClientSession, **body: Any) -> list[dict[str, Any]]:
    async with owner.post("/peerllm/v1/run", json=body) as response:
        assert response.status == 200, await response.text()
        return [json.loads(line) async for line in response.content]


async def test_simple_changes(owner: aiohttp.ClientSession, household: FakeHousehold) -> None:
    assert await post(owner, "invite") == (
        200,
        {"code": "K7-4PQ9MX", "port": 8645, "hosts": ["192.168.1.7", "fd00::7", "fe80::7"], "expires_s": 120},
    )
    assert await post(owner, "join", code="x", at="[fe80::1]:8645") == (200, {"name": "laptop"})
    assert await post(owner, "join", code="x", at=None) == (200, {"name": "laptop"})
    assert await post(owner, "leave") == (200, {"ok": True})
    assert await post(owner, "remove", device="jetson") == (200, {"ok": True})
    assert await post(owner, "stop", model="builtin") == (200, {"ok": True})
    assert household.calls == [
        ("invite",),
        ("join", "x", ("fe80::1", 8645)),
        ("join", "x", None),
        ("leave",),
        ("remove", "jetson"),
        ("stop", "builtin"),
    ]


async def test_the_owner_s_limits(owner: aiohttp.ClientSession) -> None:
    async with owner.get("/peerllm/v1/limits") as response:
        assert (await response.json())["battery_percent"] == 15
    status, found = await post(owner, "limits", hours=[1200, 480], threads=2, battery_percent=0)
    assert status == 200
    assert (found["hours"], found["threads"], found["battery_percent"], found["leaving"]) == ([1200, 480], 2, None, "")
    assert (await post(owner, "pause"))[1]["leaving"] == "paused by its owner"
    assert (await post(owner, "resume"))[1]["paused"] is False
    for wrong in ({"threads": -1}, {"threads": "2"}, {"hours": [1]}, {"colour": 1}):
        status, found = await post(owner, "limits", **wrong)
        assert status == 400 and next(iter(wrong)) in found["error"]["message"]


async def test_who_asks_while_the_device_starts_waits_but_sees_that_it_does(
    owner: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    household.start_gate = asyncio.Event()
    for path in ("/", "/peerllm/v1/status", "/static/app.js"):
        async with owner.get(path) as answer:
            assert answer.status == 200
    async with owner.post("/peerllm/v1/invite", json={}, headers={"Authorization": "Bearer wrong"}) as answer:
        assert answer.status == 401, "who may not ask does not wait either"
    waiting = asyncio.create_task(post(owner, "invite"))
    models = asyncio.create_task(owner.get("/v1/models"))
    await asyncio.wait({waiting, models}, timeout=0.2)
    assert not waiting.done() and not models.done() and not household.calls
    household.start_gate.set()
    assert (await waiting)[0] == (await models).status == 200
    household.start_gate = asyncio.Event()
    monkeypatch.setattr("peerllm.api.server.START_WAIT_S", 0.05)
    async with owner.get("/v1/models") as answer:
        assert answer.status == 503 and answer.headers["Retry-After"]
        assert "still starting" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize(
    ("name", "body", "status", "word"),
    [
        ("join", {"code": "wrong"}, 401, "two tries"),
        ("join", {}, 400, "code"),
        ("join", {"code": 5}, 400, "code"),
        ("join", {"code": "x", "at": "nowhere"}, 400, "HOST:PORT"),
        ("join", {"code": "x", "at": "a:0"}, 400, "HOST:PORT"),
        ("join", {"code": "x", "at": "a:99999"}, 400, "HOST:PORT"),
        ("join", {"code": "x", "at": ":1"}, 400, "HOST:PORT"),
        ("stop", {"model": "gone"}, 404, "gone"),
        ("stop", {}, 400, "model"),
        ("remove", {"device": ""}, 400, "device"),
        ("run", {}, 400, "model"),
        ("run", {"model": "unknown"}, 404, "unknown"),
        ("run", {"model": "builtin", "slots": 0}, 400, "slots"),
        ("run", {"model": "builtin", "objective": "fun"}, 400, "objective"),
        ("run", {"model": "b", "objective": []}, 400, "objective"),
        ("run", {"model": "b", "schedule": "fast"}, 400, "schedule"),
        ("run", {"model": "b", "activations": "int4"}, 400, "one of auto, exact, int8"),
        ("run", {"model": "b", "context": 1.5}, 400, "context"),
        ("run", {"model": "b", "quantize": "int2"}, 400, "one of auto, int4, int8, none"),
        ("run", {"model": "b", "dtype": "int8"}, 400, "dtype"),
        ("run", {"model": "b", "private": "no"}, 400, "private"),
        ("run", {"model": "b", "name": 5}, 400, "name"),
        ("trace", {}, 400, "model"),
        ("trace", {"model": "builtin", "recording": 0}, 400, "recording"),
        ("trace", {"model": "builtin", "recording": 8}, 409, "over"),
    ],
)
async def test_refusals(owner: aiohttp.ClientSession, name: str, body: dict[str, Any], status: int, word: str) -> None:
    got, answer = await post(owner, name, **body)
    assert got == status
    assert word in answer["error"]["message"]


async def test_run_tells_its_progress(owner: aiohttp.ClientSession, household: FakeHousehold) -> None:
    wanted = {
        "context": 512,
        "slots": 2,
        "objective": "throughput",
        "private": True,
        "schedule": "bubble",
        "name": "home",
    }
    found = await lines(owner, model="builtin", **wanted)
    assert found[0] == {"state": "planning", "message": "planning over 3 devices", "devices": {}}
    assert found[-2]["devices"] == {"laptop": 1.0, "mini-pc": 0.5}
    assert found[-1] == {"ok": True, "name": "home"}
    options = household.runs[0]
    assert (options.schedule, options.activations, options.name) == ("bubble", "auto", "home")
    assert (options.model, options.context, options.slots, options.objective, options.private) == (
        "builtin",
        512,
        2,
        "throughput",
        True,
    )


async def test_of_a_burst_of_progress_the_newest_lines_are_told(
    owner: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.burst = 2 * admin.MAX_PROGRESS
    told = [one["message"] for one in (await lines(owner, model="builtin"))[:-1]]
    assert len(told) == admin.MAX_PROGRESS
    assert told[0] == f"step {household.burst + 3 - admin.MAX_PROGRESS}"


async def test_run_that_fails_ends_with_the_error(owner: aiohttp.ClientSession) -> None:
    found = await lines(owner, model="huge")
    assert found[-1]["error"]["missing_bytes"] == 4_000_000_000
    assert found[-1]["error"]["status"] == 409
    assert not any("ok" in line for line in found)


async def test_run_that_fails_unforeseen_never_says_ok(owner: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.run_error = RuntimeError("secret")
    last = (await lines(owner, model="builtin"))[-1]
    assert "internal error" in last["error"]["message"]
    household.run_error = EngineError("the engine died")
    assert (await lines(owner, model="builtin"))[-1]["error"]["message"] == "the engine died"


async def test_hanging_up_does_not_stop_the_loading(owner: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.run_gate = asyncio.Event()
    response = await owner.post("/peerllm/v1/run", json={"model": "builtin"})
    await response.content.readline()
    response.close()
    await asyncio.sleep(0.05)
    assert not household.run_done.is_set()
    household.run_gate.set()
    await asyncio.wait_for(household.run_done.wait(), BOUND_S)


async def test_changes_under_way_are_bounded_and_make_room(
    owner: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MAX_CHANGES", 2)
    household.run_gate = asyncio.Event()
    under_way = [await owner.post("/peerllm/v1/run", json={"model": name}) for name in "ab"]
    assert (await post(owner, "leave"))[0] == 429
    household.run_gate.set()
    for response in under_way:
        assert '{"ok":true' in await response.text()
    for _ in range(3):
        assert (await post(owner, "leave"))[0] == 200


async def test_closing_the_api_ends_a_run_under_way(
    owner: aiohttp.ClientSession, household: FakeHousehold, server: ApiServer
) -> None:
    household.run_gate = asyncio.Event()
    response = await owner.post("/peerllm/v1/run", json={"model": "builtin"})
    await response.content.readline()
    await asyncio.wait_for(server.close(), BOUND_S)
    assert household.run_done.is_set()
    response.close()


async def test_status_and_waiting_for_a_change(owner: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async with owner.get("/peerllm/v1/status") as response:
        assert await response.json() == {**household.status(), "asking": []}
    waiting = asyncio.create_task(owner.get("/peerllm/v1/status?wait=1"))
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    household.devices[2]["state"] = "lost"
    household.touch()
    async with await asyncio.wait_for(waiting, BOUND_S) as response:
        assert (await response.json())["devices"][2]["state"] == "lost"


async def test_waiting_is_bounded(owner: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "WAIT_S", 0.05)
    async with owner.get("/peerllm/v1/status?wait=1") as response:
        assert response.status == 200


async def test_events(owner: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "KEEP_ALIVE_S", 0.05)
    async with owner.get("/peerllm/v1/events") as response:
        assert response.content_type == "text/event-stream"
        first = await response.content.readuntil(b"\n\n")
        assert json.loads(first.removeprefix(b"data: ")) == {**household.status(), "asking": []}
        assert await response.content.readuntil(b"\n\n") == b": unchanged\n\n"
        household.deployments.clear()
        household.touch()
        async with asyncio.timeout(BOUND_S):
            while not (event := await response.content.readuntil(b"\n\n")).startswith(b"data"):
                pass
        assert json.loads(event.removeprefix(b"data: "))["deployments"] == []


async def test_closing_the_api_ends_event_streams(owner: aiohttp.ClientSession, server: ApiServer) -> None:
    async with owner.get("/peerllm/v1/events") as response:
        await response.content.readuntil(b"\n\n")
        await asyncio.wait_for(server.close(), BOUND_S)


async def test_who_sits_at_this_machine_may_count_tasks(
    owner: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with owner.get("/peerllm/v1/process") as response:
        assert response.status == 200
        found = await response.json()
    assert found["pid"] == os.getpid()
    assert found["tasks"] == len(asyncio.all_tasks()) + 1  # the request's own
    monkeypatch.setattr(admin, "is_loopback", lambda host: False)
    async with owner.get("/peerllm/v1/process") as response:
        assert response.status == 403
