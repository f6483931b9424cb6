"""/v1/messages, with the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from peerllm.api.core import model_wait, own_answer
from peerllm.api.server import ApiServer
from peerllm.api.token import load_or_create_token
from peerllm.daemon.facade import IDLE_MODEL
from peerllm.errors import EngineError, OverloadedError
from tests.api.fake import FakeHousehold
from tests.api.relay_pair import Pair

PATH = "/v1/messages"
ASK: Any = {"model": "builtin", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def claude(server: ApiServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


async def test_a_message_is_answered_whole(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    household.reused = 4
    system = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}}]
    answer = await claude.messages.create(**ASK, system=system, extra_body={"temperature": 0, "top_k": 3})
    assert (answer.type, answer.role, answer.model, answer.id[:4]) == ("message", "assistant", "builtin", "msg_")
    assert [(block.type, block.text) for block in answer.content] == [("text", household.reply)]  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    (asked,) = household.requests
    assert answer.usage.input_tokens == len(asked.prompt)
    assert answer.usage.output_tokens == len(household.ids(household.reply)) + 1
    assert answer.usage.cache_read_input_tokens == 4
    assert (asked.max_tokens, asked.sampling.temperature, asked.sampling.top_k) == (100, 0.0, 3)
    prompt = household.tokenizer.decode(asked.prompt, skip_special_tokens=False)
    assert prompt == "<s><|system|>be\nbrief<|end|>\n<|user|>hi<|end|>\n<|assistant|>"


async def test_a_message_is_streamed(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    async with claude.messages.stream(**ASK) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == household.reply == final.content[0].text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.input_tokens) == ("end_turn", len(household.requests[0].prompt))
    assert final.usage.output_tokens == len(household.ids(household.reply)) + 1


async def test_an_answer_in_a_form(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    await claude.messages.create(**ASK, output_config={"format": {"type": "json_schema", "schema": schema}})
    (asked,) = household.requests
    assert asked.constraint is not None and "on" in asked.constraint.grammar


async def test_a_conversation_that_is_not_kept_is_sent_whole(claude: anthropic.AsyncAnthropic) -> None:
    """The official client starts it anew by itself when it hears this code."""
    await claude.messages.create(**ASK, extra_body={"thread": {"type": "create"}})
    with pytest.raises(anthropic.NotFoundError, match="send all messages") as told:
        await claude.messages.create(**ASK, extra_body={"thread": {"type": "continue", "previous_message_id": "msg_1"}})
    assert told.value.body["error"]["details"] == {"error_code": "thread_not_found"}  # type: ignore[index]


async def test_every_event_has_its_name_and_its_place(client: aiohttp.ClientSession) -> None:
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        events = (await response.text()).removesuffix("\n\n").split("\n\n")
    names = []
    for event in events:
        name, data = event.split("\n")
        names.append(json.loads(data.removeprefix("data: "))["type"])
        assert name == f"event: {names[-1]}"
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [True, False])
async def test_why_it_ended(claude: anthropic.AsyncAnthropic, household: FakeHousehold, stream: bool) -> None:
    async def asked(**more: Any) -> Any:
        if not stream:
            return await claude.messages.create(**{**ASK, **more})
        async with claude.messages.stream(**{**ASK, **more}) as events:
            return await events.get_final_message()

    stopped = await asked(stop_sequences=["zzz", "wör"])
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("Hello, ", "stop_sequence", "wör")
    cut = await asked(max_tokens=5)
    assert (cut.content[0].text, cut.stop_reason, cut.stop_sequence) == ("Hello", "max_tokens", None)


async def test_conversations_leave_out_what_the_model_thought(
    claude: anthropic.AsyncAnthropic, household: FakeHousehold
) -> None:
    thought: Any = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}]
    messages: Any = [{"role": "user", "content": "q"}, {"role": "assistant", "content": thought}, *ASK["messages"]]
    await claude.messages.create(**{**ASK, "messages": messages}, thinking={"type": "disabled"})
    prompt = household.tokenizer.decode(household.requests[0].prompt, skip_special_tokens=False)
    assert "<|assistant|>a<|end|>" in prompt and "hm" not in prompt


async def test_pings_while_nothing_comes(
    claude: anthropic.AsyncAnthropic,
    client: aiohttp.ClientSession,
    household: FakeHousehold,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_answer, "LOOK_S", 0.01)
    monkeypatch.setattr(model_wait, "KEEP_ALIVE_S", 0.02)
    household.gate, household.queued = asyncio.Event(), [3]
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": queued 3\n\n"
        assert await response.content.readuntil(b"\n\n") == b'event: ping\ndata: {"type":"ping"}\n\n'
        household.gate.set()
    async with claude.messages.stream(**ASK) as stream:
        assert await stream.get_final_text() == household.reply, "the client takes no offence"


@pytest.mark.parametrize(
    ("error", "caught", "kind"),
    [
        (OverloadedError("full", 2.0), anthropic.RateLimitError, "rate_limit_error"),
        (EngineError("died"), anthropic.APIStatusError, "overloaded_error"),
    ],
)
async def test_errors_have_its_shape(
    claude: anthropic.AsyncAnthropic, household: FakeHousehold, error: Exception, caught: Any, kind: str
) -> None:
    household.error_at_once = error
    for stream in (True, False):
        with pytest.raises(caught) as found:
            await claude.messages.create(**ASK, stream=stream)
        told = {"type": "error", "error": {"type": kind, "message": str(error)}}
        assert found.value.body == {**told, "request_id": found.value.request_id}
        assert found.value.request_id is not None


async def test_an_error_midway_is_an_event(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    said = ""
    with pytest.raises(anthropic.APIStatusError, match="jetson died"):  # noqa: PT012
        async with claude.messages.stream(**ASK) as stream:
            async for piece in stream.text_stream:
                said += piece
    assert said == household.reply[:4]


async def test_an_unknown_model_is_404(claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="builtin"):
        await claude.messages.create(**{**ASK, "model": "claude-9"})


async def test_a_refusal_says_how_far_the_model_is(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {})
    household.served = [replace(household.model, state="loading", message="loading", progress=0.42)]
    async with client.post(PATH, json=ASK) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["loading"]["percent"]) == (503, "overloaded_error", 42)


async def test_its_key_header_opens_what_is_not_loopback(household: FakeHousehold, tmp_path: Path) -> None:
    server = ApiServer(household, "0.0.0.0", 0, tmp_path / "exposed", in_process=True)
    await server.start()
    try:
        for key, allowed in ((load_or_create_token(tmp_path / "exposed"), True), ("x" * 43, False)):
            async with anthropic.AsyncAnthropic(base_url=server.url, api_key=key, max_retries=0) as client:
                if allowed:
                    assert (await client.messages.create(**ASK)).stop_reason == "end_turn"
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        await client.messages.create(**ASK)
    finally:
        await server.close()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "one of assistant, user"),
    ({"messages": [*ASK["messages"], {"role": "assistant", "content": "{"}]}, "end with one of the user"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"system": 5}, "system"),
    ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "tools[0]: tools of type"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice: there are no tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
    ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [{"name": "g"}]}, "tool_choice: there is no tool 'f'"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "does not support thinking"),
]


@pytest.mark.parametrize(("more", "word"), WRONG, ids=range(len(WRONG)))
async def test_bad_input_is_one_line(
    client: aiohttp.ClientSession, household: FakeHousehold, more: dict[str, Any], word: str
) -> None:
    async with client.post(PATH, json={**ASK, **more}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"]) == (400, "invalid_request_error")
    assert word in error["message"] and "\n" not in error["message"]
    assert not household.requests


async def test_tokens_are_counted_without_an_answer(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    asked = {"model": "builtin", "messages": ASK["messages"], "system": "be brief"}
    count = await claude.messages.count_tokens(**asked)
    assert not household.requests
    assert count.input_tokens == (await claude.messages.create(**{**ASK, **asked})).usage.input_tokens
    with pytest.raises(anthropic.NotFoundError, match="builtin"):
        await claude.messages.count_tokens(**{**asked, "model": "claude-9"})
    with pytest.raises(anthropic.BadRequestError, match="context"):
        await claude.messages.count_tokens(**{**asked, "system": "x" * 400})


async def test_tokens_are_counted_by_the_models_device(pair: Pair) -> None:
    async with pair.session.post(PATH, json=ASK) as response:
        wanted = (await response.json())["usage"]["input_tokens"]
    async with pair.session.post(PATH + "/count_tokens", json={**ASK, "max_tokens": None}) as response:
        assert await response.json() == {"input_tokens": wanted}
    assert len(pair.laptop.requests) == 1


async def test_its_client_lists_models(claude: anthropic.AsyncAnthropic, household: FakeHousehold) -> None:
    idle = replace(household.model, deployment="", name="small", state=IDLE_MODEL, created=0, context=0)
    second = replace(household.model, name="large", created=household.model.created + 60)
    household.served = [household.model, second, idle]
    page = await claude.models.list()
    assert (page.has_more, page.first_id, page.last_id) == (False, "builtin", "small")
    first = page.data[0]
    assert (first.id, first.type, first.display_name, first.lifecycle) == ("builtin", "model", "builtin", "active")
    assert (int(first.created_at.timestamp()), first.max_input_tokens) == (household.model.created, 256)
    assert page.data[2].max_input_tokens is None
    names = [one.id for one in page.data]
    assert [one.id async for one in await claude.models.list(limit=2)] == names == ["builtin", "large", "small"]
    before = await claude.models.list(before_id="small", limit=1)
    assert ([one.id for one in before.data], before.has_more) == (["large"], True)
    assert [one.id for one in (await claude.models.list(after_id="builtin")).data] == ["large", "small"]
    assert (await claude.models.retrieve("large")).id == "large"
    with pytest.raises(anthropic.NotFoundError) as found:
        await claude.models.retrieve("claude-9")
    assert found.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    for wrong in ({"limit": 0}, {"after_id": "claude-9"}):
        with pytest.raises(anthropic.BadRequestError, match=next(iter(wrong))):
            await claude.models.list(**wrong)  # type: ignore[arg-type]


async def test_others_see_openais_list(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/models") as response:
        assert (await response.json())["object"] == "list"
    async with client.get("/v1/models/claude-9") as response:
        assert (await response.json())["error"]["code"] == "model_not_found"
