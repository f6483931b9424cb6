"""/api/pull, /api/copy and /api/delete, with the official client."""

from __future__ import annotations

import asyncio

import aiohttp
import ollama
import pytest

from peerllm.api.ollama import shelf_routes
from peerllm.api.server import ApiServer
from peerllm.errors import UnavailableError
from tests.api.fake import BOUND_S, FakeHousehold


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


async def test_a_pull_is_told_as_it_goes(
    lama: ollama.AsyncClient, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_routes, "LOOK_S", 0.01)
    household.run_gate = asyncio.Event()
    told = []
    async for one in await lama.pull("smollm2", stream=True):
        told.append((one.status or "", one.completed, one.total))
        household.run_gate.set()
    assert told[0][1:] == (250, 1000) and told[0][0].startswith("pulling ")
    assert told[-2][1:] == (1000, 1000) and told[-1][0] == "success"
    assert household.calls == [("pull", "smollm2")]


async def test_one_that_is_not_streamed(lama: ollama.AsyncClient) -> None:
    assert (await lama.pull("smollm2")).status == "success"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_is_none(client: aiohttp.ClientSession, stream: bool) -> None:
    async with client.post("/api/pull", json={"name": "unknown", "stream": stream}) as response:
        assert (response.status, await response.json()) == (404, {"error": "no model 'unknown'"})


async def test_an_error_midway_ends_the_lines(
    lama: ollama.AsyncClient, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_routes, "LOOK_S", 0.01)
    household.run_gate, household.run_error = asyncio.Event(), UnavailableError("the hub is gone")
    lines = (await lama.pull("smollm2", stream=True)).__aiter__()
    assert (await anext(lines)).total == 1000
    household.run_gate.set()
    with pytest.raises(ollama.ResponseError, match="the hub is gone"):
        [one async for one in lines]


async def test_who_hangs_up_ends_it(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_routes, "LOOK_S", 0.01)
    household.run_gate = asyncio.Event()
    async with client.post("/api/pull", json={"model": "smollm2"}) as response:
        await response.content.readline()
        assert not household.run_done.is_set()
    await asyncio.wait_for(household.run_done.wait(), BOUND_S)


async def test_copy_and_delete(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    assert (await lama.copy("builtin:latest", "gpt-4")).status == "success"
    assert (await lama.delete("gpt-4")).status == "success"
    assert household.calls == [("alias", "gpt-4", "builtin"), ("delete", "gpt-4")]
    with pytest.raises(ollama.ResponseError, match="no model 'nothing'"):
        await lama.copy("nothing", "x")
    with pytest.raises(ollama.ResponseError, match="cannot be deleted"):
        await lama.delete("builtin")


async def test_a_foreign_page_may_not(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    for method, path in (("POST", "/api/pull"), ("POST", "/api/copy"), ("DELETE", "/api/delete")):
        body = {"model": "x", "source": "builtin", "destination": "y"}
        async with client.request(method, path, json=body, headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403
        async with client.request(method, path, data="{}", headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 415
    assert not household.calls
