"""Log probabilities in every API that has them: of the words that are told, and of nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import ollama
import openai
import pytest

from peerllm.api.core import telling
from peerllm.api.core.kept.kept_answer import KeptAnswer
from peerllm.api.openai.completion_answers import CompletionAnswers
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.server import ApiServer
from peerllm.api.text.calls.answer_parts import ToldToken
from peerllm.daemon.facade import InheritedAnswer
from peerllm.logprobs import packed
from tests.api import templates
from tests.api.fake import BOUND_S, FakeHousehold, chances, make_model_dir
from tests.api.relay_pair import Pair
from tests.api.test_inherited_answers import begun, left
from tests.api.test_kept_answers import KEY, PATH, parsed, whole
from tests.api.test_moved_answers import MOVED
from tests.api.test_reasoning import REPLY, SAID, THINKING
from tests.api.test_tools import CALLS, OPENAI, TEMPLATE, with_marks

HI: Any = [{"role": "user", "content": "hi"}]
ASK: Any = {"model": "builtin", "messages": HI, "logprobs": True, "top_logprobs": 2}


@pytest.fixture
async def ai(server: ApiServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


def expected(household: FakeHousehold, text: str, start: int = 0, top: int = 2) -> list[Any]:
    """Of the tokens, which are bytes, of a text that begins at this place of an answer."""
    found = []
    for place, data in enumerate(text.encode(), start):
        (token,) = (number for number in range(256) if household.bytes_of(number) == bytes([data]))
        others = [((token + 1 + at) % 257, -(at + 1) / 8) for at in range(top)]
        entries = [entry(household.bytes_of(one), value) for one, value in others]
        found.append({**entry(bytes([data]), -(place + 1) / 16), "top_logprobs": entries})
    return found


def entry(data: bytes, logprob: float) -> dict[str, Any]:
    token = data.decode() if len(data) > 1 or data < b"\x80" else f"\\x{data[0]:02x}"
    return {"token": token, "logprob": logprob, "bytes": list(data)}


def told(events: Sequence[tuple[str | None, Any]]) -> list[Any]:
    """What a stream of a chat tells of its first answer's tokens."""
    choices = [event["choices"][0] for _, event in events if event != "[DONE]" and event["choices"]]
    for one in choices:
        if one["logprobs"] is not None:
            assert one["delta"].get("content") is not None and one["logprobs"]["refusal"] is None
    return [each for one in choices if one["logprobs"] for each in one["logprobs"]["content"]]


async def stream(client: aiohttp.ClientSession, last: str | None = None, **more: Any) -> list[tuple[str | None, Any]]:
    headers = KEY if last is None else {**KEY, "Last-Event-ID": last}
    async with client.post(PATH, json={**ASK, "stream": True, **more}, headers=headers) as response:
        assert response.status == 200, await response.text()
        return parsed(await response.text())


async def test_a_chat_has_those_of_its_text_whole_and_streamed(
    ai: openai.AsyncOpenAI, household: FakeHousehold
) -> None:
    answer = (await ai.chat.completions.create(**ASK)).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    content = [one.model_dump() for one in answer.logprobs.content]
    assert content == expected(household, household.reply)
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == answer.message.content == household.reply
    assert [one["token"] for one in content][7:10] == ["w", "\\xc3", "\\xb6"]
    pieces = []
    async for chunk in await ai.chat.completions.create(**ASK, stream=True):
        logprobs = chunk.choices[0].logprobs
        pieces += [one.model_dump() for one in (logprobs.content or [] if logprobs else [])]
    assert pieces == content
    async with ai.chat.completions.stream(**ASK) as events:
        final = (await events.get_final_completion()).choices[0].logprobs
    assert final is not None and [one.model_dump() for one in final.content or ()] == content
    assert [one.logprobs for one in household.requests] == [2, 2, 2]


async def test_without_alternatives_and_without_being_asked(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    asked: Any = {"model": "builtin", "messages": HI}
    answer = (await ai.chat.completions.create(**asked, logprobs=True)).choices[0].logprobs
    assert answer is not None
    assert [one.model_dump() for one in answer.content or ()] == expected(household, household.reply, top=0)
    for more in ({}, {"logprobs": False}):
        assert (await ai.chat.completions.create(**asked, **more)).choices[0].logprobs is None
        assert household.requests[-1].logprobs is None
    async for chunk in await ai.chat.completions.create(**asked, stream=True):
        assert chunk.choices[0].logprobs is None


@pytest.mark.parametrize("stop", ["wör", "ö", "🏡!", "lo, w", "zzz"])
async def test_of_a_stop_string_there_are_none(
    client: aiohttp.ClientSession, household: FakeHousehold, stop: str
) -> None:
    kept = household.reply.partition(stop)[0]
    assert told(await stream(client, stop=[stop])) == expected(household, kept)


async def test_several_answers_have_their_own(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    for choice in (await ai.chat.completions.create(**ASK, n=3)).choices:
        assert choice.logprobs is not None
        assert [one.model_dump() for one in choice.logprobs.content or ()] == expected(household, household.reply)


async def test_a_text_that_is_continued(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    asked: Any = {"model": "builtin", "prompt": "Say", "logprobs": 1, "max_tokens": 50}
    choice = (await ai.completions.create(**asked)).choices[0]
    found = choice.logprobs
    assert found is not None and choice.text == household.reply
    known = expected(household, household.reply, top=1)
    names = [one["token"].replace("\\x", "bytes:\\x") for one in known]
    assert found.tokens == names and found.token_logprobs == [one["logprob"] for one in known]
    assert found.text_offset == [at for at, one in enumerate(household.reply) for _ in one.encode()]
    assert found.top_logprobs is not None
    for name, one, others in zip(names, known, found.top_logprobs, strict=True):
        (other,) = one["top_logprobs"]
        assert others == {other["token"].replace("\\x", "bytes:\\x"): -0.125, name: one["logprob"]}
    parts: dict[str, list[Any]] = {}
    async for chunk in await ai.completions.create(**asked, stream=True):
        for field, values in chunk.choices[0].logprobs or ():
            parts.setdefault(field, []).extend(values)
    assert parts == found.model_dump()
    bare = (await ai.completions.create(**{**asked, "logprobs": 0})).choices[0].logprobs
    assert bare is not None and bare.top_logprobs is not None
    assert bare.top_logprobs == [{name: one["logprob"]} for name, one in zip(names, known, strict=True)]


async def test_ollama(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    more: Any = {"model": "builtin", "logprobs": True, "top_logprobs": 2}
    known = [(one["token"], one["logprob"], len(one["top_logprobs"])) for one in expected(household, household.reply)]

    def seen(found: Any) -> list[Any]:
        return [(one.token, one.logprob, len(one.top_logprobs)) for one in found or ()]

    assert seen((await lama.chat(messages=HI, **more)).logprobs) == known
    assert seen((await lama.generate(prompt="hi", **more)).logprobs) == known
    for asked in (lama.chat(messages=HI, stream=True, **more), lama.generate(prompt="hi", stream=True, **more)):
        lines = [line async for line in await asked]
        assert [one for line in lines for one in seen(line.logprobs)] == known
    raw = await lama.generate(prompt="hi", raw=True, **{**more, "top_logprobs": None})
    assert seen(raw.logprobs) == [(token, logprob, 0) for token, logprob, _ in known]
    assert (await lama.chat(messages=HI, model="builtin", top_logprobs=2)).logprobs is None
    with pytest.raises(ollama.ResponseError, match="top_logprobs"):
        await lama.chat(messages=HI, **{**more, "top_logprobs": 21})


class TestThinking:
    @pytest.fixture
    async def household(self, tmp_path: Path) -> FakeHousehold:
        made = FakeHousehold(make_model_dir(tmp_path / "thinker", TEMPLATE + THINKING))
        made.reply = REPLY
        return made

    async def test_what_is_thought_has_none(self, client: aiohttp.ClientSession, household: FakeHousehold) -> None:
        known = expected(household, SAID, len(REPLY.encode()) - len(SAID.encode()))
        assert told(await stream(client)) == known
        choice = (await whole(client, logprobs=True, top_logprobs=2))["choices"][0]
        assert choice["message"]["reasoning_content"] and choice["logprobs"]["content"] == known


class TestCalls:
    @pytest.fixture
    async def household(self, tmp_path: Path) -> FakeHousehold:
        made = with_marks(tmp_path / "hermes", templates.HERMES, ())
        made.reply = f"So é.\n{CALLS}\nNext <tool_ca"
        return made

    async def test_calls_have_none(self, client: aiohttp.ClientSession, household: FakeHousehold) -> None:
        events = await stream(client, tools=OPENAI, return_token_ids=True)
        said = [
            *expected(household, "So é."),
            *expected(household, "Next <tool_ca", len(household.reply.encode()) - 13),
        ]
        assert told(events) == said
        choice = (await whole(client, tools=OPENAI, return_token_ids=True, logprobs=True, top_logprobs=2))["choices"][0]
        assert choice["logprobs"]["content"] == said and len(choice["message"]["tool_calls"]) == 2
        for number in [number for number, _ in events if number not in (None, "end")][::7]:
            after = [number for number, _ in events].index(number) + 1
            rest = await stream(client, number, tools=OPENAI, return_token_ids=True)
            assert told(rest) == told(events[after:]), number

    async def test_a_call_alone_has_none(self, ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
        household.reply = CALLS
        assert (await ai.chat.completions.create(**ASK, tools=OPENAI)).choices[0].logprobs is None


async def test_a_kept_answer_has_them_too(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    known = expected(household, household.reply)
    events = await stream(client)
    again = await stream(client)
    assert told(events) == told(again) == known
    assert max(len(told([one])) for one in again) == 4, "the bytes of one character"
    assert told(await stream(client, "9")) == known[8:], "of which the ninth was half of a character"
    for at, (number, _) in enumerate(events[:-1]):
        assert told(await stream(client, number)) == told(events[at + 1 :])
    assert (await whole(client, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"] == known
    assert len(household.requests) == 1
    async with client.post(PATH, json={**ASK, "top_logprobs": 1}, headers=KEY) as response:
        assert response.status == 422


@pytest.mark.parametrize("copied", ["all", "too few", "junk", "another's", "none"])
async def test_another_device_goes_on_with_them(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any, copied: str
) -> None:
    there, heir = successor
    more: Any = {"logprobs": True, "top_logprobs": 2}
    had = await begun(client, household, **more)
    ids = household.ids(household.reply)[:3]
    copies = [one for place, token in enumerate(ids) for one in chances(token, place, 2)]
    copies = {"too few": copies[:2], "junk": [*copies[:2], b"1234567"], "another's": copies[::-1], "none": []}.get(
        copied, copies
    )
    heir.inherit(replace(left(household, ids), logprobs=copies))
    async with there.post(PATH, json={**ASK, "stream": True}, headers={**KEY, "Last-Event-ID": "4"}) as response:
        rest = parsed(await response.text())
    assert told(had) + told(rest) == expected(household, household.reply)
    assert told(await stream(there)) == expected(household, household.reply), "from the first on"
    (asked,) = heir.requests
    assert (list(asked.answer), asked.logprobs) == (ids if copied == "all" else [], 2)
    assert list(asked.known_logprobs) == (copies if copied == "all" else [])


async def test_ids_that_are_known_without_them_are_enough_where_nobody_asked(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    await begun(client, household)
    ids = household.ids(household.reply)[:3]
    heir.inherit(replace(left(household, ids), logprobs=[b"junk"]))
    assert (await whole(there))["choices"][0]["logprobs"] is None
    assert heir.requests[0].answer == ids


async def test_another_device_relays_them(pair: Pair) -> None:
    known = expected(pair.laptop, pair.laptop.reply)
    for body in (ASK, {**ASK, "stream": True}):
        async with pair.session.post(PATH, json=body) as response:
            text = await response.text()
        found = told(parsed(text)) if "stream" in body else json.loads(text)["choices"][0]["logprobs"]["content"]
        assert found == known


async def test_an_answer_that_moves_tells_each_once(pair: Pair) -> None:
    mini, laptop = pair.mini, pair.laptop
    mini.served, mini.middle = [mini.model], asyncio.Event()
    mini.error_midway = MOVED
    async with (
        asyncio.timeout(BOUND_S),
        pair.session.post(PATH, json={**ASK, "stream": True}) as response,
    ):
        text = b""
        while text.count(b'"token"') < 4 * 3:
            text += await response.content.readuntil(b"\n\n")
        asked = mini.requests[0]
        sampled = asked.prompt, asked.max_tokens, asked.sampling, asked.client, asked.kept
        laptop.inherit(InheritedAnswer(asked.deployment, *sampled, []))
        mini.served = [pair.elsewhere()]
        mini.middle.set()
        text += await response.content.read()
    assert told(parsed(text.decode())) == expected(laptop, laptop.reply)


async def test_they_count_where_answers_are_bounded(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = household.ids(household.reply)
    kept = KeptAnswer("", b"", "", ids=ids, logprobs=[packed([(1, -0.5)] * 3)] * len(ids))
    assert (kept.size, KeptAnswer("", b"", "", ids=ids).size) == (4 * len(ids), len(ids))
    monkeypatch.setattr(telling, "MAX_WHOLE_CHARS", 2000)
    async with client.post(PATH, json=ASK) as response:
        assert response.status == 503 and "more than 2000" in await response.text()
    async with client.post(PATH, json={"model": "builtin", "messages": HI}) as response:
        assert response.status == 200


def test_of_tokens_that_look_the_same_the_likeliest_is_told() -> None:
    answers = CompletionAnswers(CompletionBody(model="m", prompt="x"))
    token = ToldToken(b"a", -3.0, 0, ((b"a", -1.0), (b"b", -2.0)))
    assert answers.logprobs([token])["top_logprobs"] == [{"a": -1.0, "b": -2.0}]
