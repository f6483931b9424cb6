"""Ollama's routes, with the official client, and as Home Assistant and n8n ask."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import ollama
import pytest

from peerllm.api.bodies import decoded
from peerllm.api.core import model_wait, own_answer
from peerllm.api.core.generation import MAX_TOKENS
from peerllm.api.error_answers import FieldError
from peerllm.api.ollama.keep_alive import seconds_of
from peerllm.api.ollama.ollama_requests import GenerateBody
from peerllm.api.server import ApiServer
from peerllm.daemon.facade import ModelDetails
from peerllm.errors import EngineError, OverloadedError
from tests.api.fake import BOUND_S, CONTEXT, TEMPLATE, FakeHousehold, deployment

HI = [{"role": "user", "content": "hi"}]
ASK: Any = {"model": "builtin", "messages": HI}
BUILTIN = "builtin:latest"


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


async def lines(client: aiohttp.ClientSession, path: str, body: Any) -> list[Any]:
    async with client.post(path, json=body) as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson"), await response.text()
        return [json.loads(line) for line in (await response.text()).splitlines()]


async def test_a_chat_is_answered_whole(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    household.reused = 3
    answer = await lama.chat(**ASK, options={"seed": 7, "temperature": 0, "num_predict": 100, "num_ctx": 8192})
    assert (answer.message.role, answer.message.content) == ("assistant", household.reply)
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "builtin")
    (asked,) = household.requests
    assert (asked.sampling.seed, asked.sampling.temperature, asked.max_tokens) == (7, 0.0, 100)
    assert (answer.prompt_eval_count, answer.eval_count) == (len(asked.prompt), len(household.ids(household.reply)) + 1)
    parts = answer.load_duration, answer.prompt_eval_duration, answer.eval_duration
    assert answer.total_duration and all(isinstance(one, int) and one >= 0 for one in parts)
    assert sum(one or 0 for one in parts) <= answer.total_duration
    assert household.tokenizer.decode(asked.prompt, skip_special_tokens=False) == "<s><|user|>hi<|end|>\n<|assistant|>"


async def test_times_are_told_apart(
    lama: ollama.AsyncClient, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter((10.0, 12.0, 17.0))  # the prompt is encoded, the first token is there, the last one
    clock = SimpleNamespace(monotonic=lambda: next(readings), time=lambda: 1.7e9)
    monkeypatch.setattr(own_answer, "time", clock)
    answer = await lama.chat(**ASK)
    assert (answer.prompt_eval_duration, answer.eval_duration) == (2_000_000_000, 5_000_000_000)


async def test_a_chat_is_streamed(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    household.finish = "length"
    parts = [part async for part in await lama.chat(**ASK, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == household.reply
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", len(household.ids(household.reply)))


async def test_what_is_not_said_is_streamed(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    found = await lines(client, "/api/chat", ASK)
    assert len(found) >= 2 and found[-1]["done"] and {one["model"] for one in found} == {"builtin"}


async def test_what_home_assistant_sends(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    for keep_alive in ("300s", -1):
        messages = [{"role": "system", "content": "s"}, *HI, {"role": "assistant", "content": ""}]
        body = {
            "model": BUILTIN, "messages": messages,
            "tools": None, "stream": True, "format": None, "options": {"num_ctx": 8192}, "keep_alive": keep_alive,
            "think": False,
        }  # fmt: skip
        assert (await lines(client, "/api/chat", body))[-1]["done_reason"] == "stop"
    assert household.requests[0] != household.requests[1], "without a seed they differ"


async def test_what_n8n_sends(client: aiohttp.ClientSession) -> None:
    options = {"keep_alive": "5m", "format": "", "num_gpu": -1, "use_mmap": True, "low_vram": None, "mirostat": 0}
    async with client.post("/api/chat", json={**ASK, "stream": False, "options": options}) as response:
        assert response.status == 200


async def test_a_text_is_answered_by_the_template_or_raw(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    answer = await lama.generate(model="builtin", prompt="hi", system="be brief", options={"stop": ["wör"]})
    assert (answer.response, answer.done_reason) == ("Hello, ", "stop")
    parts = [part async for part in await lama.generate(model="builtin", prompt="hi", raw=True, stream=True)]
    assert "".join(part.response for part in parts) == household.reply
    prompts = [household.tokenizer.decode(one.prompt, skip_special_tokens=False) for one in household.requests]
    assert prompts == ["<s><|system|>be brief<|end|>\n<|user|>hi<|end|>\n<|assistant|>", "hi"]


async def test_options_have_our_names_for_the_sampler(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    options = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "presence_penalty": 0.2,
               "frequency_penalty": 0.3, "num_predict": -1, "seed": -1, "stop": "x"}  # fmt: skip
    await lama.chat(**ASK, options=options)
    (request,) = household.requests
    assert request.max_tokens == household.model.context - len(request.prompt), "-1 is as many as there is room for"
    asked = request.sampling
    assert (asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty) == (5, 0.5, 0.1, 1.1)
    assert (asked.presence_penalty, asked.frequency_penalty, asked.seed) == (0.2, 0.3, 2**63 - 1)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_who_says_nothing_waits_until_the_model_is_loaded(
    client: aiohttp.ClientSession, household: FakeHousehold, path: str
) -> None:
    household.served = [replace(household.model, state="loading")]
    household.watched.clear()
    asking = asyncio.create_task(client.post(path, json={"model": BUILTIN, "keep_alive": "5m"}))
    await asyncio.wait_for(household.watched.wait(), BOUND_S)
    assert not asking.done()
    household.served = [household.model]
    household.touch()
    async with await asyncio.wait_for(asking, BOUND_S) as response:
        answer = await response.json()
    assert (answer["done"], answer["done_reason"], answer["model"]) == (True, "load", BUILTIN)
    assert not household.requests


async def test_models_are_listed_and_shown(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    loading = replace(
        household.model, name="owner--m:Q4_K_M", model="owner/m:Q4_K_M", deployment="e" * 32, state="loading"
    )
    directory = household.model.model_dir
    assert directory is not None
    (directory / "LICENSE").write_text("Do as you like.")
    about = ModelDetails.of("llama", 134_515_008, "Q4_K_M", "stored", "float32")
    household.served = [replace(household.model, details=about), loading]
    household.deployments = [deployment()]
    listed = (await lama.list()).models
    assert [one.model for one in listed] == [BUILTIN, "owner--m:Q4_K_M"]
    assert (listed[0].size, listed[0].modified_at is not None) == (36_000_000, True)
    assert len(listed[0].digest or "") == 64 and listed[0].digest != listed[1].digest
    (running,) = (await lama.ps()).models
    assert (running.model, running.context_length, running.size_vram) == (BUILTIN, household.model.context, 0)
    assert running.expires_at is not None and running.expires_at.year > 2100
    for name in ("builtin", BUILTIN):
        shown = await lama.show(name)
        assert shown.capabilities == ["completion", "tools"]
        information: Any = shown.modelinfo
        family = information["general.architecture"]
        assert information[f"{family}.context_length"] == household.model.context
        assert shown.details is not None and shown.details.family == family == "llama"
        assert (shown.details.parameter_size, shown.details.quantization_level) == ("134.52M", "Q4_K_M")
        assert shown.details.format == "gguf" and listed[0].details == running.details == shown.details
        assert information["general.parameter_count"] == 134_515_008
        assert shown.modified_at == listed[0].modified_at and shown.template == TEMPLATE
        assert shown.parameters is not None and "num_ctx" in shown.parameters and "temperature" in shown.parameters
        assert shown.license == "Do as you like."


async def test_another_name_does_not_take_the_place_of_the_models_own(
    lama: ollama.AsyncClient, household: FakeHousehold
) -> None:
    household.served = [replace(household.model, name="a", alias=True), household.model]
    assert [one.model for one in (await lama.list()).models] == [BUILTIN, "a:latest"]
    assert [one.model for one in (await lama.ps()).models] == [BUILTIN]


async def test_it_says_that_it_is_there(client: aiohttp.ClientSession) -> None:
    async with client.head("/") as response:
        assert response.status == 200
    async with client.get("/api/version") as response:
        version = (await response.json())["version"]
    assert tuple(int(part) for part in version.split(".")) >= (0, 6, 4), "older ones are refused by some clients"


async def test_an_unknown_model_is_404(lama: ollama.AsyncClient) -> None:
    for asking in (lama.chat("gpt-9", HI), lama.generate("gpt-9", "x"), lama.show("gpt-9"), lama.chat("gpt-9", [])):
        with pytest.raises(ollama.ResponseError, match="builtin") as caught:
            await asking
        assert caught.value.status_code == 404


async def test_an_error_midway_is_a_line(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    said = ""
    with pytest.raises(ollama.ResponseError, match="jetson died"):  # noqa: PT012
        async for part in await lama.chat(**ASK, stream=True):
            said += part.message.content or ""
            assert not part.done
    assert said == household.reply[:4]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_429(client: aiohttp.ClientSession, household: FakeHousehold, stream: bool) -> None:
    household.error_at_once = OverloadedError("the queue is full", 2.0)
    async with client.post("/api/chat", json={**ASK, "stream": stream}) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "2")
        assert await response.json() == {"error": "the queue is full"}


async def test_a_refusal_says_how_far_the_model_is(
    client: aiohttp.ClientSession, household: FakeHousehold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "PATIENCE_S", {})
    household.served = [replace(household.model, state="loading", message="loading", progress=0.42)]
    async with client.post("/api/chat", json=ASK) as response:
        error = await response.json()
    assert (response.status, error["loading"]["percent"]) == (503, 42)
    assert isinstance(error["error"], str)


async def test_who_waits_hears_nothing_before_the_first_word(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    household.queued = [3, 2]
    assert {len(one["message"]["content"]) > 0 for one in (await lines(client, "/api/chat", ASK))[:-1]} == {True}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"model": 5}, "model"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, "one of assistant, system, tool, user"),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AA=="]}]}, "messages[0].images"),
    ("chat", {"think": True}, "does not support thinking"),
    ("chat", {"think": "high"}, "does not support thinking"),
    ("chat", {"format": {"type": "strin"}}, "Invalid type: strin"),
    ("generate", {"format": {"not": {}}, "raw": True}, 'Unimplemented keys: ["not"]'),
    ("chat", {"format": {"enum": ["x" * 70_000]}}, "format is larger than 64 KiB"),
    ("chat", {"format": "yaml"}, "format must be"),
    ("chat", {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is missing"),
    ("chat", {"options": {"temperature": "hot"}}, "options.temperature"),
    ("chat", {"options": {"top_p": 2}}, "options.top_p"),
    ("chat", {"options": {"keep_alive": "soon"}}, "keep_alive"),
    ("chat", {"keep_alive": "soon"}, "keep_alive"),
    ("chat", {"keep_alive": []}, "keep_alive"),
    ("generate", {"suffix": "x"}, "does not support insert"),
    ("generate", {"context": [1, 999_999]}, "context has a token id"),
    ("generate", {"context": [-1]}, "context[0]"),
    ("generate", {"context": [1] * CONTEXT}, "context"),
    ("generate", {"context": [1], "raw": True}, "raw mode does not support"),
    ("generate", {"system": "x", "raw": True}, "raw mode does not support"),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template is not supported"),
    ("generate", {"images": ["AA=="]}, "images"),
    ("show", {"model": ""}, "model is missing"),
]


@pytest.mark.parametrize(("route", "more", "word"), WRONG, ids=[f"{i}-{one[0]}" for i, one in enumerate(WRONG)])
async def test_bad_input_is_one_line(
    client: aiohttp.ClientSession, household: FakeHousehold, route: str, more: dict[str, Any], word: str
) -> None:
    async with client.post(f"/api/{route}", json={**ASK, "prompt": "x", **more}) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert word in error and "\n" not in error
    assert not household.requests


@pytest.mark.parametrize("path", ["/api/nothing", "/api/chat"])
async def test_wrong_routes_have_the_same_shape(client: aiohttp.ClientSession, path: str) -> None:
    async with client.get(path) as response:
        assert response.status in (404, 405) and isinstance((await response.json())["error"], str)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), ("", None), (0, 0.0), (300, 300.0), (1.5, 1.5), (-1, -1.0), (-300, -1.0), ("300s", 300.0),
     ("5m", 300.0), ("-1", -1.0), ("-1m", -1.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("300", 300.0), ("0", 0.0),
     ("100ms", 0.1), (1e300, -1.0), (float("inf"), -1.0), (10**400, -1.0), (-(10**400), -1.0), ("9" * 60, -1.0)],
)  # fmt: skip
def test_keep_alive(given: Any, seconds: float | None) -> None:
    assert seconds_of(given) == (pytest.approx(seconds) if seconds is not None else None)


def test_more_tokens_than_can_be_counted() -> None:
    """Another device would refuse them."""
    body = decoded(b'{"model": "m", "prompt": "x", "options": {"num_predict": 1%s}}' % (b"0" * 30), GenerateBody)
    assert body.generation().max_tokens == MAX_TOKENS


@pytest.mark.parametrize("given", ["soon", "5 m", "m", "1h30", "--1", "1" * 400, "nan", "inf"])
def test_what_is_no_keep_alive(given: str) -> None:
    with pytest.raises(FieldError, match="keep_alive"):
        seconds_of(given)
