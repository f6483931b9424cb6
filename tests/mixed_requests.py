"""Requests of every kind that the three APIs take, each with what its answer must be: for loads of many at once."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import aiohttp
from jsonschema import validate

MODEL = "builtin"
QUESTIONS = ("What are you?", "Tell me a story.", "Hello!", "What is 3 plus 4?")
TEXTS = ("a small house", "rain")
TOKENS = 10
LONG = 400  # tokens: far from over when its client hangs up
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
SCHEMA = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    "required": ["warm", "level"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}

Check = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Alone:
    """What the model says where nobody else asks."""

    answers: dict[str, str]
    told_of_tools: dict[str, str]
    continued: dict[str, str]
    vectors: list[list[float]]


@dataclass(frozen=True, slots=True)
class Request:
    """`hangs_up`: its client leaves when the first bytes of the answer have come."""

    kind: str
    path: str
    body: Any = None  # None: GET; bytes: as they are
    status: int = 200
    check: Check = field(default=lambda _: None)
    hangs_up: bool = False


async def sent(session: aiohttp.ClientSession, url: str, one: Request) -> str:
    """ "" if the answer is what it must be, else what is wrong with it."""
    data = one.body if isinstance(one.body, bytes) else json.dumps(one.body).encode()
    headers = {"Content-Type": "application/json"}
    asking = (
        session.get(url + one.path) if one.body is None else session.post(url + one.path, data=data, headers=headers)
    )
    got = b""
    try:
        async with asking as response:
            if one.hangs_up and response.status == one.status:
                await response.content.readany()
                return ""
            got = await response.read()
            assert response.status == one.status, f"status {response.status}"
        one.check(got)
    except (AssertionError, aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
        return f"{one.kind} at {url}: {type(error).__name__} {str(error)[:300]} in {got[:600]!r}"
    return ""


async def alone(session: aiohttp.ClientSession, url: str) -> Alone:
    """Each question by itself."""

    async def post(path: str, body: Any) -> Any:
        async with session.post(url + path, json=body) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    answers, told, continued = dict[str, str](), dict[str, str](), dict[str, str]()
    for question in QUESTIONS:
        answers[question] = _said(await post(CHAT, _chat(question)))
        told[question] = _said(await post(CHAT, _chat(question, tools=_tools())))
        continued[question] = (await post(COMPLETIONS, _greedy(prompt=question)))["choices"][0]["text"]
    made = await post("/v1/embeddings", {"model": MODEL, "input": list(TEXTS)})
    return Alone(answers, told, continued, [one["embedding"] for one in made["data"]])


def requests(known: Alone) -> Iterator[Request]:
    """All kinds in turn, without an end."""
    while True:
        for question in QUESTIONS:
            yield from _good(question, known)
            yield from _bad(question)


def mixed(known: Alone, count: int) -> list[Request]:
    return list(islice(requests(known), count))


def _good(question: str, known: Alone) -> Iterator[Request]:
    answer = known.answers[question]
    messages = [{"role": "user", "content": question}]
    yield Request("chat", CHAT, _chat(question), check=_is(_said, answer))
    yield Request("chat streamed", CHAT, _chat(question, stream=True), check=_streams(_chat_delta, answer))
    tools, told = _chat(question, tools=_tools(), stream=True), known.told_of_tools[question]
    yield Request("tools", CHAT, tools, check=_streams(_chat_delta, told))
    form = {"type": "json_schema", "json_schema": {"name": "room", "schema": SCHEMA}}
    in_form = {**_chat(question, response_format=form), "max_tokens": 40, "temperature": 1}
    yield Request("schema", CHAT, in_form, check=_fits)
    yield Request("chat, hung up", CHAT, {**_chat(question, stream=True), "max_tokens": LONG}, hangs_up=True)
    several = _greedy(prompt=question, n=2)
    yield Request("completions", COMPLETIONS, several, check=_twice(known.continued[question]))
    streamed = _greedy(prompt=question, stream=True)
    yield Request("completions streamed", COMPLETIONS, streamed, check=_streams(_text, known.continued[question]))
    yield Request("embeddings", "/v1/embeddings", {"model": MODEL, "input": list(TEXTS)}, check=_vectors(known))
    options = {"temperature": 0, "num_predict": TOKENS}
    lama = {"model": MODEL, "messages": messages, "options": options}
    yield Request("ollama chat", "/api/chat", {**lama, "stream": False}, check=_is(_lama_said, answer))
    yield Request("ollama chat streamed", "/api/chat", lama, check=_lines(_lama_said, answer))
    asked = {"model": MODEL, "prompt": question, "options": options}
    yield Request("ollama generate", "/api/generate", {**asked, "stream": False}, check=_is(_generated, answer))
    long = {**asked, "options": {"num_predict": LONG}}
    yield Request("ollama generate, hung up", "/api/generate", long, hangs_up=True)
    in_form = {**lama, "format": SCHEMA, "stream": False, "options": {"temperature": 1, "num_predict": 40}}
    yield Request("ollama schema", "/api/chat", in_form, check=_fits)
    yield Request("ollama embed", "/api/embed", {"model": MODEL, "input": list(TEXTS)}, check=_embedded(known))
    yield Request("tags", "/api/tags", check=_lists)
    yield Request("ps", "/api/ps", check=_lists)
    yield Request(
        "show", "/api/show", {"model": MODEL}, check=_is(lambda one: "completion" in one["capabilities"], True)
    )
    yield Request("models", "/v1/models", check=_is(lambda one: one["data"][0]["id"], MODEL))
    claude = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    yield Request("messages", MESSAGES, claude, check=_is(_claude_said, answer))
    yield Request("messages streamed", MESSAGES, {**claude, "stream": True}, check=_streams(_claude_delta, answer))
    long = {**claude, "max_tokens": LONG, "stream": True}
    yield Request("messages, hung up", MESSAGES, long, hangs_up=True)


def _bad(question: str) -> Iterator[Request]:
    yield Request("no JSON", CHAT, b'{"model": ', 400, _is(lambda one: one["error"]["type"], "invalid_request_error"))
    no_model = {**_chat(question), "model": "nobody"}
    yield Request("no such model", CHAT, no_model, 404, _is(lambda one: one["error"]["code"], "model_not_found"))
    wrong = {"model": MODEL, "messages": 1}
    yield Request("ollama, wrong type", "/api/chat", wrong, 400, _is(lambda one: "messages" in one["error"], True))
    hot = {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": -1}
    yield Request("anthropic, bad", MESSAGES, hot, 400, _is(lambda one: one["error"]["type"], "invalid_request_error"))
    long = _chat(question * 2000)
    too_long = _is(lambda one: one["error"]["code"], "context_length_exceeded")
    yield Request("too long", CHAT, long, 400, too_long)


def _greedy(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, **more}


def _chat(question: str, **more: Any) -> dict[str, Any]:
    return _greedy(messages=[{"role": "user", "content": question}], **more)


def _tools() -> list[Any]:
    return [{"type": "function", "function": FUNCTION}]


# ---- what answers say --------------------------------------------------------------------------------------------


def _is(read: Callable[[Any], Any], wanted: Any) -> Check:
    def check(raw: bytes) -> None:
        found = read(json.loads(raw))
        assert found == wanted, f"{found!r}, not {wanted!r}"

    return check


def _streams(read: Callable[[Any], str], wanted: str) -> Check:
    """SSE up to its last event."""

    def check(raw: bytes) -> None:
        lines = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]" or json.loads(lines[-1]).get("type") == "message_stop", "no end"
        found = "".join(read(json.loads(line)) for line in lines if line != "[DONE]")
        assert found == wanted, f"{found!r}, not {wanted!r}"

    return check


def _lines(read: Callable[[Any], str], wanted: str) -> Check:
    def check(raw: bytes) -> None:
        events = [json.loads(line) for line in raw.splitlines()]
        assert [one["done"] for one in events] == [*[False] * (len(events) - 1), True]
        found = "".join(map(read, events))
        assert found == wanted, f"{found!r}, not {wanted!r}"

    return check


def _said(one: Any) -> str:
    return str(one["choices"][0]["message"]["content"] or "")


def _chat_delta(one: Any) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in one["choices"])


def _text(one: Any) -> str:
    return "".join(choice["text"] for choice in one["choices"])


def _lama_said(one: Any) -> str:
    return str(one["message"]["content"])


def _generated(one: Any) -> str:
    return str(one["response"])


def _claude_said(one: Any) -> str:
    return "".join(block["text"] for block in one["content"])


def _claude_delta(one: Any) -> str:
    return str(one["delta"]["text"]) if one["type"] == "content_block_delta" else ""


def _twice(wanted: str) -> Check:
    return _is(lambda one: [choice["text"] for choice in one["choices"]], [wanted] * 2)


def _fits(raw: bytes) -> None:
    one = json.loads(raw)
    text = _said(one) if "choices" in one else _lama_said(one)
    validate(json.loads(text), SCHEMA)


def _lists(raw: bytes) -> None:
    assert [one["name"] for one in json.loads(raw)["models"]][:1] == [f"{MODEL}:latest"]


def _vectors(known: Alone) -> Check:
    return _is(
        lambda one: [_rounded(vector["embedding"]) for vector in one["data"]], list(map(_rounded, known.vectors))
    )


def _embedded(known: Alone) -> Check:
    return _is(lambda one: list(map(_rounded, one["embeddings"])), list(map(_rounded, known.vectors)))


def _rounded(vector: Sequence[float]) -> bytes:
    """As 32-bit numbers, which is what they are."""
    return struct.pack(f"{len(vector)}f", *vector)


async def at_once(session: aiohttp.ClientSession, urls: Sequence[str], asked: Sequence[Request]) -> list[str]:
    """Send all, each to one of the devices in turn; what is wrong with the answers."""
    sending = [sent(session, urls[place % len(urls)], one) for place, one in enumerate(asked)]
    return [wrong for wrong in await asyncio.gather(*sending) if wrong]
