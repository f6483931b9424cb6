"""An answer with a key that another device began goes on here: the same text, ids and objects from any event on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from peerllm.api.core.kept import answer_store, inherited_answers
from peerllm.daemon.facade import InheritedAnswer
from tests.api.fake import BOUND_S, FakeHousehold
from tests.api.test_kept_answers import ASK, KEY, PATH, parsed, stream, tokens, whole


async def begun(client: aiohttp.ClientSession, household: FakeHousehold, **more: Any) -> list[Any]:
    """The first events of an answer whose device is lost after four tokens."""
    household.middle = asyncio.Event()
    events = b""
    async with client.post(PATH, json={**ASK, "stream": True, **more}, headers=KEY) as response:
        async for piece in response.content.iter_any():
            events += piece
            if b"id: 4\n" in events and events.endswith(b"\n\n"):
                break
    return parsed(events.decode())


def left(household: FakeHousehold, ids: list[int]) -> InheritedAnswer:
    asked = household.requests[0]
    assert asked.kept
    return InheritedAnswer(
        asked.deployment, asked.prompt, asked.max_tokens, asked.sampling, asked.client, asked.kept, ids
    )


async def test_an_answer_goes_on_where_it_stood(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    had = await begun(client, household, return_token_ids=True)
    heir.inherit(left(household, tokens(had)[:3]))  # its copy is a little behind
    rest = await stream(there, "4", return_token_ids=True)
    again = await stream(there, return_token_ids=True)
    assert _same(had + rest, again)
    (asked,) = heir.requests
    assert (asked.answer, asked.kept) == (tokens(had)[:3], household.requests[0].kept)
    assert asked.sampling == household.requests[0].sampling
    household.middle.set()  # type: ignore[union-attr]
    assert tokens(had + rest) == (await whole(client, return_token_ids=True))["choices"][0]["token_ids"]


def _same(some: list[Any], others: list[Any]) -> bool:
    """The same answer, however its tokens were cut into events."""
    ids = {event["id"] for _, event in (*some, *others) if event != "[DONE]"}
    return len(ids) == 1 and tokens(some) == tokens(others)


async def test_stop_strings_go_with_it(client: aiohttp.ClientSession, household: FakeHousehold, successor: Any) -> None:
    there, heir = successor
    await begun(client, household, stop=["wör"])
    heir.inherit(left(household, []))
    answer = await whole(there, stop=["wör"])
    assert answer["choices"][0]["message"]["content"] == "Hello, "
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_its_form_goes_with_it(client: aiohttp.ClientSession, household: FakeHousehold, successor: Any) -> None:
    there, heir = successor
    form = {"response_format": {"type": "regex", "grammar": "a|b"}}
    await begun(client, household, **form)
    heir.inherit(left(household, []))
    await whole(there, **form)
    (asked,) = heir.requests
    assert asked.constraint is not None and "/a|b/" in asked.constraint.grammar


async def test_another_body_under_the_same_key_is_refused_here_too(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    await begun(client, household)
    heir.inherit(left(household, []))
    async with there.post(PATH, json={**ASK, "temperature": 1.5}, headers=KEY) as response:
        assert response.status == 422


async def test_it_waits_for_the_model_and_gives_up_after_a_bounded_time(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, heir = successor
    await begun(client, household)
    heir.served = [replace(heir.model, model_dir=None)]
    heir.inherit(left(household, []))
    reading = asyncio.create_task(whole(there))
    await asyncio.wait_for(heir.watched.wait(), BOUND_S)
    assert not reading.done()
    heir.served = [heir.model]
    heir.touch()
    assert (await asyncio.wait_for(reading, BOUND_S))["choices"][0]["message"]["content"] == heir.reply
    monkeypatch.setattr(inherited_answers, "MODEL_WAIT_S", 0.05)
    heir.served = []
    other = replace(left(household, []), kept=household.requests[0].kept.replace(KEY["Idempotency-Key"], "other"))
    heir.inherit(other)
    async with there.post(PATH, json=ASK, headers={"Idempotency-Key": "other"}) as response:
        assert response.status == 503


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"form":3,"key":"k"}', '{"form":3,"key":"k","fingerprint":"xyz"}'])
async def test_what_makes_no_sense_is_left_alone(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any, kept: str
) -> None:
    _, heir = successor
    await begun(client, household)
    heir.inherit(replace(left(household, []), kept=kept))
    assert not heir.requests


async def test_a_key_that_is_used_here_already_keeps_its_answer(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    await begun(client, household)
    first = await whole(there)
    heir.inherit(left(household, []))
    assert await whole(there) == first
    assert len(heir.requests) == 1


async def test_an_answer_without_a_key_ends_where_nobody_comes_to_read_it(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, heir = successor
    async with client.post(PATH, json=ASK) as response:
        await response.read()
    monkeypatch.setattr(answer_store, "ALONE_S", 0.5)
    heir.gate = asyncio.Event()
    heir.inherit(left(household, []))
    await asyncio.wait_for(heir.closed.wait(), BOUND_S)
    assert len(heir.requests) == 1
