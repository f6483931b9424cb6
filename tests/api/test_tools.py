"""Calls of tools with the official clients of three APIs: whole, streamed, and the conversation that goes on after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import ollama
import openai
import pytest
from tokenizers import AddedToken

from peerllm.api.core.part_events import PartEvents
from peerllm.api.server import ApiServer
from peerllm.api.text.calls.answer_parts import CallName, CallText, Words
from peerllm.api.text.calls.harmony_reader import HARMONY_MARKS
from tests.api import templates
from tests.api.fake import TEMPLATE, FakeHousehold, byte_tokenizer, make_model_dir
from tests.api.test_inherited_answers import left
from tests.api.test_kept_answers import KEY, parsed

HI: Any = [{"role": "user", "content": "hi"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}
OPENAI: Any = [{"type": "function", "function": FUNCTION}]
ANTHROPIC: Any = [{"name": "weather", "description": "Of a city", "input_schema": PARAMETERS}]
ARGUMENTS = '{"city": "Paris é"}', '{"city": "Rome"}'
CALLS = "\n".join(f'<tool_call>\n{{"name": "weather", "arguments": {one}}}\n</tool_call>' for one in ARGUMENTS)
SAID = "Let me look."
GIVEN = [json.loads(one) for one in ARGUMENTS]
JSON = {"Content-Type": "application/json"}
CONTEXT = 8192


def with_marks(path: Path, template: str, marks: tuple[str, ...]) -> FakeHousehold:
    """Its tokenizer has the marks as special tokens, whose text nobody shows."""
    directory, tokenizer = make_model_dir(path, template), byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(directory / "tokenizer.json"))
    household = FakeHousehold(directory)
    household.tokenizer = tokenizer
    household.model = replace(household.model, context=CONTEXT)
    household.served = [household.model]
    return household


@pytest.fixture
async def household(tmp_path: Path) -> FakeHousehold:
    """It says something and calls twice."""
    made = with_marks(tmp_path / "hermes", templates.HERMES, ())
    made.reply = f"{SAID}\n{CALLS}"
    return made


@pytest.fixture
async def ai(server: ApiServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(server: ApiServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def prompt(household: FakeHousehold) -> str:
    text: str = household.tokenizer.decode(household.requests[-1].prompt, skip_special_tokens=False)
    return text


async def test_openai(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    whole = (await ai.chat.completions.create(model="builtin", messages=HI, tools=OPENAI)).choices[0]
    assert "<tools>" in prompt(household) and '"name": "weather"' in prompt(household)
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", SAID)
    calls: Any = whole.message.tool_calls
    assert [(one.type, one.function.name, one.function.arguments) for one in calls] == [
        ("function", "weather", one) for one in ARGUMENTS
    ]
    assert len({one.id for one in calls}) == 2
    said: Any = [*HI, whole.message, *({"role": "tool", "tool_call_id": one.id, "content": "wet"} for one in calls)]
    household.reply = "It rains."
    after = (await ai.chat.completions.create(model="builtin", messages=said, tools=OPENAI)).choices[0]
    assert (after.finish_reason, after.message.content, after.message.tool_calls) == ("stop", "It rains.", None)
    assert f"{SAID}\n<tool_call>" in prompt(household) and prompt(household).count("<tool_response>\nwet\n") == 2


async def test_openai_streamed(ai: openai.AsyncOpenAI) -> None:
    found: dict[int, dict[str, str]] = {}
    text, pieces, reasons = "", 0, []
    async for chunk in await ai.chat.completions.create(model="builtin", messages=HI, tools=OPENAI, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for one in choice.delta.tool_calls or ():
            assert one.function is not None
            if one.index not in found:
                assert one.id and one.function.name and one.type == "function", "the first piece has all but arguments"
                found[one.index] = {"id": one.id, "name": one.function.name, "arguments": ""}
            found[one.index]["arguments"] += one.function.arguments or ""
            pieces += 1
    assert text == SAID and [one["arguments"] for one in found.values()] == list(ARGUMENTS)
    assert pieces > 10 and reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
    async with ai.chat.completions.stream(model="builtin", messages=HI, tools=OPENAI) as stream:
        final: Any = (await stream.get_final_completion()).choices[0].message
    assert [json.loads(one.function.arguments) for one in final.tool_calls] == GIVEN


async def test_ollama(server: ApiServer, household: FakeHousehold) -> None:
    lama = ollama.AsyncClient(server.url)
    whole = await lama.chat("builtin", HI, tools=OPENAI)
    parts = [part async for part in await lama.chat("builtin", HI, tools=OPENAI, stream=True)]
    called: Any = [one for part in parts for one in part.message.tool_calls or ()]
    assert "".join(part.message.content or "" for part in parts) == whole.message.content == SAID
    for calls in (called, whole.message.tool_calls or ()):
        assert [(one.function.name, one.function.arguments) for one in calls] == [("weather", one) for one in GIVEN]
    assert parts[-1].done and parts[-1].done_reason == "stop" and not parts[-1].message.tool_calls
    assert "tools" in ((await lama.show("builtin")).capabilities or ())
    household.reply = "It rains."
    for more in ({}, {"tool_name": "weather"}):
        said: Any = [*HI, whole.message, *({"role": "tool", "content": f"wet {n}", **more} for n in range(2))]
        after = await lama.chat("builtin", said, tools=OPENAI)
        assert (after.message.content, after.message.tool_calls) == ("It rains.", None)
        assert prompt(household).index("wet 0") < prompt(household).index("wet 1")


async def test_anthropic(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    asked: Any = {"model": "builtin", "max_tokens": 1000, "messages": HI, "tools": ANTHROPIC}
    whole: Any = await claude.messages.create(**asked)
    async with claude.messages.stream(**asked) as stream:
        events = [event.type async for event in stream]
        streamed: Any = await stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
        assert message.content[0].text == SAID
        assert [(one.name, one.input) for one in message.content[1:]] == [("weather", one) for one in GIVEN]
    assert events.count("content_block_start") == events.count("content_block_stop") == 3
    results = [{"type": "tool_result", "tool_use_id": one.id, "content": content} for one, content in zip(
        whole.content[1:], ("wet", [{"type": "text", "text": "dry"}]), strict=True)]  # fmt: skip
    talk = [*HI, {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]}]  # fmt: skip
    household.reply = "It rains."
    after: Any = await claude.messages.create(**{**asked, "messages": talk})
    assert (after.stop_reason, after.content[0].text) == ("end_turn", "It rains.")
    places = [prompt(household).index(one) for one in ("Rome", "wet", "dry", "So?")]
    assert places == sorted(places)


async def test_the_choice_of_none_tells_the_model_of_no_tools(
    ai: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, household: FakeHousehold
) -> None:
    chosen: Any = {"tools": OPENAI, "tool_choice": "none"}
    message = (await ai.chat.completions.create(model="builtin", messages=HI, **chosen)).choices[0].message
    assert message.content == household.reply and message.tool_calls is None
    none: Any = {"tools": ANTHROPIC, "tool_choice": {"type": "none"}}
    await claude.messages.create(model="builtin", max_tokens=99, messages=HI, **none)
    for request in household.requests:
        assert "weather" not in household.tokenizer.decode(request.prompt)


def rules(household: FakeHousehold) -> str | None:
    """Of the last request's grammar."""
    constraint = household.requests[-1].constraint
    return None if constraint is None else json.loads(constraint.grammar)["grammars"][0]["lark_grammar"]


async def test_what_is_too_large_to_be_kept_is_refused(ai: openai.AsyncOpenAI) -> None:
    large = {"description": "x" * (256 << 10), "type": "object"}
    tools: Any = [{"type": "function", "function": {"name": "large", "parameters": large, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match="larger than 256 KiB: offer fewer") as caught:
        await ai.chat.completions.create(model="builtin", messages=HI, tools=tools)
    assert caught.value.param == "tools"


NAMED: Any = {"type": "function", "function": {"name": "weather"}}
STRICT: Any = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
JSON_FORM: Any = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "start", "calls"),
    [
        ({"tools": OPENAI, "tool_choice": "auto"}, None, 2),
        ({"tools": OPENAI, "tool_choice": "required"}, "start: calls", 2),
        ({"tools": OPENAI, "tool_choice": "required", "parallel_tool_calls": False}, "start: calls", 1),
        ({"tools": OPENAI, "tool_choice": "required", "response_format": JSON_FORM}, "start: calls", 2),
        ({"tools": OPENAI, "tool_choice": NAMED}, "start: calls", 1),
        ({"tools": STRICT}, "start: free", 2),
        ({"tools": STRICT, "tool_choice": "none"}, None, 0),
        ({"tools": OPENAI, "response_format": JSON_FORM}, "start: (calls | @body)", 2),
    ],
)
async def test_masks_keep_what_was_chosen(
    ai: openai.AsyncOpenAI, household: FakeHousehold, fields: Any, start: str | None, calls: int
) -> None:
    choice = (await ai.chat.completions.create(model="builtin", messages=HI, **fields)).choices[0]
    assert len(choice.message.tool_calls or ()) == calls
    found = rules(household)
    assert (found is None) == (start is None)
    if found is not None and start is not None:
        assert found.replace("  ", " ").startswith(start + "\n")
        assert ("{0,15}" in found) == (calls == 2)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"tool_choice": {"type": "any"}}, "start: calls"),
        ({"tool_choice": {"type": "tool", "name": "weather"}}, "start: calls"),
        ({"tools": [{**ANTHROPIC[0], "strict": True}]}, "start: free"),
        ({}, None),
    ],
)
async def test_masks_keep_what_was_chosen_of_claude(
    claude: anthropic.AsyncAnthropic, household: FakeHousehold, fields: Any, start: str | None
) -> None:
    asked: Any = {"model": "builtin", "max_tokens": 999, "messages": HI, "tools": ANTHROPIC, **fields}
    await claude.messages.create(**asked)
    found = rules(household)
    assert found == start if found is None or start is None else found.replace("  ", " ").startswith(start + "\n")


async def test_a_schema_that_cannot_be_kept_matters_only_where_it_is_to_be(ai: openai.AsyncOpenAI) -> None:
    function: Any = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    asked: Any = {"model": "builtin", "messages": HI}
    await ai.chat.completions.create(**asked, tools=[{"type": "function", "function": function}])
    for fields in ({"strict": True}, {}):
        tools: Any = [{"type": "function", "function": {**function, **fields}}]
        with pytest.raises(openai.BadRequestError, match=r"the arguments of 'odd' .*Unimplemented keys") as caught:
            await ai.chat.completions.create(**asked, tools=tools, tool_choice="auto" if fields else "required")
        assert (caught.value.param, caught.value.code) == ("tools", "invalid_schema")


async def test_of_several_tools_the_chosen_one(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    tools: Any = [*OPENAI, {"type": "function", "function": {"name": "now"}}]
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    await ai.chat.completions.create(model="builtin", messages=HI, tools=tools, tool_choice=choice)
    assert '"weather"' in prompt(household) and '"now"' not in prompt(household)


@pytest.mark.parametrize("stream", [True, False])
async def test_one_call_at_a_time(
    ai: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, household: FakeHousehold, stream: bool
) -> None:
    asked: Any = {"model": "builtin", "messages": HI, "tools": OPENAI, "parallel_tool_calls": False}
    if stream:
        async with ai.chat.completions.stream(**asked) as events:
            choice: Any = (await events.get_final_completion()).choices[0]
    else:
        choice = (await ai.chat.completions.create(**asked)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [json.loads(one.function.arguments) for one in choice.message.tool_calls] == GIVEN[:1]
    assert household.closed.is_set(), "the model writes no more"
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    made = await claude.messages.create(model="builtin", max_tokens=1000, messages=HI, tools=ANTHROPIC, tool_choice=one)
    assert [block.type for block in made.content] == ["text", "tool_use"]


async def test_a_call_that_is_cut(
    ai: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, server: ApiServer, household: FakeHousehold
) -> None:
    household.reply, household.finish = '<tool_call>{"name": "weather", "arguments": {"city": "Pa', "length"
    cut: Any = (await ai.chat.completions.create(model="builtin", messages=HI, tools=OPENAI)).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls[0].function.arguments == '{"city": "Pa'
    lama = ollama.AsyncClient(server.url)
    whole = await lama.chat("builtin", HI, tools=OPENAI)
    parts = [part async for part in await lama.chat("builtin", HI, tools=OPENAI, stream=True)]
    assert (whole.message.content, whole.done_reason) == ('weather({"city": "Pa', "length")
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    message: Any = await claude.messages.create(model="builtin", max_tokens=99, messages=HI, tools=ANTHROPIC)
    assert (message.stop_reason, message.content[0].text) == ("max_tokens", 'weather({"city": "Pa')


async def test_without_tools_nothing_is_a_call(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    message = (await ai.chat.completions.create(model="builtin", messages=HI)).choices[0].message
    assert (message.content, message.tool_calls) == (household.reply, None)


FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "mistral": (templates.MISTRAL, ("[TOOL_CALLS]", "[ARGS]"),
                f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS[0]}[TOOL_CALLS]weather[ARGS]{ARGUMENTS[1]}"),
    "llama": (templates.LLAMA, ("<|python_tag|>",), "<|python_tag|>" + "; ".join(
        f'{{"name": "weather", "parameters": {one}}}' for one in ARGUMENTS)),
    "gemma 4": (templates.GEMMA_4, ("<|tool_call>", "<tool_call|>", '<|"|>'), "".join(
        f'<|tool_call>call:weather{{city:<|"|>{one["city"]}<|"|>}}<tool_call|>' for one in GIVEN)),
    "harmony": (templates.HARMONY, HARMONY_MARKS, "<|channel|>analysis<|message|>Hm.<|end|>" + "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{one}<|call|>"
        for one in ARGUMENTS)),
    "no tools": (templates.GEMMA_3, (), CALLS),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
async def test_families_whose_marks_are_tokens(tmp_path: Path, family: str) -> None:
    template, marks, reply = FAMILIES[family]
    household = with_marks(tmp_path / "model", template, marks)
    household.reply = reply
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as ai:
            whole: Any = (await ai.chat.completions.create(model="builtin", messages=HI, tools=OPENAI)).choices[0]
            async with ai.chat.completions.stream(model="builtin", messages=HI, tools=OPENAI) as stream:
                streamed: Any = (await stream.get_final_completion()).choices[0]
            for choice in (whole, streamed):
                assert choice.finish_reason == "tool_calls" and not choice.message.content
                assert [json.loads(one.function.arguments) for one in choice.message.tool_calls] == GIVEN
            assert getattr(whole.message, "reasoning_content", None) == ("Hm." if family == "harmony" else None)
            if marks and family != "harmony":
                household.reply = "Plain " + marks[0] + "words"
                shown = (await ai.chat.completions.create(model="builtin", messages=HI)).choices[0].message.content
                assert shown == "Plain words", "special tokens stay unseen where no tools are offered"
    finally:
        await server.close()


@pytest.mark.parametrize("strict", [True, False])
async def test_where_masks_keep_calls_there_is_one_way_to_call(tmp_path: Path, strict: bool) -> None:
    """What a mask does not keep is no call, however much it looks like one."""
    household = with_marks(tmp_path / "model", templates.GEMMA_3, ())
    household.reply = f'{{"name": "weather", "arguments": {ARGUMENTS[0]}}}'
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        tools: Any = STRICT if strict else OPENAI
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as ai:
            message = (await ai.chat.completions.create(model="builtin", messages=HI, tools=tools)).choices[0].message
        assert (message.content, bool(message.tool_calls)) == ((household.reply, False) if strict else (None, True))
    finally:
        await server.close()


@pytest.mark.parametrize("depth", [1, 90, 400, 900, 990, 5000])
async def test_odd_values_are_taken_or_refused(
    client: aiohttp.ClientSession, household: FakeHousehold, depth: int
) -> None:
    """Numbers of any size, and objects within each other, in schemas, in earlier calls and in answers."""
    odd = '{"a": ' * depth + str(2**70) + "}" * depth
    household.reply = f'<tool_call>{{"name": "weather", "arguments": {odd}}}</tool_call>'
    function = f'{{"type": "function", "function": {{"name": "weather", "parameters": {odd}}}}}'
    call = f'{{"function": {{"name": "weather", "arguments": {odd}}}}}'
    talk = f'{{"role": "user", "content": "hi"}}, {{"role": "assistant", "tool_calls": [{call}]}}'
    last = '{"role": "tool", "content": "wet"}'
    body = f'{{"model": "builtin", "tools": [{function}], "messages": [{talk}, {last}], "stream": %s}}'
    for stream in ("false", "true"):
        async with client.post("/api/chat", data=body % stream, headers=JSON) as response:
            text = await response.text()
        assert response.status in (200, 400, 413), text
        assert response.status == 200 or depth > 1
        if response.status == 200:
            assert "1.1805916207174113e+21" in text or depth > 1


async def test_harmony_without_tools(tmp_path: Path) -> None:
    household = with_marks(tmp_path / "model", templates.HARMONY, HARMONY_MARKS)
    household.reply = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        lama = ollama.AsyncClient(server.url)
        message = (await lama.chat("builtin", HI, think="low")).message
        assert (message.thinking, message.content) == ("Hm.", "Hello!")
        assert (await lama.show("builtin")).capabilities == ["completion", "tools", "thinking"]
    finally:
        await server.close()


async def test_marks_of_thoughts_may_be_tokens_too(tmp_path: Path) -> None:
    household = with_marks(tmp_path / "model", templates.GEMMA_4 + "{# <channel|> #}", ("<|channel>", "<channel|>"))
    household.reply = "<|channel>thought\nHm.<channel|>Hello!"
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        message = (await ollama.AsyncClient(server.url).chat("builtin", HI, think=True)).message
        assert (message.thinking, message.content) == ("Hm.", "Hello!")
    finally:
        await server.close()


async def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    household = FakeHousehold(make_model_dir(tmp_path / "base", template=None))
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await server.start()
    try:
        with pytest.raises(ollama.ResponseError, match="'builtin' does not support tools") as caught:
            await ollama.AsyncClient(server.url).chat("builtin", HI, tools=OPENAI)
        assert caught.value.status_code == 400
    finally:
        await server.close()


async def test_a_stream_goes_on_after_every_event(client: aiohttp.ClientSession) -> None:
    async def heard(last: str | None) -> list[tuple[str | None, Any]]:
        headers = KEY if last is None else {**KEY, "Last-Event-ID": last}
        body = {"model": "builtin", "messages": HI, "tools": OPENAI, "stream": True}
        async with client.post("/v1/chat/completions", json=body, headers=headers) as response:
            return parsed(await response.text())

    whole = await heard(None)
    numbers = [number or "" for number, _ in whole]
    assert len(set(numbers)) == len(numbers) and any("." in one for one in numbers)
    for index, number in enumerate(numbers[:-1]):
        assert whole[: index + 1] + await heard(number) == whole


async def test_another_device_goes_on_with_a_call(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: Any
) -> None:
    there, heir = successor
    heir.tokenizer, heir.model, heir.served = household.tokenizer, household.model, household.served
    heir.reply, household.middle = household.reply, asyncio.Event()
    body = {"model": "builtin", "messages": HI, "tools": OPENAI}
    async with client.post("/v1/chat/completions", json={**body, "stream": True}, headers=KEY) as response:
        await response.content.readuntil(b"\n\n")
    heir.inherit(left(household, household.ids(household.reply)[:40]))
    async with there.post("/v1/chat/completions", json=body, headers=KEY) as response:
        choice = (await response.json())["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [json.loads(one["function"]["arguments"]) for one in choice["message"]["tool_calls"]] == GIVEN


async def test_the_relayed_answer_has_the_same_calls(
    server: ApiServer, household: FakeHousehold, tmp_path: Path
) -> None:
    """Asked at a device that is not the model's source."""
    async with household.control_port() as port:
        other = FakeHousehold(make_model_dir(tmp_path / "other", TEMPLATE))
        other.peers = {"s" * 64: port}
        other.served = [replace(household.model, source="s" * 64, model_dir=None)]
        relay = ApiServer(other, "127.0.0.1", 0, tmp_path / "relay", in_process=True)
        await relay.start()
        try:
            async with anthropic.AsyncAnthropic(base_url=relay.url, api_key="none", max_retries=0) as claude:
                asked: Any = {"model": "builtin", "max_tokens": 1000, "messages": HI, "tools": ANTHROPIC}
                async with claude.messages.stream(**asked) as stream:
                    message: Any = await stream.get_final_message()
            assert [one.input for one in message.content[1:]] == GIVEN and message.stop_reason == "tool_use"
        finally:
            await relay.close()


def test_of_several_events_to_a_token_the_last_has_it() -> None:
    events = PartEvents("a")
    first: Any = list(events.of([Words("x"), CallName("f"), CallText("{}")], [7, 8]))
    assert [(one.ids, one.tokens) for one in first] == [((), 0), ((), 0), ((7, 8), 2)]
    second: Any = list(events.of([CallName("f")], [7, 8, 9]))
    assert [(one.index, one.id, one.ids, one.tokens) for one in second] == [(1, "call_a1", (9,), 3)]
