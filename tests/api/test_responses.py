"""/v1/responses with the official client: whole and streamed, event by event, and conversations that go on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, ConfigDict, TypeAdapter

from peerllm.api.server import ApiServer
from peerllm.errors import EngineError, OverloadedError
from tests.api import templates
from tests.api.fake import TEMPLATE, FakeHousehold, make_model_dir
from tests.api.relay_pair import Pair
from tests.api.test_kept_answers import KEY
from tests.api.test_logprobs import expected
from tests.api.test_reasoning import THINKING
from tests.api.test_tools import ARGUMENTS, CALLS, PARAMETERS, SAID, prompt, with_marks

PATH = "/v1/responses"
ASK: Any = {"model": "builtin", "input": "hi"}
TOOLS: Any = [{"type": "function", "name": "weather", "description": "Of a city", "parameters": PARAMETERS,
               "strict": False}]  # fmt: skip
THOUGHT = "Hm, a greeting."
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
# What the specification demands of every response, whatever was asked.
REQUIRED = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id",
    "instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p",
    "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens",
    "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
NUMBERS = "top_p", "presence_penalty", "frequency_penalty", "temperature", "top_logprobs"


@pytest.fixture
async def ai(server: ApiServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def thinker(household: FakeHousehold, tmp_path: Path) -> FakeHousehold:
    """The household's model thinks."""
    make_model_dir(household.model.model_dir or tmp_path, TEMPLATE + THINKING)
    household.reply = f"<think>\n{THOUGHT}\n</think>\n\n{household.reply}"
    return household


@pytest.fixture
async def caller(household: FakeHousehold, tmp_path: Path) -> FakeHousehold:
    """The household's model knows tools: it says something and calls twice."""
    made = with_marks(household.model.model_dir or tmp_path, templates.HERMES, ())
    household.model, household.served, household.reply = made.model, made.served, f"{SAID}\n{CALLS}"
    return household


def fits(response: dict[str, Any]) -> dict[str, Any]:
    """What both the specification and OpenAI's types ask of it."""
    assert set(response) >= REQUIRED
    assert all(isinstance(response[name], int | float) for name in NUMBERS)
    Response.model_validate(response)
    return response


async def streamed(client: aiohttp.ClientSession, **body: Any) -> list[dict[str, Any]]:
    """All events, after a look at how they are framed and numbered, and at their types."""
    async with client.post(PATH, json={**ASK, "stream": True, **body}) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream"), await response.text()
        text = await response.text()
    assert text.endswith("\n\ndata: [DONE]\n\n")
    events = []
    for one in text.removesuffix("\n\ndata: [DONE]\n\n").split("\n\n"):
        if one.startswith(":"):
            continue
        name, data = one.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENTS.validate_python(events[-1])
        if "response" in events[-1]:
            fits(events[-1]["response"])
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    return events


def names(events: list[dict[str, Any]]) -> list[str]:
    """Of events, the same ones in a row as one."""
    found: list[str] = []
    for one in events:
        name = one["type"].removeprefix("response.")
        if not found or found[-1] != name:
            found.append(name)
    return found


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [one for one in events if one["type"] == f"response.{name}"]


async def test_a_response_is_whole(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.reused = 4
    more: Any = {"instructions": "be brief", "max_output_tokens": 100, "temperature": 0.25, "top_p": 0.5}
    response = await ai.responses.create(**ASK, **more, metadata={"a": "b"}, user="anna")
    (item,) = response.output
    assert (response.status, response.model, response.output_text) == ("completed", "builtin", household.reply)
    assert response.id.startswith("resp_") and item.id and item.id.startswith("msg_") and item.type == "message"
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.25, 0.5, 100)
    assert (response.metadata, response.instructions, response.user) == ({"a": "b"}, "be brief", "anna")
    (asked,) = household.requests
    usage: Any = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(asked.prompt), len(household.ids(household.reply)) + 1)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (4, 0)
    assert (asked.max_tokens, asked.sampling.temperature, asked.sampling.top_p) == (100, 0.25, 0.5)
    assert asked.client.endswith("/anna")
    assert prompt(household) == "<s><|system|>be brief<|end|>\n<|user|>hi<|end|>\n<|assistant|>"
    fits(json.loads((await ai.responses.with_raw_response.create(**ASK)).text))


async def test_what_the_model_draws_with_is_told(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async with client.post(PATH, json=ASK) as response:
        told = fits(await response.json())
    sampling = household.requests[0].sampling
    assert (told["temperature"], told["top_p"]) == (sampling.temperature, sampling.top_p) != (1.0, 1.0)


async def test_every_event_of_a_text(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    household.pace_s = 0.001
    events = await streamed(client)
    assert names(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    created, final = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert created["id"] == final["id"] and created["completed_at"] is None and final["completed_at"]
    added, done = of(events, "output_item.added")[0]["item"], of(events, "output_item.done")[0]["item"]
    assert (added["status"], added["content"], added["role"]) == ("in_progress", [], "assistant")
    assert done == {**added, "status": "completed", "content": [of(events, "content_part.done")[0]["part"]]}
    assert final["output"] == [done] and {one["item_id"] for one in events[3:-2]} == {done["id"]}
    deltas = [one["delta"] for one in of(events, "output_text.delta")]
    assert "".join(deltas) == household.reply == of(events, "output_text.done")[0]["text"] and len(deltas) > 5
    assert final["usage"]["output_tokens"] == len(household.ids(household.reply)) + 1


async def test_the_clients_stream(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    async with ai.responses.stream(**ASK) as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == household.reply
    plain = [one.type async for one in await ai.responses.create(**ASK, stream=True)]
    assert (plain[0], plain[-1]) == ("response.created", "response.completed")


async def test_thoughts_are_an_item_of_their_own(
    client: aiohttp.ClientSession, ai: openai.AsyncOpenAI, thinker: FakeHousehold
) -> None:
    events = await streamed(client)
    assert names(events)[2:8] == [
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
    ]  # fmt: skip
    thought, said = events[-1]["response"]["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [{"type": "summary_text", "text": THOUGHT}])
    assert (said["type"], said["content"][0]["text"]) == ("message", "Hello, wörld 🏡!")
    assert [one["output_index"] for one in of(events, "output_item.done")] == [0, 1]
    whole: Any = await ai.responses.create(**ASK)
    assert [one.type for one in whole.output] == ["reasoning", "message"]
    assert whole.output[0].summary[0].text == THOUGHT and whole.output_text == "Hello, wörld 🏡!"
    tokens = whole.usage.output_tokens_details.reasoning_tokens
    assert tokens == events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert len(THOUGHT) < tokens < whole.usage.output_tokens
    off = await ai.responses.create(model="builtin", input=whole.output, reasoning={"effort": "none"})
    assert off.reasoning and off.reasoning.effort == "none" and prompt(thinker).endswith("<think>\n\n</think>\n\n")
    assert THOUGHT not in prompt(thinker) and "<|assistant|>Hello" in prompt(thinker), "thoughts are not said again"


async def test_a_round_with_tools(ai: openai.AsyncOpenAI, caller: FakeHousehold) -> None:
    whole = await ai.responses.create(**ASK, tools=TOOLS)
    assert [one.type for one in whole.output] == ["message", "function_call", "function_call"]
    calls: Any = whole.output[1:]
    assert [(one.name, one.arguments, one.status) for one in calls] == [
        ("weather", one, "completed") for one in ARGUMENTS
    ]
    assert "<tools>" in prompt(caller) and '"name": "weather"' in prompt(caller)
    results: Any = [{"type": "function_call_output", "call_id": calls[0].call_id, "output": "wet"}]
    results += [{"type": "function_call_output", "call_id": calls[1].call_id,
                 "output": [{"type": "input_text", "text": "dry"}]}]  # fmt: skip
    caller.reply = "It rains."
    said: Any = [{"role": "user", "content": "hi"}, *whole.output, *results]
    by_hand = await ai.responses.create(model="builtin", input=said, tools=TOOLS)
    sent = prompt(caller)
    after = await ai.responses.create(model="builtin", input=results, tools=TOOLS, previous_response_id=whole.id)
    assert by_hand.output_text == after.output_text == "It rains." and prompt(caller) == sent
    assert f"<|im_start|>assistant\n{SAID}\n<tool_call>" in sent and sent.count("<|im_start|>assistant") == 2
    assert sent.index("wet") < sent.index("dry")


async def test_every_event_of_calls(client: aiohttp.ClientSession, caller: FakeHousehold) -> None:
    events = await streamed(client, tools=TOOLS)
    assert names(events)[8:] == [
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"] * 2,
        "completed",
    ]
    for index, arguments in enumerate(ARGUMENTS, 1):
        own = [one for one in events if one.get("output_index") == index]
        assert (own[0]["item"]["name"], own[0]["item"]["arguments"]) == ("weather", "")
        assert "".join(one["delta"] for one in of(own, "function_call_arguments.delta")) == arguments
        assert of(own, "function_call_arguments.done")[0]["arguments"] == own[-1]["item"]["arguments"] == arguments
        assert own[0]["item"]["call_id"] == own[-1]["item"]["call_id"] and own[-1]["item"]["status"] == "completed"
    done = [one["item"] for one in of(events, "output_item.done")]
    assert events[-1]["response"]["output"] == done


async def test_a_call_without_arguments(client: aiohttp.ClientSession, caller: FakeHousehold) -> None:
    """Home Assistant reads arguments as JSON when they are done."""
    caller.reply = '<tool_call>\n{"name": "weather"}\n</tool_call>'
    events = await streamed(client, tools=TOOLS)
    assert [one["delta"] for one in of(events, "function_call_arguments.delta")] == ["{}"]
    assert events[-1]["response"]["output"][0]["arguments"] == "{}"


async def test_which_tools_may_be_called(ai: openai.AsyncOpenAI, caller: FakeHousehold) -> None:
    both: Any = [*TOOLS, {**TOOLS[0], "name": "clock"}]
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    answer = await ai.responses.create(**ASK, tools=both, tool_choice=allowed)
    assert '"name": "clock"' in prompt(caller) and '"name": "weather"' not in prompt(caller)
    assert json.loads(answer.model_dump_json())["tool_choice"] == allowed and len(answer.tools) == 2
    await ai.responses.create(**ASK, tools=both, tool_choice={"type": "function", "name": "weather"})
    assert '"name": "weather"' in prompt(caller)
    none = await ai.responses.create(**ASK, tools=both, tool_choice="none", parallel_tool_calls=False)
    assert "<tools>" not in prompt(caller) and (none.tool_choice, none.parallel_tool_calls) == ("none", False)
    one = await ai.responses.create(**ASK, tools=both, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["message", "function_call"]


@pytest.mark.parametrize("stream", [True, False])
async def test_one_that_is_cut_is_incomplete(
    client: aiohttp.ClientSession, household: FakeHousehold, stream: bool
) -> None:
    if stream:
        events = await streamed(client, max_output_tokens=5)
        assert names(events)[-2:] == ["output_item.done", "incomplete"]
        told = events[-1]["response"]
    else:
        async with client.post(PATH, json={**ASK, "max_output_tokens": 5}) as response:
            told = fits(await response.json())
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = told["output"]
    assert (item["status"], item["content"][0]["text"], told["completed_at"]) == ("incomplete", "Hello", None)


async def test_a_call_that_is_cut_is_never_done(client: aiohttp.ClientSession, caller: FakeHousehold) -> None:
    cut = len(caller.ids(caller.reply.partition("Paris")[0]))
    events = await streamed(client, tools=TOOLS, max_output_tokens=cut)
    assert names(events)[-3:] == ["function_call_arguments.delta", "output_item.done", "incomplete"]
    message, call = events[-1]["response"]["output"]
    assert (message["status"], call["status"], call["arguments"]) == ("completed", "incomplete", '{"city": "')
    async with client.post(PATH, json={**ASK, "tools": TOOLS, "max_output_tokens": cut}) as response:
        (_, whole) = fits(await response.json())["output"]
    assert (whole["status"], whole["arguments"]) == ("incomplete", '{"city": "')


@pytest.mark.parametrize("reply", ["", f"<think>{THOUGHT}</think>"])
async def test_who_says_nothing_has_a_message_all_the_same(
    client: aiohttp.ClientSession, thinker: FakeHousehold, reply: str
) -> None:
    thinker.reply = reply
    events = await streamed(client)
    assert [one["type"] for one in events[-1]["response"]["output"]] == ["reasoning", "message"][not reply :]
    assert events[-1]["response"]["output"][-1]["content"][0]["text"] == ""


async def test_log_probabilities(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    wanted = expected(household, household.reply)
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    async with client.post(PATH, json={**ASK, **more}) as response:
        assert fits(await response.json())["output"][0]["content"][0]["logprobs"] == wanted
    household.pace_s = 0.001
    events = await streamed(client, **more)
    deltas = of(events, "output_text.delta")
    assert [one for delta in deltas for one in delta["logprobs"]] == wanted and len(deltas) > 5
    done, part = of(events, "output_text.done")[0], of(events, "content_part.done")[0]["part"]
    assert (
        done["logprobs"] == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"] == wanted
    )
    async with client.post(PATH, json={**ASK, "include": ["message.output_text.logprobs"]}) as response:
        (first, *_) = (await response.json())["output"][0]["content"][0]["logprobs"]
    assert first == {**wanted[0], "top_logprobs": []}


async def test_words_behind_a_call_are_a_message_of_their_own(
    client: aiohttp.ClientSession, caller: FakeHousehold
) -> None:
    caller.reply = f"{SAID}\n{CALLS}\nDone."
    events = await streamed(client, tools=TOOLS, include=["message.output_text.logprobs"])
    output = events[-1]["response"]["output"]
    assert [one["type"] for one in output] == ["message", "function_call", "function_call", "message"]
    for item, text in ((output[0], SAID), (output[3], "Done.")):
        (part,) = item["content"]
        assert part["text"] == text == "".join(one["token"] for one in part["logprobs"])


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    age: int


async def test_a_pydantic_model_is_parsed(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.reply = '{"name": "Anna", "age": 7}'
    parsed = await ai.responses.parse(**ASK, text_format=Person)
    assert parsed.output_parsed == Person(name="Anna", age=7)
    constraint = household.requests[0].constraint
    assert constraint is not None
    schema = json.loads(constraint.grammar)["grammars"][0]["json_schema"]
    assert schema["properties"] == Person.model_json_schema()["properties"]
    assert parsed.text and parsed.text.format and parsed.text.format.type == "json_schema"
    for form in ({"type": "json_object"}, {"type": "regex", "grammar": "a|b"}):
        await ai.responses.create(**ASK, text={"format": form})  # type: ignore[arg-type]
        assert household.requests[-1].constraint is not None
    await ai.responses.create(**ASK, text={"format": {"type": "text"}, "verbosity": "low"})
    assert household.requests[-1].constraint is None


async def test_a_conversation_goes_on(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    first = await ai.responses.create(**ASK, instructions="be brief")
    household.reply = "Well."
    streamed = await ai.responses.create(
        model="builtin", input="how?", previous_response_id=first.id, stream=True, instructions="be loud"
    )
    (second,) = [event.response async for event in streamed if event.type == "response.completed"]
    assert second.previous_response_id == first.id
    third = await ai.responses.create(model="builtin", input="why?", previous_response_id=second.id)
    assert third.output_text == "Well."
    said = ["<|user|>hi", f"<|assistant|>{first.output_text}", "<|user|>how?", "<|assistant|>Well.", "<|user|>why?"]
    assert prompt(household) == "<s>" + "".join(f"{one}<|end|>\n" for one in said) + "<|assistant|>"
    assert (await ai.responses.retrieve(second.id)).output_text == "Well."
    listed = [one async for one in await _items(ai, third.id, order="asc", limit=2)]
    told: Any = [(one.role, one.content[0].type, one.content[0].text) for one in listed]
    assert told == [
        ("user", "input_text", "hi"), ("assistant", "output_text", first.output_text), ("user", "input_text", "how?"),
        ("assistant", "output_text", "Well."), ("user", "input_text", "why?"),
    ]  # fmt: skip
    assert len({one.id for one in listed}) == 5 and listed[1].id == first.output[0].id
    latest = (await _items(ai, third.id, limit=1)).data[0]
    assert latest.id == listed[-1].id
    await ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
        await ai.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as found:
        await ai.responses.create(**ASK, previous_response_id=first.id)
    assert (found.value.code, found.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError) as wrong:
        await ai.responses.create(model="builtin", input=[IMAGE], previous_response_id=third.id)
    assert wrong.value.param == "input[0]", "counted in the request, not in the conversation"
    assert (await ai.responses.create(**ASK, previous_response_id=third.id)).output_text == "Well.", "it has all"


async def _items(ai: openai.AsyncOpenAI, name: str, **more: Any) -> Any:
    return await ai.responses.input_items.list(name, **more)


async def test_what_is_not_to_be_kept_is_not(ai: openai.AsyncOpenAI) -> None:
    response = await ai.responses.create(**ASK, store=False)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(response.id)
    kept = await ai.responses.create(**ASK)
    with pytest.raises(openai.BadRequestError, match="hanging up"):
        await ai.responses.cancel(kept.id)


async def test_items_are_referred_to(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    first = await ai.responses.create(**ASK)
    said: Any = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "and?"}]
    await ai.responses.create(model="builtin", input=said)
    assert f"<|assistant|>{first.output_text}<|end|>\n<|user|>and?" in prompt(household)
    for name in ("msg_1", "msg_" + "0" * 24 + "_0", (first.output[0].id or "")[:-1] + "9"):
        with pytest.raises(openai.NotFoundError, match="send the item itself") as found:
            await ai.responses.create(model="builtin", input=[said[1], {"type": "item_reference", "id": name}])
        assert found.value.param == "input[1]"


async def test_the_same_key_gives_the_same_response(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    told = []
    for stream in (False, True, False):
        async with client.post(PATH, json={**ASK, "stream": stream}, headers=KEY) as response:
            text = await response.text()
        told.append(json.loads(text.split("data: ")[-2] if stream else text))
    ids = [one.get("response", one)["output"][0]["id"] for one in told]
    assert len(household.requests) == 1 and len(set(ids)) == 1
    headers = {**KEY, "Last-Event-ID": "3"}
    async with client.post(PATH, json=ASK, headers=headers) as response:
        assert response.status == 400 and "cannot be resumed" in await response.text()


async def test_it_is_relayed(pair: Pair) -> None:
    async with pair.session.post(PATH, json=ASK) as response:
        first = fits(await response.json())
    events = await streamed(pair.session, previous_response_id=first["id"])
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == pair.laptop.reply
    assert first["temperature"] == pair.laptop.requests[0].sampling.temperature
    assert not pair.mini.requests and "<|assistant|>Hello" in prompt(pair.laptop)
    async with pair.session.post(PATH + "/input_tokens", json=ASK) as response:
        assert (await response.json())["input_tokens"] == len(pair.laptop.requests[0].prompt)
    async with pair.session.post(PATH, json={**ASK, "text": {"format": {
        "type": "json_schema", "name": "x", "schema": {"type": "strin"}}}}) as response:  # fmt: skip
        error = (await response.json())["error"]
    assert (response.status, error["param"], error["code"]) == (400, "text.format", "invalid_schema")
    async with pair.session.post(PATH, json={**ASK, "input": "x" * 400}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"], error["code"]) == (400, "input", "context_length_exceeded")


async def test_tokens_are_counted_without_an_answer(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    count = await ai.responses.input_tokens.count(**ASK, instructions="be brief")
    assert not household.requests
    await ai.responses.create(**ASK, instructions="be brief")
    assert count.input_tokens == len(household.requests[0].prompt)


async def test_an_error_midway(client: aiohttp.ClientSession, ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    events = await streamed(client)
    error, failed = events[-2:]
    assert error["type"] == "error" and error["message"] == error["error"]["message"] == "the engine on jetson died"
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine on jetson died"}
    said = ""
    with pytest.raises(openai.APIError, match="jetson died"):  # noqa: PT012
        async for event in await ai.responses.create(**ASK, stream=True):
            said += event.delta if event.type == "response.output_text.delta" else ""
    assert said == "Hell"
    with pytest.raises(openai.InternalServerError, match="jetson died"):
        await ai.responses.create(**ASK)
    household.error_midway, household.error_at_once = None, OverloadedError("full", 2.0)
    with pytest.raises(openai.RateLimitError, match="full"):
        await ai.responses.create(**ASK, stream=True)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        await ai.responses.create(model="gpt-9", input="hi")


async def test_what_home_assistant_sends(ai: openai.AsyncOpenAI, caller: FakeHousehold) -> None:
    """Its OpenAI integration's fields, and what it reads of the events."""
    items: Any = [
        {"type": "message", "role": "developer", "content": "You are a voice assistant."},
        {"type": "message", "role": "user", "content": "Wetter?"},
        {"type": "function_call", "name": "weather", "arguments": '{"city": "Bonn"}', "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": '{"wet": true}'},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}],
         "encrypted_content": None},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Und Paris?"}]},
    ]  # fmt: skip
    asked: Any = {
        "model": "builtin", "input": items, "max_output_tokens": 3000, "top_p": 1.0, "temperature": 1.0,
        "user": "01KABC", "store": False, "reasoning": {"effort": "low", "summary": "auto"}, "tools": TOOLS,
        "include": ["reasoning.encrypted_content"], "service_tier": "auto", "truncation": "auto",
        "prompt_cache_key": "x", "text": {"verbosity": "medium"},
    }  # fmt: skip
    called, arguments = [], ""
    async for event in await ai.responses.create(**asked, stream=True):
        if event.type == "response.output_item.added" and event.item.type == "function_call":
            arguments = event.item.arguments
        elif event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        elif event.type == "response.function_call_arguments.done":
            called.append(json.loads(arguments))
    assert called == [json.loads(one) for one in ARGUMENTS]
    sent = prompt(caller)
    assert sent.startswith("<|im_start|>system\nYou are a voice assistant.\n\n# Tools")
    assert sent.index("Wetter?") < sent.index('"city": "Bonn"') < sent.index('{"wet": true}') < sent.index("Und Paris?")
    schema = {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"], "strict": True,
              "additionalProperties": False}  # fmt: skip
    form: Any = {"format": {"type": "json_schema", "name": "task", "schema": schema}}
    assert (await ai.responses.create(model="builtin", input="x", text=form)).status == "completed"


async def test_what_the_system_says_is_one_message(ai: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    said: Any = [{"role": role, "content": role} for role in ("system", "developer", "user", "system")]
    await ai.responses.create(model="builtin", input=said, instructions="first")
    said_first = "<s><|system|>first\n\nsystem\n\ndeveloper<|end|>\n<|user|>user<|end|>\n<|system|>system<|end|>"
    assert prompt(household).startswith(said_first)


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA"}
DEEP = json.loads('{"a":' * 252 + "{}" + "}" * 252)
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "model"),
    ({"input": None}, "input", "input is missing"),
    ({"input": []}, "input", "input is missing"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", "input is missing"),
    ({"input": 5}, "input", "input"),
    ({"input": [{"content": "x"}]}, "input[0]", "input[0].type is missing"),
    ({"input": [{"type": "message", "content": "x"}]}, "input[0].role", "role is missing"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "one of assistant, developer, system, user"),
    ({"input": [{"role": "user"}]}, "input[0].content", "a string or a list of text parts"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "'input_image'"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "a string"),
    ({"input": [{"type": "web_search_call"}]}, "input[0]", "'web_search_call'"),
    ({"input": [{**CALL, "arguments": "[]"}]}, "input[0].arguments", "a JSON object"),
    ({"input": [{**CALL, "call_id": ""}]}, "input[0].call_id", "missing"),
    ({"input": [{**CALL, "name": ""}]}, "input[0].name", "missing"),
    ({"input": [CALL, {"type": "function_call_output", "output": "x"}]}, "input[1].call_id", "missing"),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "c"}]}, "input[1].output", "a string"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search'"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
    ({"tools": [*TOOLS, *TOOLS]}, "tools", "same name"),
    ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "no tool 'g'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name", "missing"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": [{"name": "g"}]}}, "tool_choice.tools", "'g'"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.tools", "one tool"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "one of"),
    ({"tools": [{**TOOLS[0], "parameters": {"a": 2**70}}]}, "tools", "too large"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": DEEP}}}, "text.format", "nested"),
    ({"max_tool_calls": 2**70}, "max_tool_calls", "max_tool_calls"),
    ({"background": True}, "background", "not supported"),
    ({"conversation": "conv_1"}, "conversation", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"metadata": {"a": "x" * 513}}, "metadata[...]", "metadata"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "metadata"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"instructions": "x" * 400}, "input", "context"),
]


@pytest.mark.parametrize(("more", "param", "word"), WRONG, ids=range(len(WRONG)))
async def test_bad_input_is_one_line(
    client: aiohttp.ClientSession, household: FakeHousehold, more: dict[str, Any], param: str, word: str
) -> None:
    async with client.post(PATH, json={**ASK, **more}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert word in error["message"] and "\n" not in error["message"]
    assert not household.requests


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=nobody"])
async def test_lists_have_their_bounds(client: aiohttp.ClientSession, query: str) -> None:
    async with client.post(PATH, json=ASK) as response:
        name = (await response.json())["id"]
    async with client.get(f"{PATH}/{name}/input_items?{query}") as response:
        assert response.status == 400 and (await response.json())["error"]["param"] == query.partition("=")[0]
    async with client.get(f"{PATH}/{name}?stream=true") as response:
        assert response.status == 400 and (await response.json())["error"]["param"] == "stream"
