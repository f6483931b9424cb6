"""Tools that must be called at temperature 1, asked of a demo's devices: every call parses and fits its schema."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests.e2e.chosen_calls import MESSAGES, wrong_call
from tests.household import Device
from tests.sizes import FULL

TRIES = 200 if FULL else 6
AT_ONCE = 8


async def test_every_call_fits(demo: list[Device]) -> None:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> str:
        async with turn:
            return await wrong_call(demo[seed % len(demo)].url, "builtin", seed)

    assert [wrong for wrong in await asyncio.gather(*map(one, range(TRIES))) if wrong] == []


async def test_a_call_that_is_cut_says_length(demo: list[Device]) -> None:
    text = {"type": "object", "properties": {"text": {"type": "string", "minLength": 200}}, "required": ["text"]}
    tools: Any = [{"type": "function", "function": {"name": "say", "parameters": text}}]
    async with openai.AsyncOpenAI(base_url=f"{demo[1].url}/v1", api_key="any") as client:
        answer: Any = await client.chat.completions.create(
            model="builtin", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=40
        )
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 40
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "say" and call.function.arguments.startswith("{")
