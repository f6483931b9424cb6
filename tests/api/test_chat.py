"""The chat route, with the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest

from peerllm.api import streams
from peerllm.api.core import model_wait, own_answer
from peerllm.api.server import ApiServer
from peerllm.errors import EngineError, LinkError, OverloadedError, UnavailableError
from tests.api.fake import BOUND_S, CONTEXT, END, FakeHousehold

PATH = "/v1/chat/completions"
ASK: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def ai(server: ApiServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def raw_events(client: aiohttp.ClientSession, **more: Any) -> list[str]:
    async with client.post(PATH, json={**ASK, "stream": True, **more}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        text = await response.text()
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


async def test_whole_answer(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    answer = await ai.chat.completions.create(**ASK, seed=7, temperature=0, max_tokens=100)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", household.reply)
    assert choice.finish_reason == "stop"
    ids = len(household.ids(household.reply))
    request = household.requests[0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(request.prompt), ids + 1)
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (100, 0.0, 7)
    prompt = household.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    assert prompt == "<s><|user|>hi<|end|>\n<|assistant|>"


async def test_streamed_answer(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    stream = await ai.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    first, last, usage = chunks[0], chunks[-2], chunks[-1]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert (last.choices[0].delta.content, last.choices[0].delta.role, last.choices[0].finish_reason) == (
        None,
        None,
        "stop",
    )
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == household.produced + 1
    assert all(chunk.usage is None and chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == household.reply


async def test_usage_tells_what_of_the_prompt_was_not_computed_anew(
    ai: openai.AsyncOpenAI, household: FakeHousehold
) -> None:
    household.reused = 5
    answer = await ai.chat.completions.create(**ASK)
    stream = await ai.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    last = [chunk async for chunk in stream][-1]
    for usage in (answer.usage, last.usage):
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 5


async def test_stream_ends_with_done_and_no_usage_unless_asked(client: aiohttp.ClientSession) -> None:
    events = await raw_events(client)
    assert events[-1] == "data: [DONE]"
    assert "usage" not in json.loads(events[-2].removeprefix("data: "))


async def test_token_ids_on_request(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    expected = [*household.ids(household.reply), END]
    events = await raw_events(client, return_token_ids=True)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert [one for chunk in chunks for one in chunk["choices"][0]["token_ids"]] == expected
    async with client.post(PATH, json={**ASK, "return_token_ids": True}) as response:
        assert (await response.json())["choices"][0]["token_ids"] == expected


async def test_length(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    answer = await ai.chat.completions.create(**ASK, max_completion_tokens=5, max_tokens=9)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "length")


async def test_max_tokens_is_clamped_to_the_context(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    await ai.chat.completions.create(**ASK, max_tokens=10**9)
    await ai.chat.completions.create(**ASK)
    assert {one.max_tokens for one in household.requests} == {CONTEXT - len(household.requests[0].prompt)}


async def test_a_prompt_longer_than_the_context_is_refused(client: aiohttp.ClientSession) -> None:
    body = {"model": "builtin", "messages": [{"role": "user", "content": "x" * CONTEXT}]}
    async with client.post(PATH, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "context_length_exceeded")
    assert str(CONTEXT) in error["message"]


async def test_a_prompt_may_leave_room_for_one_token(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async def ask(characters: int) -> int:
        messages = [{"role": "user", "content": "x" * characters}]
        async with client.post(PATH, json={"model": "builtin", "messages": messages}) as response:
            return response.status

    await ask(1)
    most = CONTEXT - len(household.requests[0].prompt)  # a token a character, and one for the answer
    assert [await ask(most), await ask(most + 1)] == [200, 400]
    assert household.requests[-1].max_tokens == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_strings_across_tokens_cancel_the_rest(
    ai: openai.AsyncOpenAI, household: FakeHousehold, stream: bool
) -> None:
    household.reply = "one two three four"
    made = await ai.chat.completions.create(**ASK, stop=["three", "zzz"], stream=stream)
    if stream:
        chunks = [chunk async for chunk in made]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (text, reason) == ("one two ", "stop")
    await asyncio.wait_for(household.closed.wait(), BOUND_S)
    assert household.produced == len("one two three")


async def test_a_text_that_only_looked_like_a_stop_comes_out(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.reply = "one two thr"
    answer = await ai.chat.completions.create(**ASK, stop="three")
    assert answer.choices[0].message.content == "one two thr"


async def test_sampling_defaults_come_from_the_model(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    (household.model.model_dir / "generation_config.json").write_text(
        json.dumps({"temperature": 1.0, "top_k": 20, "min_p": "high", "repetition_penalty": 1e9})
    )
    await ai.chat.completions.create(**ASK)
    await ai.chat.completions.create(**ASK, top_p=0.5)
    sampling = household.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0.95, 20, 0.0)
    assert sampling.repetition_penalty == 1.0
    assert household.requests[1].sampling.top_p == 0.5


async def test_where_the_model_is_silent_sampling_is_moderate_and_seeds_differ(
    ai: openai.AsyncOpenAI, household: FakeHousehold
) -> None:
    for said in ({}, {}, {"temperature": 1, "top_p": 1}):
        await ai.chat.completions.create(**ASK, **said)
    asked = [(one.sampling.temperature, one.sampling.top_p) for one in household.requests]
    assert asked == [(0.7, 0.95), (0.7, 0.95), (1.0, 1.0)]
    assert household.requests[0].sampling.seed != household.requests[1].sampling.seed


async def test_text_parts_are_joined_and_developer_is_system(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await ai.chat.completions.create(
        model="builtin",
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None},
        ],
    )
    prompt = household.tokenizer.decode(list(household.requests[0].prompt), skip_special_tokens=False)
    assert prompt == "<s><|system|>d<|end|>\n<|user|>ab<|end|>\n<|assistant|><|end|>\n<|assistant|>"


async def test_a_client_that_leaves_closes_the_generator(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.endless = True
    stream = await ai.chat.completions.create(**ASK, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await asyncio.wait_for(household.closed.wait(), BOUND_S)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_token_closes_it_too(
    client: aiohttp.ClientSession, household: FakeHousehold, stream: bool
) -> None:
    household.gate = asyncio.Event()
    asking = asyncio.create_task(client.post(PATH, json={**ASK, "stream": stream}))
    await asyncio.wait_for(household.asked.wait(), BOUND_S)
    asking.cancel()
    await asyncio.wait({asking})
    await asyncio.wait_for(household.closed.wait(), BOUND_S)


async def test_a_client_that_does_not_read_is_dropped(
    server: ApiServer, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WRITE_TIMEOUT_S", 0.2)
    household.endless = True
    body = json.dumps({**ASK, "stream": True}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    await asyncio.wait_for(household.closed.wait(), 60)
    writer.close()


async def test_keep_alives_and_the_place_in_the_queue(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_answer, "LOOK_S", 0.01)
    monkeypatch.setattr(model_wait, "KEEP_ALIVE_S", 0.02)
    household.gate, household.queued = asyncio.Event(), [3, 2]
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        lines = [await response.content.readuntil(b"\n\n") for _ in range(4)]
        household.gate.set()
        rest = await response.text()
    assert lines == [*[b": queued 2\n\n"] * 4], "of places that change at once the last"
    assert rest.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "a long random one"}])
async def test_who_got_a_slot_has_no_place_in_the_queue(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    monkeypatch.setattr(own_answer, "LOOK_S", 0.01)
    monkeypatch.setattr(model_wait, "KEEP_ALIVE_S", 0.02)
    household.gate, household.queued, household.pace_s = asyncio.Event(), [1, 0], 0.1
    async with client.post(PATH, json={**ASK, "stream": True}, headers=key) as response:
        lines = [await response.content.readuntil(b"\n\n") for _ in range(20)]
        household.gate.set()
    assert lines[0] == b": queued 1\n\n" and lines[-1] == b": working\n\n"
    assert lines == sorted(lines), "its place, and then none"


async def test_an_error_midway_is_an_error_event_and_no_stop(
    ai: openai.AsyncOpenAI, client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.error_midway = EngineError("the engine on jetson died: out of memory")
    seen = []
    stream = await ai.chat.completions.create(**ASK, stream=True)
    with pytest.raises(openai.APIError, match="out of memory"):  # noqa: PT012
        async for chunk in stream:
            seen.append(chunk)
    assert all(chunk.choices[0].finish_reason is None for chunk in seen)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in seen) == "Hell"
    assert not any("[DONE]" in event for event in await raw_events(client))
    with pytest.raises(openai.InternalServerError) as caught:
        await ai.chat.completions.create(**ASK)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("finish", ["error", "cancelled", None])
async def test_a_broken_off_answer_is_never_a_stop(
    ai: openai.AsyncOpenAI, household: FakeHousehold, finish: Any
) -> None:
    household.finish = finish
    with pytest.raises(openai.APIError, match=r"broke off|cancelled"):
        async for _ in await ai.chat.completions.create(**ASK, stream=True):
            pass
    with pytest.raises(openai.InternalServerError):
        await ai.chat.completions.create(**ASK)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_429_with_retry_after(
    client: aiohttp.ClientSession, household: FakeHousehold, stream: bool
) -> None:
    household.error_at_once = OverloadedError("the queue is full: 64 requests wait", 2.3)
    async with client.post(PATH, json={**ASK, "stream": stream}) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert (await response.json())["error"]["type"] == "rate_limit_error"


async def test_a_waiting_model_is_503_with_its_reason(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {"waiting": 0.0})
    household.served = [replace(household.model, state="waiting", reason="jetson is gone; 1.2 GB are missing")]
    async with client.post(PATH, json=ASK) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert "1.2 GB are missing" in (await response.json())["error"]["message"]
    assert not household.requests


async def test_an_unknown_model_is_404_naming_the_others(ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="builtin") as caught:
        await ai.chat.completions.create(model="gpt-9", messages=ASK["messages"])
    assert caught.value.code == "model_not_found"


async def test_a_household_without_models_says_how_to_start_one(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "UNKNOWN_S", 0.01)
    household.served = []
    async with client.post(PATH, json=ASK) as response:
        message = (await response.json())["error"]["message"]
    assert message == "no model 'builtin' here; start one with: peerllm run MODEL"


async def test_shutting_down_midway_is_an_error_event(
    client: aiohttp.ClientSession, household: FakeHousehold, server: ApiServer
) -> None:
    household.endless = True
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await server.close()
        rest = await response.text()
    assert "shutting down" in rest
    assert "[DONE]" not in rest
    assert household.closed.is_set()


async def test_an_unforeseen_error_is_500_without_details(
    client: aiohttp.ClientSession, household: FakeHousehold, caplog: pytest.LogCaptureFixture
) -> None:
    household.error_at_once = RuntimeError("secret detail")
    async with client.post(PATH, json=ASK) as response:
        text = await response.text()
    assert (response.status, response.headers["x-should-retry"]) == (500, "false")
    assert "secret" not in text
    household.error_at_once, household.error_midway = None, RuntimeError("secret detail")
    event = (await raw_events(client))[-1]
    assert "internal error" in event
    assert "secret" not in event
    assert "hi" not in [word for record in caplog.records for word in record.getMessage().split()]


async def test_models(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.served = [
        household.model,
        replace(household.model, name="name", model="org/name"),
        replace(household.model, name="x", state="failed"),
    ]
    assert [one.id async for one in ai.models.list()] == ["builtin", "name"]
    assert (await ai.models.retrieve("builtin")).owned_by == "peerllm"
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve("gpt-9")


async def test_model_names_with_a_slash(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.served = [household.model, replace(household.model, name="name", model="org/name", created=1)]
    for known in ("org/name", "name"):
        async with client.get(f"/v1/models/{known}") as response:
            found = await response.json()
        assert (found["id"], found["model"]) == ("name", "org/name")
        async with client.post(PATH, json={**ASK, "model": known}) as response:
            assert (await response.json())["model"] == "name"


async def test_many_at_once(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    answers = await asyncio.gather(*(ai.chat.completions.create(**ASK) for _ in range(16)))
    assert {answer.choices[0].message.content for answer in answers} == {household.reply}


async def test_unavailable_at_once_is_503(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.error_at_once = UnavailableError("the model is being stopped")
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        assert response.status == 503


async def test_a_broken_link_is_503_and_may_be_asked_again(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.error_at_once = LinkError("the link to jetson broke")
    async with client.post(PATH, json=ASK) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "5"
        error = (await response.json())["error"]
    assert (error["message"], error["type"]) == ("the link to jetson broke", "server_error")
