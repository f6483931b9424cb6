"""An answer that is read on the device that computes it goes on with the one that takes its deployment over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from peerllm.api.core import asking
from peerllm.daemon.facade import InheritedAnswer
from peerllm.errors import UnavailableError
from tests.api.fake import BOUND_S
from tests.api.relay_pair import ASK, MINI, PATH, Pair
from tests.api.test_relay import KEY

MOVED = UnavailableError("mini-pc serves builtin now; ask again")


@pytest.fixture
async def left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """The mini PC computes until the laptop takes over, which has the first three tokens of what it computes."""
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    mini, laptop = pair.mini, pair.laptop
    mini.served = [mini.model]
    mini.middle, mini.error_midway = asyncio.Event(), MOVED
    yield pair
    assert len(mini.requests) == 1 and len(laptop.requests) <= 1


def take_over(pair: Pair) -> None:
    asked = pair.mini.requests[0]
    sampled = asked.prompt, asked.max_tokens, asked.sampling, asked.client, asked.kept
    pair.laptop.inherit(InheritedAnswer(asked.deployment, *sampled, pair.mini.ids(pair.mini.reply)[:3]))
    pair.mini.served = [pair.elsewhere()]
    assert pair.mini.middle is not None
    pair.mini.middle.set()


async def half(response: aiohttp.ClientResponse) -> bytes:
    """Up to the fourth token, which is the last that is computed here."""
    text = b""
    while text.count(b'"content":"') < 2 and b"Hell" not in text:
        text += await response.content.readuntil(b"\n\n")
    return text


@pytest.mark.parametrize("headers", [{}, KEY])
async def test_a_stream_goes_on_with_the_same_tokens(left: Pair, headers: dict[str, str]) -> None:
    async with (
        asyncio.timeout(BOUND_S),
        left.session.post(PATH, json={**ASK, "stream": True}, headers=headers) as response,
    ):
        text = await half(response)
        take_over(left)
        text += await response.content.read()
    assert text.endswith(b"data: [DONE]\n\n")
    assert (b"id: " in text) == bool(headers)
    events = [json.loads(one.partition(b"data: ")[2]) for one in text.split(b"\n\n") if b"data: {" in one]
    assert not any("error" in event for event in events)
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert said == left.laptop.reply
    assert sum("role" in event["choices"][0]["delta"] for event in events) == 1
    assert len({event["id"] for event in events}) == 1


async def test_a_whole_answer_is_the_followers(left: Pair) -> None:
    task = asyncio.create_task(left.session.post(PATH, json=ASK))
    await asyncio.wait_for(left.mini.asked.wait(), BOUND_S)
    take_over(left)
    async with asyncio.timeout(BOUND_S), await task as response:
        answer: Any = await response.json()
    assert (response.status, answer["choices"][0]["message"]["content"]) == (200, left.laptop.reply)


async def test_what_nobody_goes_on_with_ends_with_its_error(left: Pair) -> None:
    async with asyncio.timeout(BOUND_S), left.session.post(PATH, json={**ASK, "stream": True}) as response:
        text = await half(response)
        assert left.mini.middle is not None
        left.mini.middle.set()
        text += await response.content.read()
    last = text.removesuffix(b"\n\n").split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == str(MOVED)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_device_that_relays_looks_for_the_one_that_goes_on(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """The laptop computes for a client of the mini PC, which takes over itself."""
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    laptop, mini = pair.laptop, pair.mini
    laptop.middle, laptop.error_midway = asyncio.Event(), MOVED
    task = asyncio.create_task(pair.session.post(PATH, json={**ASK, "stream": stream}))
    await asyncio.wait_for(laptop.asked.wait(), BOUND_S)
    asked = laptop.requests[0]
    sampled = asked.prompt, asked.max_tokens, asked.sampling, asked.client, asked.kept
    mini.inherit(InheritedAnswer(asked.deployment, *sampled, laptop.ids(laptop.reply)[:2]))
    mini.served = [mini.model]
    laptop.served = [replace(laptop.model, model_dir=None, source=MINI)]
    laptop.middle.set()
    async with asyncio.timeout(BOUND_S), await task as response:
        text = await response.text()
    assert response.status == 200
    assert "error" not in text
    if stream:
        events = [json.loads(one.partition("data: ")[2]) for one in text.split("\n\n") if "data: {" in one]
        said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    else:
        said = json.loads(text)["choices"][0]["message"]["content"]
    assert said == mini.reply
