"""The OpenAPI document: every route is in it, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from aiohttp import web

from peerllm.api.routes.api_document import openapi
from peerllm.api.server import create_app
from peerllm.api.streams import LINES
from tests.api.fake import FakeHousehold

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def app(tmp_path: Path) -> web.Application:
    return create_app(FakeHousehold(tmp_path), TOKEN, loopback=True, in_process=True)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method.upper(), path): one for path, some in document["paths"].items() for method, one in some.items()}


def test_every_registered_route_is_described_and_every_described_one_registered(app: web.Application) -> None:
    registered = {(one.method, one.resource.canonical) for one in app.router.routes() if one.resource is not None}
    assert set(operations(openapi(app))) == registered


def test_every_operation_says_what_it_does_under_a_name_of_its_own(app: web.Application) -> None:
    found = operations(openapi(app))
    assert not [key for key, one in found.items() if not one.get("summary")]
    assert not [name for name, count in Counter(one["operationId"] for one in found.values()).items() if count > 1]


async def test_the_document_is_served(client: aiohttp.ClientSession, app: web.Application) -> None:
    async with client.get("/openapi.json") as response:
        assert response.content_type == "application/json"
        document = await response.json()
    assert document == openapi(app)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_beyond_loopback_every_operation_needs_the_token(app: web.Application, tmp_path: Path) -> None:
    open_app = create_app(FakeHousehold(tmp_path), TOKEN, loopback=False, in_process=True)
    needs = [{"bearer": []}, {"key": []}]
    assert all(one["security"] == needs for one in operations(openapi(open_app)).values())
    at_home = {key: one["security"] for key, one in operations(openapi(app)).items()}
    changes = {key for key in at_home if key[0] == "POST" and key[1].startswith("/peerllm/")}
    assert all((found == needs) is (key in changes) for key, found in at_home.items())


def content_of(document: dict[str, Any], response: aiohttp.ClientResponse, text: str) -> tuple[Any, list[Any]]:
    """The schema of a response's content, and what must fit it: the whole, or each line or event."""
    path = next(one for one in document["paths"] if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", one), response.url.path))
    described = document["paths"][path][response.method.lower()]["responses"][str(response.status)]
    schema = described["content"][response.content_type]["schema"]
    if response.content_type == LINES:
        return schema["items"], [json.loads(line) for line in text.splitlines()]
    if response.content_type == "text/event-stream":
        schema = schema["properties"]["data"]
        data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if "anyOf" in schema:
            schema, end = schema["anyOf"]
            assert end == {"enum": [data.pop()]}
        return schema["contentSchema"], [json.loads(one) for one in data]
    return schema, [json.loads(text)]


HI = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
TOLD: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/builtin", None),
    ("GET", "/v1/models/nothing", None),
    ("POST", "/v1/chat/completions", {**HI, "n": 2, "return_token_ids": True}),
    ("POST", "/v1/chat/completions", {**HI, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/chat/completions", {**HI, "model": "nothing"}),
    ("POST", "/v1/completions", {"model": "builtin", "prompt": ["a", "b"]}),
    ("POST", "/v1/completions", {"model": "builtin", "prompt": "a", "stream": True, "echo": True}),
    ("POST", "/v1/embeddings", {"model": "builtin", "input": ["a", "b"]}),
    ("POST", "/v1/embeddings", {"model": "builtin", "input": "a", "encoding_format": "base64"}),
    ("POST", "/v1/responses", {"model": "builtin", "input": "hi", "max_output_tokens": 20}),
    ("POST", "/v1/responses", {"model": "builtin", "input": "hi", "max_output_tokens": 20, "stream": True}),
    ("POST", "/v1/responses", {"model": "builtin", "input": "hi", "previous_response_id": "x"}),
    ("POST", "/v1/messages", HI),
    ("POST", "/v1/messages/count_tokens", HI),
    ("POST", "/v1/messages", {**HI, "stream": True}),
    ("POST", "/v1/messages", {**HI, "max_tokens": 0}),
    ("GET", "/api/version", None),
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("POST", "/api/show", {"model": "builtin"}),
    ("POST", "/api/show", {}),
    ("POST", "/api/chat", HI),
    ("POST", "/api/chat", {**HI, "stream": False}),
    ("POST", "/api/chat", {"model": "builtin"}),
    ("POST", "/api/generate", {"model": "builtin", "prompt": "a"}),
    ("POST", "/api/embed", {"model": "builtin", "input": ["a", "b"]}),
    ("POST", "/api/embeddings", {"model": "builtin", "prompt": "a"}),
    ("POST", "/peerllm/v1/run", {"model": "builtin"}),
    ("POST", "/peerllm/v1/plan", {"model": "builtin"}),
    ("POST", "/peerllm/v1/invite", {}),
    ("GET", "/peerllm/v1/limits", None),
    ("POST", "/peerllm/v1/limits", {"threads": 2, "hours": [60, 120]}),
    ("POST", "/peerllm/v1/limits", {"heads": 2}),
    ("GET", "/peerllm/v1/process", None),
    ("GET", "/peerllm/v1/tokens", None),
    ("POST", "/peerllm/v1/tokens", {"person": "anna"}),
    ("POST", "/peerllm/v1/tokens", {"person": "/"}),
]


async def test_answers_are_as_described(client: aiohttp.ClientSession, app: web.Application) -> None:
    document, headers = openapi(app), {"X-PeerLLM": "page"}
    for method, path, body in TOLD:
        async with client.request(method, path, json=body, headers=headers) as response:
            schema, told = content_of(document, response, await response.text())
        assert told
        checks = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
        for one in told:
            assert not [error.message for error in checks.iter_errors(one)], (method, path, body, one)


async def test_lists_say_when_what_they_have_is_not_as_described(app: web.Application) -> None:
    """The check above can fail."""
    document = openapi(app)
    schema = document["paths"]["/api/tags"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    checks = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    assert not list(checks.iter_errors({"models": []})) and list(checks.iter_errors({"models": [{"name": "x"}]}))
