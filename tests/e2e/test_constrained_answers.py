"""Bounded schemas at temperature 1, asked of a demo's devices by the official clients: every answer validates."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import ollama
import openai
import pytest
from jsonschema import Draft202012Validator

from tests.household import Device
from tests.sizes import FULL

TRIES = 200 if FULL else 6
AT_ONCE = 8
MESSAGES: Any = [{"role": "user", "content": "Describe somebody."}]
LEAVES: tuple[Any, ...] = (
    {"type": "integer", "minimum": -5, "maximum": 5000},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 2, "maxLength": 6, "pattern": "^[a-z ]+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "enum": ["north", "south", 'ea"st', "wést"]},
    {"const": 42},
)


def schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """An answer to it has a bounded number of tokens; a mere number may have any number of digits."""
    kind = chance.choice(["leaf", "object", "object", "array", "choice"]) if depth else "leaf"
    if kind == "leaf":
        return dict(chance.choice(LEAVES))
    if kind == "array":
        least = chance.randint(0, 2)
        return {"type": "array", "items": schema(chance, depth - 1), "minItems": least, "maxItems": least + 1}
    if kind == "choice":
        return {"anyOf": [schema(chance, 0), schema(chance, depth - 1)]}
    names = chance.sample(["name", "age", "größe", "a b", "x_1", 'q"'], chance.randint(1, 3))
    fields = {name: schema(chance, depth - 1) for name in names}
    required = [name for name in names if chance.random() < 0.7]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


async def openai_says(device: Device, wanted: dict[str, Any], seed: int) -> tuple[str, str | None]:
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": wanted, "strict": True}}
    async with openai.AsyncOpenAI(base_url=f"{device.url}/v1", api_key=device.token()) as client:
        answer = await client.chat.completions.create(
            model="builtin", messages=MESSAGES, temperature=1, seed=seed, max_tokens=800, response_format=form
        )
    return answer.choices[0].message.content or "", answer.choices[0].finish_reason


async def ollama_says(device: Device, wanted: dict[str, Any], seed: int) -> tuple[str, str | None]:
    options = {"temperature": 1.0, "seed": seed, "num_predict": 800}
    client = ollama.AsyncClient(device.url, headers={"Authorization": f"Bearer {device.token()}"})
    answer = await client.chat("builtin", MESSAGES, format=wanted, options=options)
    return answer.message.content or "", answer.done_reason


async def test_every_answer_validates(demo: list[Device]) -> None:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> str:
        """What is wrong with its answer."""
        wanted = schema(random.Random(seed))
        says = (openai_says, ollama_says)[seed % 2]
        async with turn:
            text, finish = await says(demo[seed % len(demo)], wanted, seed)
        if finish != "stop":
            return f"{seed}: {finish}: {text[-80:]}"
        wrong = next(Draft202012Validator(wanted).iter_errors(json.loads(text)), None)
        return f"{seed}: {wrong.message}" if wrong is not None else ""

    assert [wrong for wrong in await asyncio.gather(*map(one, range(TRIES))) if wrong] == []


async def test_what_is_cut_says_length(demo: list[Device]) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    text, finish = await openai_says(demo[1], {"type": "array", "items": number, "minItems": 30, "maxItems": 40}, 1)
    assert finish == "stop" and len(json.loads(text)) >= 30
    form = {"type": "regex", "grammar": "([a-z]{3} ){100}"}
    body = {"model": "builtin", "messages": MESSAGES, "max_tokens": 9, "response_format": form}
    async with httpx.AsyncClient() as client:
        answer = (await client.post(f"{demo[0].url}/v1/chat/completions", json=body, timeout=60)).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 9


async def test_a_schema_that_cannot_be_kept_is_refused_with_the_reason(demo: list[Device]) -> None:
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
        await openai_says(demo[0], {"not": {"type": "string"}}, 1)
    with pytest.raises(ollama.ResponseError, match="Invalid type: strin"):
        await ollama_says(demo[2], {"type": "strin"}, 1)
