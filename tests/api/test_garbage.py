"""An answer that has ended leaves nothing behind that only a full collection of garbage would free."""

from __future__ import annotations

import asyncio
import gc

import aiohttp
import pytest
from aiohttp import web

from peerllm.api.streams import Stream
from tests.api.fake import BOUND_S

ASK = {"model": "builtin", "messages": [{"role": "user", "content": "hello"}]}
TIMES = 5


def left() -> int:
    """Requests and streams that are still there."""
    return sum(issubclass(type(one), web.BaseRequest | Stream) for one in gc.get_objects())


async def whole(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/chat/completions", json=ASK) as response:
        await response.read()


async def streamed(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await response.read()


async def hung_up(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await response.content.readline()


async def refused(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/chat/completions", json={**ASK, "model": "gpt-9"}) as response:
        await response.read()


async def watched(session: aiohttp.ClientSession) -> None:
    async with session.get("/peerllm/v1/events") as response:
        await response.content.readline()


@pytest.mark.parametrize("act", [whole, streamed, hung_up, refused, watched])
async def test_nothing_waits_for_the_collector(server, act) -> None:
    gc.collect()
    gc.disable()
    before = left()  # what other tests hold on to
    try:
        for _ in range(TIMES):
            connector = aiohttp.TCPConnector(force_close=True)
            async with aiohttp.ClientSession(server.url, connector=connector) as session:
                await act(session)
        async with asyncio.timeout(BOUND_S):
            while left() > before:  # noqa: ASYNC110 (the server hears of a hang-up a moment later)
                await asyncio.sleep(0)
    finally:
        gc.enable()
