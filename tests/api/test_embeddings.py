"""Vectors of texts, with the official clients: both APIs, here and at another device."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import ollama
import openai
import pytest

from peerllm.api.core import asking, embeddings
from peerllm.api.ollama import embed_requests
from peerllm.api.openai import embedding_requests
from peerllm.api.server import ApiServer
from peerllm.api.text.pooling_file import pooling_of
from peerllm.errors import EngineError, ModelError, UnavailableError
from tests.api.fake import BOUND_S, CONTEXT, FakeHousehold


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


@pytest.fixture
async def official(server: ApiServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def unit(numbers: list[float]) -> Any:
    length = math.sqrt(sum(one * one for one in numbers))
    return pytest.approx([one / length for one in numbers], rel=1e-6)


def raw(household: FakeHousehold, text: str) -> list[float]:
    """As the fake household has it."""
    found = household.ids(text)
    return [float(len(found)), float(found[-1]), 2.0, -4.0]


async def test_openai_in_order_of_length_one(official: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    texts = [f"{'x' * (number + 1)}" for number in range(11)]
    made = await official.embeddings.create(model="builtin", input=texts)  # the client asks for base64
    assert [one.index for one in made.data] == list(range(11)) and made.model == "builtin"
    for one, text in zip(made.data, texts, strict=True):
        assert one.embedding == unit(raw(household, text))
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(range(1, 12))
    assert {(request.pool, request.max_tokens, request.kept) for request in household.requests} == {("mean", 1, "")}


@pytest.mark.parametrize("given", [[5, 6, 7], [[5, 6, 7]], [[5, 6, 7], [8]], ["ab", [5, 6]]])
async def test_token_ids_are_taken_as_they_are(
    official: openai.AsyncOpenAI, household: FakeHousehold, given: Any
) -> None:
    made = await official.embeddings.create(model="builtin", input=given, encoding_format="float")
    first = given if isinstance(given[0], int) else given[0]
    ids = household.ids(first) if isinstance(first, str) else first
    assert made.data[0].embedding == unit([len(ids), ids[-1], 2.0, -4.0])
    assert len(made.data) == (1 if isinstance(given[0], int) else len(given))


async def test_dimensions_and_base64(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    body = {"model": "builtin", "input": "abc", "dimensions": 3, "encoding_format": "base64"}
    async with client.post("/v1/embeddings", json=body) as response:
        (one,) = (await response.json())["data"]
    numbers = list(struct.unpack("<3f", base64.b64decode(one["embedding"])))
    assert numbers == unit((raw(household, "abc"))[:3])


async def test_ollama_both_ways(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    made = await lama.embed("builtin", ["abc", "de"], keep_alive="1m", dimensions=2)
    assert [list(one) for one in made.embeddings] == [unit((raw(household, text))[:2]) for text in ("abc", "de")]
    assert made.prompt_eval_count == 5 and {one.keep_alive_s for one in household.requests} == {60.0}
    older = await lama.embeddings("builtin", "abc")
    assert list(older.embedding) == raw(household, "abc"), "as long as it is"
    assert (await lama.embed("builtin", "")).embeddings == []
    assert (await lama.embeddings("builtin", "")).embedding == []
    assert [call[0] for call in household.calls] == ["keep", "keep"]


async def test_what_is_too_long_is_cut_or_refused(
    lama: ollama.AsyncClient, official: openai.AsyncOpenAI, household: FakeHousehold
) -> None:
    await lama.embed("builtin", "x" * 3 * CONTEXT)
    assert len(household.requests[-1].prompt) == CONTEXT - 1
    with pytest.raises(ollama.ResponseError, match="context"):
        await lama.embed("builtin", "x" * 3 * CONTEXT, truncate=False)
    for given in ("x" * CONTEXT, [1] * CONTEXT):
        with pytest.raises(openai.BadRequestError, match="context") as refused:
            await official.embeddings.create(model="builtin", input=given)
        assert refused.value.param == "input"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "input"), ({"input": []}, "input"), ({"input": ""}, "input is empty"), ({"input": [1, "a"]}, "input"),
        ({"input": [[]]}, "input"), ({"input": [999_999]}, "token id"), ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"), ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ["a"] * (embeddings.MAX_INPUTS + 1)}, "at most"),
    ],
)  # fmt: skip
async def test_what_cannot_be_embedded(client: aiohttp.ClientSession, body: dict[str, Any], where: str) -> None:
    async with client.post("/v1/embeddings", json={"model": "builtin", **body}) as response:
        assert response.status == 400, await response.text()
        told = (await response.json())["error"]["message"]
        assert any(word in told for word in where.split("|")), told


async def test_the_first_that_fails_ends_all(official: openai.AsyncOpenAI, household: FakeHousehold) -> None:
    household.error_at_once = EngineError("it broke")
    with pytest.raises(openai.InternalServerError, match="it broke"):
        await official.embeddings.create(model="builtin", input=["a"] * 9)
    assert len(household.requests) <= embeddings.AT_ONCE


async def test_all_vectors_are_bounded(client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source may say that they have a million numbers each."""
    monkeypatch.setattr(embeddings, "MAX_NUMBERS", 20)  # the fake household's have 4
    for texts, status in ((5, 200), (6, 400)):
        async with client.post("/v1/embeddings", json={"model": "builtin", "input": ["a"] * texts}) as response:
            assert response.status == status, await response.text()


@pytest.mark.parametrize(("path", "module"), [("/v1/embeddings", embedding_requests), ("/api/embed", embed_requests)])
async def test_many_are_told_beside_the_loop(
    client: aiohttp.ClientSession, path: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, in which nobody else would be answered."""
    threads = set[str]()

    def noted(vector: Any, dimensions: int | None) -> Any:
        threads.add(threading.current_thread().name)
        return embeddings.unit(vector, dimensions)

    monkeypatch.setattr(module, "unit", noted)
    async with client.post(path, json={"model": "builtin", "input": ["a", "b"]}) as response:
        assert response.status == 200, await response.text()
    assert threads and threading.main_thread().name not in threads


async def test_another_device_computes_them(
    client: aiohttp.ClientSession, household: FakeHousehold, successor: tuple[aiohttp.ClientSession, FakeHousehold]
) -> None:
    _, other = successor
    body = {"model": "builtin", "input": ["abc", "de"]}
    async with client.post("/v1/embeddings", json=body) as response:
        here = await response.json()
    household.requests.clear()
    async with other.control_port() as url:
        household.peers["b" * 64] = url
        household.served = [replace(household.model, source="b" * 64, model_dir=None)]
        async with client.post("/v1/embeddings", json=body) as response:
            assert await response.json() == here
    assert not household.requests and len(other.requests) == 2


async def test_the_device_that_goes_on_with_a_model_embeds_for_it(
    client: aiohttp.ClientSession,
    household: FakeHousehold,
    successor: tuple[aiohttp.ClientSession, FakeHousehold],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    _, other = successor
    household.gate = asyncio.Event()
    body = {"model": "builtin", "input": "abc", "encoding_format": "float"}
    async with other.control_port() as url:
        household.peers["b" * 64] = url
        asked = asyncio.create_task(client.post("/v1/embeddings", json=body))
        await household.asked.wait()
        household.served = [replace(household.model, source="b" * 64, model_dir=None)]
        household.error_in_gate = UnavailableError("mini-pc serves builtin now; ask again")
        household.gate.set()
        async with asyncio.timeout(BOUND_S), await asked as response:
            (made,) = (await response.json())["data"]
    assert made["embedding"] == unit(raw(household, "abc")) and len(other.requests) == 1


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        (None, "mean"), ("{", "mean"), ("[]", "mean"), ("{}", "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, None),
    ],
)  # fmt: skip
async def test_the_files_say_how_to_pool(
    client: aiohttp.ClientSession, household: FakeHousehold, said: Any, pooling: str | None
) -> None:
    directory = household.model.model_dir
    assert directory is not None
    if said is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    async with client.post("/v1/embeddings", json={"model": "builtin", "input": "a"}) as response:
        assert response.status == (200 if pooling else 400), await response.text()
    assert [one.pool for one in household.requests] == ([pooling] if pooling else [])


def test_a_pooling_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="max_tokens"):
        pooling_of(tmp_path)
