"""A client that streams answers from a device and checks every event: for many at once, in tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATH = "/v1/chat/completions"
TOTAL_S = 240.0  # for one answer, its wait in the queue included


@dataclass(slots=True)
class Heard:
    """What one client got of its answer."""

    status: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    places: list[int] = field(default_factory=list)  # in the queue, as told
    finish: str | None = None
    done: bool = False  # [DONE] came, and then the end
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def clients(url: str | None = None, token: str = "") -> AsyncIterator[aiohttp.ClientSession]:
    """A session with a connection for everyone."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=TOTAL_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session:
        yield session


def body(question: str, tokens: int, **options: Any) -> dict[str, Any]:
    """A greedy request of the built-in model, with its token ids."""
    messages = [{"role": "user", "content": question}]
    asked = {"model": "builtin", "messages": messages, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    return asked | options


async def stream(session: aiohttp.ClientSession, question: str, tokens: int, hang_up_after: int | None = None) -> Heard:
    """One streamed answer; AssertionError if its events are not in order. Hangs up after that many ids, if told to."""
    async with session.post(PATH, json=body(question, tokens, stream=True)) as response:
        heard = Heard(response.status, headers=dict(response.headers))
        if response.status != 200:
            heard.error = (await response.json())["error"]
            return heard
        async for raw in response.content:
            line = raw.decode().strip()
            if line.startswith(": queued "):
                assert not heard.ids, "a place in the queue after the first token"
                heard.places.append(int(line.removeprefix(": queued ")))
            elif line.startswith("data: "):
                assert not heard.done, f"{line} after [DONE]"
                _take(heard, line.removeprefix("data: "))
            if hang_up_after is not None and len(heard.ids) >= hang_up_after:
                return heard
    return heard


def _take(heard: Heard, data: str) -> None:
    if data == "[DONE]":
        assert heard.finish, "[DONE] before the answer's end"
        heard.done = True
        return
    event = json.loads(data)
    if "error" in event:
        heard.error = event["error"]
        return
    (choice,) = event["choices"]
    assert heard.finish is None, f"{data} after the answer's end"
    heard.text += choice["delta"].get("content", "")
    heard.ids += choice.get("token_ids", [])
    heard.finish = choice["finish_reason"]
