"""Calls that a model must make, asked for with the official clients of three APIs; each says what is wrong with it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import anthropic
import ollama
import openai
from jsonschema import Draft202012Validator

from tests.e2e.test_constrained_answers import schema

MESSAGES: Any = [{"role": "user", "content": "What is the weather like?"}]
MOST_TOKENS = 700
Call = tuple[str, Any]  # name and arguments


def arguments(chance: random.Random) -> dict[str, Any]:
    """A schema of an object, whose JSON has a bounded length."""
    while (made := schema(chance, 1)).get("type") != "object":
        pass
    return made


async def openai_calls(url: str, model: str, tools: dict[str, Any], seed: int) -> tuple[Sequence[Call], bool]:
    """The calls, and whether the answer is as complete as was asked for."""
    chance = random.Random(seed)
    given: Any = [
        {"type": "function", "function": {"name": name, "parameters": one, "strict": chance.random() < 0.5}}
        for name, one in tools.items()
    ]
    named: Any = {"type": "function", "function": {"name": chance.choice(list(tools))}}
    choice: Any = chance.choice(["required", named])
    asked: Any = {"model": model, "messages": MESSAGES, "tools": given, "tool_choice": choice, "temperature": 1,
                  "seed": seed, "max_tokens": MOST_TOKENS, "parallel_tool_calls": chance.random() < 0.2}  # fmt: skip
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        if chance.random() < 0.5:
            async with client.chat.completions.stream(**asked) as stream:
                answer: Any = (await stream.get_final_completion()).choices[0]
        else:
            answer = (await client.chat.completions.create(**asked)).choices[0]
    calls = [(one.function.name, json.loads(one.function.arguments)) for one in answer.message.tool_calls or ()]
    right = choice == "required" or [name for name, _ in calls] == [named["function"]["name"]]
    return calls, answer.finish_reason == "tool_calls" and not answer.message.content and right and bool(calls)


async def anthropic_calls(url: str, model: str, tools: dict[str, Any], seed: int) -> tuple[Sequence[Call], bool]:
    chance = random.Random(seed)
    name = chance.choice(list(tools))
    choice: Any = chance.choice([{"type": "any"}, {"type": "tool", "name": name}])
    choice["disable_parallel_tool_use"] = chance.random() < 0.8
    given: Any = [{"name": name, "input_schema": one} for name, one in tools.items()]
    asked: Any = {"model": model, "messages": MESSAGES, "tools": given, "tool_choice": choice,
                  "max_tokens": MOST_TOKENS, "extra_body": {"temperature": 1}}  # fmt: skip
    async with anthropic.AsyncAnthropic(base_url=url, api_key="any") as client:
        if chance.random() < 0.5:
            async with client.messages.stream(**asked) as stream:
                answer: Any = await stream.get_final_message()
        else:
            answer = await client.messages.create(**asked)
    calls = [(one.name, one.input) for one in answer.content if one.type == "tool_use"]
    right = choice["type"] == "any" or [called for called, _ in calls] == [name]
    return calls, answer.stop_reason == "tool_use" and len(calls) == len(answer.content) and right and bool(calls)


async def ollama_calls(url: str, model: str, tools: dict[str, Any], seed: int) -> tuple[Sequence[Call], bool]:
    """This API knows no choice: either there are calls, or the text has its form, which is the last tool's schema."""
    form = list(tools.values())[-1]
    given = [
        ollama.Tool.model_validate({"type": "function", "function": {"name": name, "parameters": one}})
        for name, one in tools.items()
    ]
    options = {"temperature": 1.0, "seed": seed, "num_predict": 2 * MOST_TOKENS}
    client = ollama.AsyncClient(url)
    answer = await client.chat(model, MESSAGES, tools=given, format=form, options=options)
    if answer.done_reason == "length":  # the client leaves the bounds of schemas out: numbers have digits without end
        return [], True
    calls = [(one.function.name, dict(one.function.arguments)) for one in answer.message.tool_calls or ()]
    for name, arguments_given in calls:  # the client leaves most of a schema out
        sent = given[list(tools).index(name)].model_dump(exclude_none=True)["function"]["parameters"]
        Draft202012Validator(sent).validate(arguments_given)
    if not calls:
        Draft202012Validator(form).validate(json.loads(answer.message.content or ""))
    return [], answer.done_reason == "stop"


async def wrong_call(url: str, model: str, seed: int) -> str:
    """What is wrong with one answer; "": nothing."""
    chance = random.Random(seed)
    tools = {f"tool_{number}": arguments(chance) for number in range(chance.randint(1, 3))}
    asks = (openai_calls, anthropic_calls, ollama_calls)[seed % 3]
    try:
        calls, complete = await asks(url, model, tools, seed)
        for name, given in calls:
            Draft202012Validator(tools[name]).validate(given)
    except Exception as error:  # whatever goes wrong is told with the seed that shows it again
        return f"{seed}: {type(error).__name__}: {error}"
    return "" if complete else f"{seed}: not what was asked for: {calls}"
