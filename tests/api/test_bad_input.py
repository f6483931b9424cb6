"""Everything a client can get wrong is one clear JSON error, and the device lives on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from peerllm.api import bodies
from peerllm.api.core import generation
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.server import ApiServer
from tests.api.fake import BOUND_S, FakeHousehold

PATH = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "builtin", "messages": HI, **more}


async def test_whole_numbers_may_have_a_point(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    """JSON knows one kind of number, and so do some clients."""
    body = b'{"model": "builtin", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4.0, "top_k": 2e1}'
    async with client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 200
    assert (household.requests[-1].max_tokens, household.requests[-1].sampling.top_k) == (4, 20)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": HI}, "model"),
    ({"model": 5, "messages": HI}, "model"),
    ({"model": "builtin"}, "messages"),
    (ask(messages=[]), "messages"),
    (ask(messages="hi"), "messages"),
    (ask(messages=["hi"]), "messages[0]"),
    (ask(messages=[{"role": "king", "content": "x"}]), "messages[0].role"),
    (ask(messages=[{"role": ["user"], "content": "x"}]), "messages[0].role"),
    (ask(messages=[{"content": "x"}]), "messages[0].role"),
    (ask(messages=[{"role": "user"}]), "messages[0].content"),
    (ask(messages=[{"role": "user", "content": 7}]), "messages[0].content"),
    (ask(messages=[{"role": "user", "content": []}]), "messages[0].content"),
    (ask(messages=[{"role": "user", "content": ["x"]}]), "messages[0].content[0]"),
    (ask(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
    (
        ask(messages=[*HI, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[1].content[0]",
    ),
    (ask(messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].function"),
    (
        ask(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (ask(stream="yes"), "stream"),
    (ask(stream=1), "stream"),
    (ask(stream_options=[]), "stream_options"),
    (ask(stream_options={"include_usage": "x"}), "stream_options.include_usage"),
    (ask(stop=""), "stop"),
    (ask(stop=["a", ""]), "stop[1]"),
    (ask(stop=["a"] * 17), "stop"),
    (ask(stop=[1]), "stop[0]"),
    (ask(stop={"a": 1}), "stop"),
    (ask(stop="x" * 1000), "stop"),
    (ask(temperature="hot"), "temperature"),
    (ask(temperature=-0.1), "temperature"),
    (ask(temperature=True), "temperature"),
    (ask(temperature=1e300), "temperature"),
    (ask(top_p=1.5), "top_p"),
    (ask(top_k=1.5), "top_k"),
    (ask(min_p=[]), "min_p"),
    (ask(repetition_penalty=0), "repetition_penalty"),
    (ask(presence_penalty=1000), "presence_penalty"),
    (ask(frequency_penalty="1"), "frequency_penalty"),
    (ask(seed="x"), "seed"),
    (ask(seed=1.5), "seed"),
    (ask(seed=2**63), "seed"),
    (ask(max_tokens=0), "max_tokens"),
    (ask(max_tokens="5"), "max_tokens"),
    (ask(max_tokens=-1), "max_tokens"),
    (ask(max_completion_tokens=1.5), "max_completion_tokens"),
    (ask(n=17), "n"),
    (ask(n=0), "n"),
    (ask(n="1"), "n"),
    (ask(logprobs=3), "logprobs"),
    (ask(top_logprobs=3), "top_logprobs"),
    (ask(top_logprobs=3, logprobs=False), "top_logprobs"),
    (ask(logprobs=True, top_logprobs=21), "top_logprobs"),
    (ask(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (ask(logit_bias={"5": 1}), "logit_bias"),
    (ask(tools=[{"type": "function"}]), "tools[0].function"),
    (ask(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0].function.name"),
    (ask(tools=[{"type": "function", "function": {"name": "f"}}] * 2), "tools"),
    (ask(tool_choice="required"), "tool_choice"),
    (ask(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    (ask(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (ask(response_format={"type": "regex"}), "response_format.grammar"),
    (ask(response_format={"type": "lark", "grammar": "x" * 70_000}), "response_format"),
    (ask(response_format="json"), "response_format"),
    (ask(modalities=["audio"]), "modalities"),
    (ask(return_token_ids="yes"), "return_token_ids"),
    (ask(user=5), "user"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[f"{i}-{param}" for i, (_, param) in enumerate(WRONG)])
async def test_the_offending_field_is_named(
    client: aiohttp.ClientSession, household: FakeHousehold, body: dict[str, Any], param: str
) -> None:
    async with client.post(PATH, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param.rpartition(".")[2].split("[")[0] in error["message"]
    assert "\n" not in error["message"]
    assert not household.requests


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "input_image", "image_url": "https://example.org/a.png"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "refusal", "refusal": "no"},
    ],
    ids=lambda part: part["type"],
)
async def test_a_part_that_is_no_text_is_refused_before_anything_is_computed(
    client: aiohttp.ClientSession, household: FakeHousehold, part: dict[str, Any]
) -> None:
    content = [{"type": "text", "text": "What is this?"}, part]
    async with client.post(PATH, json=ask(messages=[{"role": "user", "content": content}], stream=True)) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"], error["code"]) == (400, "messages[0].content[1]", "unsupported_content")
    assert f"parts of type '{part['type']}' cannot be read: models read text only here" in error["message"]
    assert not household.requests


@pytest.mark.parametrize(
    "extra",
    [
        {"unknown": {"deep": [1]}},
        {"logprobs": False},
        {"logprobs": False, "top_logprobs": 0},
        {"tools": []},
        {"n": 1},
        {"temperature": None},
        {"stop": None},
        {"stop": []},
        {"response_format": {"type": "text"}},
        {"seed": -1},
        {"user": "me"},
        {"store": True},
        {"metadata": {}},
        {"parallel_tool_calls": True},
        {"logit_bias": {}},
        {"modalities": ["text"]},
        {"temperature": 0},
        {"top_k": 5},
    ],
)
async def test_harmless_fields_pass(client: aiohttp.ClientSession, extra: dict[str, Any]) -> None:
    async with client.post(PATH, json=ask(**extra)) as response:
        assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nul",
        b"[]",
        b"5",
        b'"x"',
        b'{"model": "\xff\xfe"}',
        b"\xff" * 10,
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "\\ud800", "messages": []}',
        b"\x00",
    ],
    ids=range(12),
)
async def test_what_is_not_a_json_object(client: aiohttp.ClientSession, body: bytes) -> None:
    async with client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert "\n" not in error["message"]


async def test_nesting_that_parses_is_refused_without_harm(client: aiohttp.ClientSession) -> None:
    deep = "[" * 900 + "]" * 900
    body = '{"model": "builtin", "messages": ' + deep + "}"
    async with client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "messages[0]")


async def test_a_body_over_the_limit_is_413(client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(ask(padding="x" * bodies.MAX_BODY_BYTES))
    async with client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response:
        error = (await response.json())["error"]
    assert response.status == 413
    assert str(bodies.MAX_BODY_BYTES) in error["message"]


async def test_a_chunked_body_over_the_limit_is_413(client: aiohttp.ClientSession) -> None:
    async def endless() -> Any:
        for _ in range(2 * bodies.MAX_BODY_BYTES // 65536):
            yield b" " * 65536

    async with client.post(PATH, data=endless(), headers={"Content-Type": "application/json"}) as response:
        assert response.status == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_compressed_body_is_refused(client: aiohttp.ClientSession, encoding: str) -> None:
    import zlib

    bomb = zlib.compress(b" " * 50_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    async with client.post(PATH, data=bomb, headers=headers) as response:
        assert response.status in {400, 415}


async def test_a_body_that_never_comes_is_408(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    assert b" 408 " in await asyncio.wait_for(reader.readline(), BOUND_S)
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/static/no.js", 404),
        ("GET", "/static/..%2f..%2f__init__.py", 404),
        ("GET", "/static/../../server.py", 404),
        ("GET", "/v1/models/x%00y", 404),
        ("POST", "/peerllm/v1/nothing", 404),
        ("GET", "/peerllm/v1/run", 405),
    ],
)
async def test_wrong_routes_are_json_too(
    client: aiohttp.ClientSession, token: str, method: str, path: str, status: int
) -> None:
    import yarl

    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    url = yarl.URL(str(client._base_url).rstrip("/") + path, encoded=True)
    async with aiohttp.request(method, url, headers=headers) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01\x00\x00",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"\r\n\r\n\r\n",
    ],
)
async def test_broken_http_does_not_kill_the_server(
    server: ApiServer, client: aiohttp.ClientSession, raw: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(raw)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), BOUND_S)
    assert not answer.startswith(b"HTTP/1.1 200")
    writer.close()
    async with client.get("/v1/models") as response:
        assert response.status == 200


async def test_a_damaged_tokenizer_is_a_clear_400(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    (household.model.model_dir / "tokenizer.json").write_text("{}")
    async with client.post(PATH, json=ask()) as response:
        assert response.status == 400
        assert "tokenizer.json" in (await response.json())["error"]["message"]


async def test_no_tokenizer_is_a_clear_400(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    (household.model.model_dir / "tokenizer.json").unlink()
    async with client.post(PATH, json=ask()) as response:
        assert response.status == 400
        assert "tokenizer.json" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(("given", "used"), [(0, 0), (2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (-(2**63), 0)])
async def test_any_64_bit_seed_is_a_seed(
    client: aiohttp.ClientSession, household: FakeHousehold, given: int, used: int
) -> None:
    """Clients count in both directions; the sampler takes 0 to 2**63 - 1, and no two of a sign fall together."""
    async with client.post(PATH, json=ask(seed=given)) as response:
        assert response.status == 200
    assert household.requests[0].sampling.seed == used


@pytest.mark.parametrize(
    ("body", "beyond"),
    [
        (ask(model="m" * generation.MAX_NAME_CHARS), ask(model="m" * (generation.MAX_NAME_CHARS + 1))),
        (ask(stop="s" * generation.MAX_STOP_CHARS), ask(stop="s" * (generation.MAX_STOP_CHARS + 1))),
        (ask(stop=["s"] * generation.MAX_STOPS), ask(stop=["s"] * (generation.MAX_STOPS + 1))),
        (ask(messages=HI * generation.MAX_MESSAGES), ask(messages=HI * (generation.MAX_MESSAGES + 1))),
        (ask(max_tokens=generation.MAX_TOKENS), ask(max_tokens=generation.MAX_TOKENS + 1)),
        (ask(seed=2**63 - 1), ask(seed=2**63)),
        (ask(seed=-(2**63)), ask(seed=-(2**63) - 1)),
    ],
)
def test_what_is_just_within_a_bound_is_taken_and_what_is_just_beyond_is_not(body: Any, beyond: Any) -> None:
    (wanted,) = bodies.decoded(json.dumps(body).encode(), ChatBody).generations()
    assert wanted.model == body["model"]
    with pytest.raises(FieldError):
        bodies.decoded(json.dumps(beyond).encode(), ChatBody)


async def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(server: ApiServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {bodies.MAX_BODY_BYTES + 1}\r\n\r\n".encode())
    status = await asyncio.wait_for(reader.readline(), BOUND_S)
    assert status.split()[1] == b"413"
    writer.close()


async def test_a_body_of_nothing_but_brackets_is_refused_before_it_is_parsed(client: aiohttp.ClientSession) -> None:
    """Each takes twenty times the memory that it takes in the body."""
    data = b'{"model":"builtin","messages":[' + b"[]," * bodies.MAX_CONTAINERS + b"[]]}"
    assert len(data) < bodies.MAX_BODY_BYTES
    async with client.post(PATH, data=data, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 413 and "brackets" in (await response.json())["error"]["message"]
    text = "[" * 1000
    async with client.post(PATH, json=ask(messages=[{"role": "user", "content": text}])) as response:
        assert response.status == 400 and "brackets" not in (await response.json())["error"]["message"]
