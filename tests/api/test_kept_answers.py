"""Answers with an Idempotency-Key: computed once, read again by whoever shows the key, from where they broke off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from peerllm.api.core import generation
from peerllm.api.core.kept import answer_store, repeat
from peerllm.errors import EngineError, OverloadedError
from tests.api.fake import BOUND_S, END, FakeHousehold

PATH = "/v1/chat/completions"
ASK: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"Idempotency-Key": "7c0d2b1e"}


def parsed(text: str) -> list[tuple[str | None, Any]]:
    """Every event as (id, object), [DONE] as a string; comments are left out."""
    found: list[tuple[str | None, Any]] = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.split("\n") if not line.startswith(":"))
        if lines:
            data = lines["data"]
            found.append((lines.get("id"), data if data == "[DONE]" else json.loads(data)))
    return found


def said(events: list[tuple[str | None, Any]]) -> str:
    deltas = (event["choices"][0]["delta"] for _, event in events if event != "[DONE]" and event["choices"])
    return "".join(delta.get("content") or "" for delta in deltas)


def tokens(events: list[tuple[str | None, Any]]) -> list[int]:
    choices = (event["choices"][0] for _, event in events if event != "[DONE]" and event["choices"])
    return [one for choice in choices for one in choice["token_ids"]]


async def stream(client: aiohttp.ClientSession, last: str | None = None, **more: Any) -> list[tuple[str | None, Any]]:
    headers = KEY if last is None else {**KEY, "Last-Event-ID": last}
    async with client.post(PATH, json={**ASK, "stream": True, **more}, headers=headers) as response:
        assert response.status == 200, await response.text()
        return parsed(await response.text())


async def whole(client: aiohttp.ClientSession, **more: Any) -> Any:
    async with client.post(PATH, json={**ASK, **more}, headers=KEY) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_the_same_answer_comes_again_without_computing(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    first = await stream(client, return_token_ids=True)
    assert await stream(client, return_token_ids=True) == first, "the same id, time, tokens and events"
    answer = await whole(client, return_token_ids=True)
    assert answer["choices"][0]["message"]["content"] == household.reply == said(first)
    assert answer["choices"][0]["token_ids"] == [*household.ids(household.reply), END]
    assert answer["id"] == first[0][1]["id"]
    assert len(household.requests) == 1


async def test_without_a_key_events_have_no_ids_and_answers_are_not_kept(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    for _ in range(2):
        async with client.post(PATH, json={**ASK, "stream": True}) as response:
            assert {number for number, _ in parsed(await response.text())} == {None}
    assert len(household.requests) == 2


@pytest.mark.parametrize("stop", [None, "🏡!", "dd"])
async def test_a_stream_goes_on_after_every_event(
    client: aiohttp.ClientSession, household: FakeHousehold, stop: str | None
) -> None:
    household.reply = "Hello, wörld 🏡! Hello"
    more: Any = {"return_token_ids": True, "stream_options": {"include_usage": True}} | ({"stop": stop} if stop else {})
    household.pace_s = 0.001
    all_events = await stream(client, **more)
    numbers = [number for number, _ in all_events]
    assert numbers[0] == "0" and numbers[-3:] == ["end", None, None] and len(numbers) > 8
    for index, number in enumerate(numbers[:-2]):
        rest = await stream(client, number, **more)
        assert (number != "end") or len(rest) == 2, "its usage, and [DONE]"
        assert said(rest) == said(all_events[index + 1 :]), f"after {number}"
        assert tokens(rest) == tokens(all_events[index + 1 :]), f"after {number}"
        assert rest[-2:] == all_events[-2:] and rest[0][1]["id"] == all_events[0][1]["id"]
    assert len(household.requests) == 1


async def test_a_stream_goes_on_within_what_was_one_event(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    """As another device may have cut it: by tokens, not by events."""
    household.reply = "Hello, wörld 🏡!"
    await whole(client)
    ids = household.ids(household.reply)
    for count in range(len(ids) + 1):
        so_far = household.tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert so_far + said(await stream(client, str(count))) == household.reply


async def test_who_attaches_midway_hears_it_live(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.middle = asyncio.Event()
    body = {**ASK, "stream": True}
    async with (
        client.post(PATH, json=body, headers=KEY) as first,
        client.post(PATH, json=body, headers={**KEY, "Last-Event-ID": "2"}) as second,
    ):
        async with asyncio.timeout(BOUND_S):
            assert b"id: 4\n" in await second.content.readuntil(b"\n\n")
        household.middle.set()
        one, two = parsed(await first.text()), parsed(await second.text())
    assert said(one) == household.reply
    assert said(two) == household.reply[4:] and two[-2:] == one[-2:]
    assert len(household.requests) == 1


async def test_both_may_ask_before_the_model_serves(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.served = []
    household.watched.clear()
    asking = [asyncio.create_task(whole(client)) for _ in range(3)]
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    household.served = [household.model]
    household.touch()
    answers = await asyncio.wait_for(asyncio.gather(*asking), BOUND_S)
    assert answers[0] == answers[1] == answers[2] and len(household.requests) == 1


async def leave_midway(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.middle = asyncio.Event()
    async with client.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response:
        while b"id: 4\n" not in await response.content.readuntil(b"\n\n"):
            pass


async def test_it_is_computed_on_when_its_client_is_gone(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    await leave_midway(client, household)
    assert household.middle is not None
    household.middle.set()
    await asyncio.wait_for(household.closed.wait(), BOUND_S)
    assert household.produced == len(household.ids(household.reply))
    assert said(await stream(client, "4")) == household.reply[4:] and len(household.requests) == 1


async def test_alone_it_ends_after_a_while(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "ALONE_S", 0.05)
    await leave_midway(client, household)
    await asyncio.wait_for(household.closed.wait(), BOUND_S)
    household.middle = None
    async with client.post(PATH, json={**ASK, "stream": True}, headers={**KEY, "Last-Event-ID": "4"}) as response:
        error = (await response.json())["error"]
    assert response.status == 409 and "not kept" in error["message"]
    assert said(await stream(client)) == household.reply and len(household.requests) == 2


async def test_who_comes_back_in_time_keeps_it_going(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "ALONE_S", 0.1)
    await leave_midway(client, household)
    async with client.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response:
        await response.content.readuntil(b"\n\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(household.closed.wait(), 0.3)
        assert household.middle is not None
        household.middle.set()
        assert (await response.text()).endswith("[DONE]\n\n")


async def test_a_finished_answer_is_kept_for_a_while(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "KEPT_S", 0.01)
    first = await whole(client)
    async with asyncio.timeout(BOUND_S):
        while (await whole(client))["id"] == first["id"]:
            pass
    assert len(household.requests) > 1


async def test_another_body_under_the_same_key_is_422(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    await whole(client)
    for other in ({"max_tokens": 3}, {"temperature": 0}, {"messages": [{"role": "user", "content": "ho"}]}):
        for stream_too in (True, False):
            async with client.post(PATH, json={**ASK, **other, "stream": stream_too}, headers=KEY) as response:
                assert response.status == 422
                assert "another body" in (await response.json())["error"]["message"]
    assert len(household.requests) == 1


@pytest.mark.parametrize("headers", [
    {"Idempotency-Key": ""}, {"Idempotency-Key": "x" * 256}, {"Last-Event-ID": "x"}, {**KEY, "Last-Event-ID": "-1"},
    {**KEY, "Last-Event-ID": "9" * 11}, {**KEY, "Last-Event-ID": "END"}, {**KEY, "Last-Event-ID": ""},
])  # fmt: skip
async def test_headers_that_cannot_be_used(
    client: aiohttp.ClientSession, household: FakeHousehold, headers: dict[str, str]
) -> None:
    async with client.post(PATH, json=ASK, headers=headers) as response:
        assert response.status == 400 and (await response.json())["error"]["param"] in headers
    assert not household.requests


@pytest.mark.parametrize("route", ["chat", "generate"])
async def test_a_key_that_cannot_be_used_is_refused_also_where_a_model_is_loaded(
    client: aiohttp.ClientSession, route: str
) -> None:
    async with client.post(f"/api/{route}", json={"model": "builtin"}, headers={"Idempotency-Key": "é"}) as response:
        assert response.status == 400 and "Idempotency-Key" in (await response.json())["error"]


async def test_an_answer_that_failed_is_computed_anew(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    events = await stream(client)
    assert "jetson died" in events[-1][1]["error"]["message"]
    household.error_midway = None
    assert said(await stream(client)) == household.reply and len(household.requests) == 2


async def test_a_refusal_keeps_its_status_and_is_not_kept(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    async with client.post(PATH, json={**ASK, "messages": [{"role": "user", "content": "x" * 999}]}, headers=KEY) as no:
        assert no.status == 400 and (await no.json())["error"]["code"] == "context_length_exceeded"
    household.error_at_once = EngineError("no engine")
    async with client.post(PATH, json=ASK, headers=KEY) as no:
        assert no.status == 503
    household.error_at_once = None
    assert (await whole(client))["choices"]


async def ask(client: aiohttp.ClientSession, key: str, user: str = "") -> int:
    body = {**ASK, "user": user} if user else ASK
    async with client.post(PATH, json=body, headers={"Idempotency-Key": key}) as response:
        await response.read()
        return response.status


async def test_answers_are_bounded_for_each_client_and_for_all(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "MAX_KEPT_OF_CLIENT", 2)
    monkeypatch.setattr(answer_store, "MAX_KEPT", 3)
    for key, user in (("b1", "bert"), ("a1", "anna"), ("a2", "anna"), ("a3", "anna")):
        assert await ask(client, key, user) == 200
    computed = len(household.requests)
    for key, user, again in (("a2", "anna", 0), ("b1", "bert", 0), ("a1", "anna", 1)):
        assert await ask(client, key, user) == 200
        assert len(household.requests) == computed + again, key
    for key, user in (("c1", "carl"), ("d1", "dora"), ("b1", "bert")):
        assert await ask(client, key, user) == 200
    assert len(household.requests) == computed + 4, "the oldest of all made way"


async def test_answers_under_way_do_not_make_way(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "MAX_KEPT_OF_CLIENT", 1)
    household.middle = asyncio.Event()
    first = asyncio.create_task(ask(client, "a1"))
    await asyncio.wait_for(household.asked.wait(), BOUND_S)
    assert await ask(client, "a2") == 429
    household.middle.set()
    assert await asyncio.wait_for(first, BOUND_S) == 200
    assert await ask(client, "a2") == 200


async def test_the_tokens_of_finished_answers_are_bounded(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = len(household.ids(household.reply)) + 1
    monkeypatch.setattr(answer_store, "MAX_KEPT_TOKENS", 2 * tokens)
    for key in ("1", "2", "3"):
        await ask(client, key)
    assert [await ask(client, "3"), await ask(client, "2"), len(household.requests)] == [200, 200, 3]
    await ask(client, "1")
    assert len(household.requests) == 4


async def test_a_stop_string_ends_what_is_computed(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.reply = "one two three four"
    assert said(await stream(client, stop="three")) == "one two "
    await asyncio.wait_for(household.closed.wait(), BOUND_S)
    assert household.produced == len("one two three")


async def test_closing_ends_what_nobody_reads(
    client: aiohttp.ClientSession, household: FakeHousehold, server: Any
) -> None:
    await leave_midway(client, household)
    await server.close()
    assert household.closed.is_set()


def test_the_order_of_a_schema_makes_no_other_answer() -> None:
    one, other = (
        generation.Generation(model="m", prompt="p", answer_form=generation.AnswerForm("schema", schema))
        for schema in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert repeat.fingerprint(one) == repeat.fingerprint(other)


async def test_it_can_be_read_through_another_api(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    first = await whole(client)
    async with client.post("/api/chat", json={**ASK, "stream": False}, headers=KEY) as response:
        assert (await response.json())["message"]["content"] == first["choices"][0]["message"]["content"]
    async with client.post("/v1/messages", json={**ASK, "max_tokens": 9}, headers=KEY) as response:
        assert response.status == 422
    assert len(household.requests) == 1


async def test_an_address_that_makes_up_persons_leaves_others_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "MAX_KEPT", 5)
    monkeypatch.setattr(answer_store, "MAX_KEPT_OF_ASKER", 4)
    store = answer_store.AnswerStore()

    async def begin() -> Any:
        await asyncio.Event().wait()

    for number in range(4):
        store.begin(f"k{number}", b"", f"127.0.0.1/{number}", begin())
    with pytest.raises(OverloadedError):
        store.begin("more", b"", "127.0.0.1/4", begin())
    assert store.begin("other", b"", "a" * 64, begin())
    for _ in range(3):  # until all have begun
        await asyncio.sleep(0)
    await store.close()
