"""/v1/completions and several answers to one request, with the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from peerllm.api.core import several_answers
from peerllm.api.server import ApiServer
from peerllm.errors import EngineError
from tests.api.fake import BOUND_S, CONTEXT, END, FakeHousehold

PATH = "/v1/completions"
ASK: Any = {"model": "builtin", "prompt": "Once upon"}
CHAT: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def ai(server: ApiServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_text_is_continued_as_it_is(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    answer = await ai.completions.create(**ASK, max_tokens=100)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.object) == (household.reply, "stop", "text_completion")
    assert household.tokenizer.decode(household.requests[0].prompt, skip_special_tokens=False) == "Once upon"
    assert answer.usage is not None and answer.usage.prompt_tokens == len("Once upon")


async def test_it_is_streamed_with_usage(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    stream = await ai.completions.create(**ASK, max_tokens=100, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == household.reply
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(household.ids(household.reply)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_sixteen_tokens_where_nothing_is_said(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.reply = "x" * 100
    answer = await ai.completions.create(**ASK)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")


@pytest.mark.parametrize("stream", [True, False])
async def test_the_prompt_comes_first_where_it_is_wanted(
    ai: openai.AsyncOpenAI, household: FakeHousehold, stream: bool
) -> None:
    made: Any = await ai.completions.create(**ASK, max_tokens=5, echo=True, stream=stream)
    text = "".join([chunk.choices[0].text async for chunk in made]) if stream else made.choices[0].text
    assert text == "Once upon" + household.reply[:5]


async def test_token_ids_are_a_prompt_too(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async with client.post(PATH, json={**ASK, "prompt": [END, 65, 66], "return_token_ids": True}) as response:
        answer = await response.json()
    assert household.requests[0].prompt == [END, 65, 66]
    assert answer["choices"][0]["token_ids"] == household.ids(household.reply)[:16]


async def test_each_prompt_has_its_answers(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    answer = await ai.completions.create(model="builtin", prompt=["a", "bcd"], n=2, seed=7, max_tokens=100, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[: -len(household.reply)] for choice in answer.choices] == ["a", "a", "bcd", "bcd"]
    assert answer.usage is not None
    said = 4 * (len(household.ids(household.reply)) + 1)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1 + 3, said)
    assert sorted((len(one.prompt), one.sampling.seed) for one in household.requests) == [
        (1, 7),
        (1, 8),
        (3, 7),
        (3, 8),
    ]


async def test_an_empty_prompt_is_said_to_be_empty(client: aiohttp.ClientSession) -> None:
    for prompt in ("", []):
        async with client.post(PATH, json={"model": "builtin", "prompt": prompt}) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, None), error
            assert "empty" in error["message"] or "length >= 1" in error["message"]


async def test_several_answers_are_streamed_side_by_side(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    texts = {0: "", 1: "", 2: ""}
    roles, finished = [], []
    async for chunk in await ai.chat.completions.create(**CHAT, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        finished += [choice.index] if choice.finish_reason else []
    assert set(texts.values()) == {household.reply}
    assert sorted(roles) == sorted(finished) == [0, 1, 2]
    assert len({one.sampling.seed for one in household.requests}) == 3, "without a seed they differ by chance"


async def test_one_that_fails_ends_all(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    async with client.post("/v1/chat/completions", json={**CHAT, "n": 2}) as response:
        assert response.status == 503 and "jetson died" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_ends_all(client: aiohttp.ClientSession, household: FakeHousehold, stream: bool) -> None:
    household.gate, ended = asyncio.Event(), 0
    generate = household.generate

    async def counted(request: Any) -> Any:
        nonlocal ended
        try:
            async for chunk in generate(request):
                yield chunk
        finally:
            ended += 1

    household.generate = counted  # type: ignore[method-assign]
    asking = asyncio.create_task(client.post(PATH, json={**ASK, "n": 3, "stream": stream}))
    async with asyncio.timeout(BOUND_S):
        while len(household.requests) < 3:
            household.asked.clear()
            await household.asked.wait()
        asking.cancel()
        while ended < 3:
            household.closed.clear()
            await household.closed.wait()


async def test_several_answers_under_one_key_are_kept_but_not_resumed(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    headers = {"Idempotency-Key": "k"}
    found = []
    for _ in range(2):
        async with client.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=headers) as response:
            found.append(await response.json())
    assert found[0] == found[1] and len(household.requests) == 2
    headers["Last-Event-ID"] = "3"
    async with client.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=headers) as response:
        assert response.status == 400 and "cannot be resumed" in (await response.json())["error"]["message"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [5000]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [65] * CONTEXT}, "prompt"),
    ({"prompt": "x" * CONTEXT}, "prompt"),
    ({"prompt": ["x"] * (several_answers.MAX_ANSWERS + 1)}, "prompt"),
    ({"prompt": ["x"] * 9, "n": 2}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 0, "echo": True}, "echo"),
    ({"prompt": [65], "echo": True}, "echo"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("more", "param"), WRONG, ids=[f"{i}-{param}" for i, (_, param) in enumerate(WRONG)])
async def test_the_offending_field_is_named(
    client: aiohttp.ClientSession, household: FakeHousehold, more: dict[str, Any], param: str
) -> None:
    async with client.post(PATH, data=json.dumps({**ASK, **more}), headers={"Content-Type": "application/json"}) as no:
        error = (await no.json())["error"]
    assert (no.status, error["param"]) == (400, param), error
    assert not household.requests
