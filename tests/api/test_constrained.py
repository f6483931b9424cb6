"""What each API says of an answer's form reaches the engine as one grammar; what cannot be kept is refused."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from tests.api.fake import FakeHousehold

MESSAGES = [{"role": "user", "content": "Who?"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
CHAT, OLLAMA = "/v1/chat/completions", "/api/chat"
NAMED = {"type": "json_schema", "json_schema": {"name": "who", "strict": True, "schema": SCHEMA}}


def schema_of(household: FakeHousehold) -> Any:
    """That of the last request's grammar."""
    constraint = household.requests[-1].constraint
    assert constraint is not None and constraint.tokenizer.endswith("tokenizer.json")
    (grammar,) = json.loads(constraint.grammar)["grammars"]
    return {name: value for name, value in grammar["json_schema"].items() if name != "x-guidance"}


@pytest.mark.parametrize(
    ("path", "fields", "schema"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, {"type": "object"}),
        (CHAT, {"response_format": NAMED}, SCHEMA),
        (OLLAMA, {"format": "json"}, {"type": "object"}),
        (OLLAMA, {"format": SCHEMA}, SCHEMA),
        (OLLAMA, {"options": {"format": SCHEMA}}, SCHEMA),
        ("/api/generate", {"prompt": "Who?", "format": SCHEMA}, SCHEMA),
    ],
)
async def test_a_schema_reaches_the_engine(
    client: aiohttp.ClientSession, household: FakeHousehold, path: str, fields: dict[str, Any], schema: dict[str, Any]
) -> None:
    async with client.post(
        path, json={"model": "builtin", "messages": MESSAGES, "stream": False, **fields}
    ) as response:
        assert response.status == 200, await response.text()
    found = schema_of(household)
    closed = {"additionalProperties": False} if "properties" in schema else {}
    assert found == schema | closed and list(found.get("properties", {})) == list(schema.get("properties", {}))


@pytest.mark.parametrize(
    ("form", "words"),
    [({"type": "regex", "grammar": "a|b"}, "/a|b/"), ({"type": "lark", "grammar": 'start: "a"'}, 'start: "a"')],
)
async def test_grammars_are_an_extension(
    client: aiohttp.ClientSession, household: FakeHousehold, form: dict[str, Any], words: str
) -> None:
    async with client.post(CHAT, json={"model": "builtin", "messages": MESSAGES, "response_format": form}) as response:
        assert response.status == 200, await response.text()
    constraint = household.requests[-1].constraint
    assert constraint is not None and words in json.loads(constraint.grammar)["grammars"][0]["lark_grammar"]


async def test_a_plain_answer_is_free(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    body = {"model": "builtin", "messages": MESSAGES, "response_format": {"type": "text"}}
    async with client.post(CHAT, json=body) as response:
        assert response.status == 200
    assert household.requests[-1].constraint is None


async def test_what_cannot_be_kept_is_refused_with_the_reason(
    client: aiohttp.ClientSession, household: FakeHousehold
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    async with client.post(CHAT, json={"model": "builtin", "messages": MESSAGES, "response_format": form}) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert (error["param"], error["code"]) == ("response_format", "invalid_schema")
    assert error["message"] == "the answer's form cannot be used: Invalid type: strin"
    assert not household.requests
