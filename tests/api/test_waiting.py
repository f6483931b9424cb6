"""A request that comes before its model serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from peerllm.api import expected_model
from peerllm.api.openai import completions, model_wait
from peerllm.api.server import ApiServer
from peerllm.errors import BadInputError
from tests.api.fake import BOUND_S, FakeHousehold

PATH = "/v1/chat/completions"
ASK: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}
PLANNED: dict[str, Any] = {"state": "planning", "model_dir": None, "context": 0, "stop_ids": ()}


def become(household: FakeHousehold, **what: Any) -> None:
    household.served = [replace(household.model, **what)]
    household.touch()


@pytest.fixture
async def asking(client: aiohttp.ClientSession, household: FakeHousehold) -> AsyncIterator[asyncio.Task[Any]]:
    """A question that came while the model was planned; it waits."""

    async def ask() -> tuple[int, Any, Any]:
        async with client.post(PATH, json=ASK) as response:
            return response.status, await response.json(), response.headers.get("Retry-After")

    household.watched.clear()
    become(household, **PLANNED, message="looking for builtin")
    task = asyncio.create_task(ask())
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    yield task
    task.cancel()
    await asyncio.wait({task})


async def test_it_is_answered_when_the_model_serves(asking: asyncio.Task[Any], household: FakeHousehold) -> None:
    become(household, state="loading")
    assert not household.requests
    become(household)
    status, answer, _ = await asyncio.wait_for(asking, BOUND_S)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, household.reply)


async def test_a_stream_tells_what_it_waits_for(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    become(household, **PLANNED, message="downloading\r\nbuiltin: 42%", progress=0.42)
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": downloading builtin: 42%\n\n"
        become(household, state="loading", message="loading on laptop", progress=0.5)
        async with asyncio.timeout(BOUND_S):
            while await response.content.readuntil(b"\n\n") != b": loading on laptop (50%)\n\n":
                pass
        become(household)
        rest = await response.text()
    assert rest.endswith("data: [DONE]\n\n")


async def test_silence_is_broken_while_nothing_changes(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PROGRESS_S", 0.01)
    become(household, **PLANNED)
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        for _ in range(3):
            assert await response.content.readuntil(b"\n\n") == b": planning\n\n"


@pytest.mark.parametrize("state", ["planning", "loading", "waiting"])
async def test_patience_ends(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    assert model_wait.PATIENCE_S[state] > 0
    monkeypatch.setattr(model_wait, "PATIENCE_S", {state: 0.05})
    monkeypatch.setattr(model_wait, "PROGRESS_S", 0.01)
    become(household, **{**PLANNED, "state": state}, reason="1 GB is missing")
    async with client.post(PATH, json=ASK) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        message = (await response.json())["error"]["message"]
    assert message == f"the model 'builtin' cannot answer now, it is {state}: 1 GB is missing"


async def test_a_stream_that_said_something_ends_with_an_error_event(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {"planning": 0.05})
    monkeypatch.setattr(model_wait, "PROGRESS_S", 0.01)
    become(household, **PLANNED)
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        last = (await response.text()).removesuffix("\n\n").split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["status"], "is planning" in error["message"]) == (503, True)


async def test_a_model_that_waits_for_a_device_may_be_back_at_once(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.watched.clear()
    become(household, state="waiting", reason="jetson is gone")
    task = asyncio.create_task(client.post(PATH, json={**ASK, "stream": True}))
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    become(household)
    async with await asyncio.wait_for(task, BOUND_S) as response:
        assert not (await response.text()).startswith(":"), "nothing was said, so that it could still have been a 503"


async def test_a_model_that_fails_says_why(asking: asyncio.Task[Any], household: FakeHousehold) -> None:
    become(household, **{**PLANNED, "state": "failed"}, reason="4 GB are missing")
    status, answer, retry = await asyncio.wait_for(asking, BOUND_S)
    assert (status, retry) == (503, "5")
    assert "4 GB are missing" in answer["error"]["message"]


async def test_a_model_that_is_given_up_is_no_unknown_one(asking: asyncio.Task[Any], household: FakeHousehold) -> None:
    household.served = []
    household.touch()
    status, answer, _ = await asyncio.wait_for(asking, BOUND_S)
    assert status == 503
    assert "stopped or could not be started" in answer["error"]["message"]


async def test_a_client_that_hangs_up_waits_no_more(asking: asyncio.Task[Any], household: FakeHousehold) -> None:
    household.unwatched.clear()
    asking.cancel()
    await asyncio.wait_for(household.unwatched.wait(), BOUND_S)


async def test_shutting_down_while_it_waits_is_an_error_event(
    client: aiohttp.ClientSession, household: FakeHousehold, server: ApiServer
) -> None:
    become(household, **PLANNED)
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await server.close()
        assert "shutting down" in await response.text()


async def test_who_waits_counts_as_a_stream(
    client: aiohttp.ClientSession, household: FakeHousehold, asking: asyncio.Task[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.api.tasks.MAX_STREAMS", 1)
    async with client.post(PATH, json=ASK) as response:
        assert response.status == 429
    become(household)
    assert (await asyncio.wait_for(asking, BOUND_S))[0] == 200
    async with client.post(PATH, json=ASK) as response:
        assert response.status == 200, "the one before has made room"


@pytest.fixture
async def starting(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """At a device that was started in order to run /models/tiny, which it does not yet."""
    household.served = []
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", expected="/models/tiny", in_process=True)
    await server.start()
    async with aiohttp.ClientSession(server.url) as session:
        yield session
    await server.close()


async def listed(client: aiohttp.ClientSession) -> list[tuple[str, str]]:
    async with client.get("/v1/models") as response:
        return [(one["id"], one["state"]) for one in (await response.json())["data"]]


@pytest.mark.parametrize("name", ["tiny", "/models/tiny"])
async def test_a_model_that_is_about_to_be_started_is_waited_for(
    starting: aiohttp.ClientSession, household: FakeHousehold, name: str
) -> None:
    assert await listed(starting) == [("tiny", "planning")]
    household.watched.clear()
    task = asyncio.create_task(starting.post(PATH, json={**ASK, "model": name}))
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    become(household, name="tiny", model="/models/tiny")
    assert (await asyncio.wait_for(task, BOUND_S)).status == 200
    assert await listed(starting) == [("tiny", "serving")], "once"


@pytest.mark.parametrize("error", [None, BadInputError("it cannot be read")])
async def test_it_is_expected_no_more_once_it_was_run(
    starting: aiohttp.ClientSession,
    household: FakeHousehold,
    error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_wait, "UNKNOWN_S", 0.01)
    household.run_error = error
    for model, left in (("another", [("tiny", "planning")]), ("/models/tiny", [])):
        async with starting.post("/peerllm/v1/run", json={"model": model}, headers={"X-PeerLLM": "test"}) as response:
            await response.text()
        assert await listed(starting) == left
    async with starting.post(PATH, json={**ASK, "model": "tiny"}) as response:
        assert response.status == 404


async def test_a_question_just_before_run_is_typed_waits_for_it(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.served, household.run_gate = [], asyncio.Event()
    household.watched.clear()
    asking = asyncio.create_task(client.post(PATH, json=ASK))
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    running = asyncio.create_task(client.post("/peerllm/v1/run", json={"model": "builtin"}, headers={"X-PeerLLM": "1"}))
    async with asyncio.timeout(BOUND_S):
        while not household.runs:
            household.watched.clear()
            household.touch()
            await household.watched.wait()
    assert await listed(client) == [("builtin", "planning")], "before there is a deployment"
    become(household)
    assert (await asyncio.wait_for(asking, BOUND_S)).status == 200
    household.run_gate.set()
    await asyncio.wait_for(running, BOUND_S)


async def test_an_unknown_name_is_404_at_once_where_there_are_models(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "UNKNOWN_S", 2 * BOUND_S)
    async with asyncio.timeout(BOUND_S), client.post(PATH, json={**ASK, "model": "gpt-9"}) as response:
        assert response.status == 404


async def test_a_refusal_says_how_far_the_model_is(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {})
    become(household, **{**PLANNED, "state": "loading"}, message="loading on laptop", progress=0.426)
    async with client.post(PATH, json=ASK) as response:
        error = (await response.json())["error"]
    assert error["loading"] == {"stage": "loading", "percent": 43, "message": "loading on laptop"}
    assert "missing_bytes" not in error
    become(household, state="waiting", reason="builtin needs 1.2 GB more", missing_bytes=1_200_000_000)
    async with client.post(PATH, json=ASK) as response:
        error = (await response.json())["error"]
    assert error["missing_bytes"] == 1_200_000_000 and "loading" not in error and response.headers["Retry-After"]


async def test_who_waits_long_for_a_device_is_told(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_wait.PATIENCE_S["waiting"] > model_wait.QUIET_S
    monkeypatch.setattr(model_wait, "QUIET_S", 0.02)
    monkeypatch.setattr(model_wait, "PROGRESS_S", 0.01)
    become(household, state="waiting", reason="jetson is gone")
    async with client.post(PATH, json={**ASK, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": jetson is gone\n\n"


def test_a_model_is_expected_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(expected_model, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = expected_model.ExpectedModel("builtin")
    clock[0] = expected_model.EXPECTED_S - 0.1
    assert [one.name for one in found.models()] == ["builtin"]
    clock[0] = expected_model.EXPECTED_S
    assert not found.models()


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "a long random one"}])
async def test_an_answer_that_is_held_up_midway_says_why(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    monkeypatch.setattr(completions, "LOOK_S", 0.01)
    household.middle = asyncio.Event()
    gone = "mini-pc is gone; laptop and jetson take over its layers"
    async with asyncio.timeout(BOUND_S), client.post(PATH, json={**ASK, "stream": True}, headers=key) as response:
        text = b""
        while text.count(b"data: ") < 2:
            text += await response.content.readuntil(b"\n\n")
        become(household, state="loading", message=gone, progress=0.5)
        text += await comment(response, gone + " (50%)")
        become(household, state="loading", message=gone, progress=1.0)
        text += await comment(response, gone)
        become(household, state="waiting", reason="waiting for mini-pc to come back: 8 MB are missing")
        text += await comment(response, "waiting for mini-pc to come back: 8 MB are missing")
        become(household, message="computing again what mini-pc held")
        text += await comment(response, "computing again what mini-pc held")
        become(household)
        text += await comment(response, "working")
        household.middle.set()
        text += await response.read()
    events = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == household.reply
    assert text.count(b"\n: ") == 5, "what does not change is not said again"


async def comment(response: aiohttp.ClientResponse, words: str) -> bytes:
    """What comes up to this comment."""
    text = b""
    while not text.endswith(f": {words}\n\n".encode()):
        text += await response.content.readuntil(b"\n\n")
    return text


async def test_what_holds_an_answer_up_is_repeated_to_keep_the_connection(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "LOOK_S", 0.01)
    monkeypatch.setattr(model_wait, "KEEP_ALIVE_S", 0.02)
    household.gate = asyncio.Event()
    async with asyncio.timeout(BOUND_S), client.post(PATH, json={**ASK, "stream": True}) as response:
        for words in (b": working\n\n", b": working\n\n"):
            assert await response.content.readuntil(b"\n\n") == words
        become(household, state="waiting", reason="jetson is gone")
        await comment(response, "jetson is gone")
        assert await response.content.readuntil(b"\n\n") == b": jetson is gone\n\n"
        become(household, state="stopped", reason="mini-pc goes on with it")
        await comment(response, "working")
        household.served = []
        assert await response.content.readuntil(b"\n\n") == b": working\n\n", "running answers go on"
        household.gate.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_the_same_words_are_said_again_when_it_waits_again(
    household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Sink:
        async def comment(self, text: str) -> None:
            said.append(text)

    monkeypatch.setattr(model_wait, "find_model", lambda *_, only_here: household.served[0])
    words: Any = model_wait.WaitingWords(None, "builtin", Sink())  # type: ignore[arg-type]
    become(household, message="nothing is heard of jetson, answers wait")
    await words.nothing_came()
    await words.nothing_came()
    words.tokens_came()
    await words.nothing_came()
    assert said == ["nothing is heard of jetson, answers wait"] * 2


async def test_the_reason_why_it_waits_is_said_once(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {})
    become(household, state="waiting", reason="waiting for jetson to come back: 8 MB are missing")
    async with client.post(PATH, json=ASK) as response:
        message = (await response.json())["error"]["message"]
    assert message == "the model 'builtin' cannot answer now, waiting for jetson to come back: 8 MB are missing"


def test_models_that_never_came_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(expected_model.time, "monotonic", lambda: now)
    expected = expected_model.ExpectedModel("")
    for number in range(expected_model.MAX_EXPECTED + 1):
        expected.expect(f"model {number}")
    assert len(expected.models()) == expected_model.MAX_EXPECTED
    now = expected_model.EXPECTED_S
    expected.expect("another")
    assert [one.model for one in expected.models()] == ["another"] and len(expected._until) == 1
