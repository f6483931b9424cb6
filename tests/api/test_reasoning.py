"""What a model thinks before it answers comes apart from the answer, in every API."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import ollama
import openai
import pytest

from peerllm.api.server import ApiServer
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.chat_templates import MARKS, marks_of
from tests.api.fake import TEMPLATE, FakeHousehold, make_model_dir
from tests.api.test_inherited_answers import left
from tests.api.test_kept_answers import KEY, parsed, whole

THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
ASK: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}
THOUGHT, SAID = "Hm, a greeting.", "Hello, wörld!"
REPLY = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"


@pytest.fixture
async def household(tmp_path: Path) -> FakeHousehold:
    """Its model thinks, if it is not told not to."""
    made = FakeHousehold(make_model_dir(tmp_path / "thinker", TEMPLATE + THINKING))
    made.reply = REPLY
    return made


def split(text: str, opened: bool = False, cuts: list[int] | None = None) -> tuple[str, str]:
    splitter, thought, said = ReasoningSplitter(MARKS[0], opened), "", ""
    places = [0, *sorted(cuts if cuts is not None else range(len(text))), len(text)]
    for start, end in itertools.pairwise(places):
        more, answer = splitter.push(text[start:end])
        assert not more or not said, "no thought comes behind the answer"
        thought, said = thought + more, said + answer
    more, answer = splitter.flush()
    return thought + more, said + answer


@pytest.mark.parametrize(
    ("text", "opened", "thought", "said"),
    [
        ("<think>a b</think>c", False, "a b", "c"),
        ("\n<think>\na\n\nb \n</think>\n\n c d\n", False, "a\n\nb", "c d\n"),
        ("a</think>b", True, "a", "b"),
        ("\n a", True, "a", ""),
        ("<think></think>b", False, "", "b"),
        ("<think>a </thin", False, "a </thin", ""),
        ("<thin", False, "", "<thin"),
        (" hello <think>a</think>", False, "", " hello <think>a</think>"),
        ("<think>a</think>b</think><think>c", False, "a", "b</think><think>c"),
        ("", False, "", ""),
        (" \n", False, "", " \n"),
        ("<think>a<</</think> <think>b", False, "a<</", "<think>b"),
    ],
)
def test_however_a_text_is_cut(text: str, opened: bool, thought: str, said: str) -> None:
    chance = random.Random(1)
    assert split(text, opened, []) == split(text, opened) == (thought, said)
    for _ in range(20):
        cuts = chance.sample(range(len(text) + 1), chance.randint(0, len(text)))
        assert split(text, opened, cuts) == (thought, said)


def test_marks_are_those_of_the_template() -> None:
    assert marks_of(TEMPLATE) is None and marks_of(TEMPLATE + THINKING) == ("<think>", "</think>")
    assert ReasoningSplitter(None, False).push("<think>a</think>") == ("", "<think>a</think>")


async def test_openai(server: ApiServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as ai:
        message: Any = (await ai.chat.completions.create(**ASK)).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, SAID)
        thought = said = ""
        async for chunk in await ai.chat.completions.create(**ASK, stream=True):
            delta: Any = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", "")
            said += delta.content or ""
        assert (thought, said) == (THOUGHT, SAID)
        raw = await ai.completions.create(model="builtin", prompt="x", max_tokens=200)
        assert raw.choices[0].text == REPLY, "a text is not divided"


async def test_ollama(server: ApiServer) -> None:
    client = ollama.AsyncClient(server.url)
    for think in (None, True, "low"):
        whole = (await client.chat(**ASK, think=think)).message  # type: ignore[call-overload]
        assert (whole.thinking, whole.content) == (THOUGHT, SAID)
    assert (await client.show("builtin")).capabilities == ["completion", "tools", "thinking"]
    parts = [part async for part in await client.generate("builtin", "hi", think=True, stream=True)]
    assert "".join(part.thinking or "" for part in parts) == THOUGHT
    assert "".join(part.response for part in parts) == SAID


async def test_anthropic(server: ApiServer) -> None:
    asked: Any = {**ASK, "max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        whole = await claude.messages.create(**asked)
        async with claude.messages.stream(**asked) as stream:
            events = [event.type async for event in stream]
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        thinking, text = message.content
        assert (thinking.type, text.type) == ("thinking", "text")
        assert (thinking.thinking, text.text) == (THOUGHT, SAID)
    assert events.count("content_block_start") == events.count("content_block_stop") == 2


@pytest.mark.parametrize(("path", "more"), [
    ("/v1/chat/completions", {"reasoning_effort": "none"}),
    ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}),
    ("/api/chat", {"think": False}), ("/v1/messages", {"max_tokens": 9}),
    ("/v1/messages", {"max_tokens": 9, "thinking": {"type": "disabled"}}),
])  # fmt: skip
async def test_it_can_be_switched_off(
    client: aiohttp.ClientSession, household: FakeHousehold, path: str, more: dict[str, Any]
) -> None:
    async with client.post(path, json={**ASK, **more}) as response:
        assert response.status == 200
        await response.read()
    prompt = household.tokenizer.decode(household.requests[0].prompt, skip_special_tokens=False)
    assert prompt.endswith("<|assistant|><think>\n\n</think>\n\n")


async def test_the_prompt_may_have_begun_it(tmp_path: Path) -> None:
    household = FakeHousehold(make_model_dir(tmp_path / "model", TEMPLATE + "<think>\n{# </think> #}"))
    household.reply = f"{THOUGHT}\n</think>\n{SAID}"
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        async with aiohttp.ClientSession(server.url) as client, client.post("/v1/chat/completions", json=ASK) as found:
            message = (await found.json())["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)
    finally:
        await server.close()


async def test_a_stream_goes_on_after_every_event(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async def heard(last: str | None) -> list[tuple[str | None, Any]]:
        headers = KEY if last is None else {**KEY, "Last-Event-ID": last}
        async with client.post("/v1/chat/completions", json={**ASK, "stream": True}, headers=headers) as response:
            return parsed(await response.text())

    whole = await heard(None)
    for index, (number, _) in enumerate(whole[:-1]):
        assert whole[: index + 1] + await heard(number) == whole


async def test_a_model_that_does_not_think_says_so(tmp_path: Path) -> None:
    household = FakeHousehold(make_model_dir(tmp_path / "model"))
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        with pytest.raises(ollama.ResponseError, match="'builtin' does not support thinking") as caught:
            await ollama.AsyncClient(server.url).chat(**ASK, think=True)
        assert caught.value.status_code == 400
        assert (await ollama.AsyncClient(server.url).chat(**ASK, think=False)).done
    finally:
        await server.close()


async def test_an_answer_that_is_cut_while_the_model_thinks(server: ApiServer, household: FakeHousehold) -> None:
    household.reply, household.finish = "<think>\nHm, a gr", "length"
    asked: Any = {**ASK, "max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    async with (
        anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as claude,
        claude.messages.stream(**asked) as stream,
    ):
        message: Any = await stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("Hm, a gr", "")
    assert message.stop_reason == "max_tokens"


async def test_another_device_goes_on_with_it(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    heir.reply, household.middle = household.reply, asyncio.Event()
    async with client.post("/v1/chat/completions", json={**ASK, "stream": True}, headers=KEY) as response:
        await response.content.readuntil(b"\n\n")
    heir.inherit(left(household, household.ids(REPLY)[:3]))
    message = (await whole(there))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)


async def test_what_only_looked_like_a_thought_comes_out(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.reply, household.finish = "<thi", "length"
    async with client.post("/v1/chat/completions", json=ASK) as response:
        message = (await response.json())["choices"][0]["message"]
    assert message["content"] == "<thi" and "reasoning_content" not in message
