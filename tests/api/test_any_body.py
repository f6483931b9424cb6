"""Bodies with anything anywhere: each is taken, or refused with one line that names no inner workings."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import orjson
import pytest

from peerllm.api.anthropic.anthropic_requests import AnthropicBody
from peerllm.api.bodies import decoded
from peerllm.api.core.remote_answer import RelayedGeneration
from peerllm.api.ollama.ollama_requests import GenerateBody, OllamaChatBody
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.openai.responses.response_requests import ResponseBody
from peerllm.errors import BadInputError

NEEDED = ("model", "messages", "prompt", "input", "max_tokens", "generation", "client", "key")
BODIES = 1000  # of each kind
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
SAMPLING = {"temperature": 1, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["x"], "presence_penalty": 1}
FULL: list[tuple[Any, dict[str, Any]]] = [
    (ChatBody, {**SAMPLING, "model": "m", "n": 2, "stream": True, "stream_options": {"include_usage": True},
                "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]},
                             {"role": "assistant", "content": None, "tool_calls": []},
                             {"role": "tool", "content": "r", "tool_call_id": "c"}],
                "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}, "logprobs": True,
                "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}, "user": "u"}),
    (CompletionBody, {**SAMPLING, "model": "m", "prompt": ["a", [1, 2]], "n": 2, "best_of": 2, "echo": True}),
    (OllamaChatBody, {"model": "m", "messages": [{"role": "user", "content": "t", "images": []},
                                                {"role": "assistant", "content": "", "tool_calls": [CALL]}],
                      "options": {**SAMPLING, "num_predict": 5}, "keep_alive": "5m", "format": "json", "think": "low",
                      "tools": [TOOL], "stream": False}),
    (GenerateBody, {"model": "m", "prompt": "t", "system": "s", "raw": True, "context": [1], "options": SAMPLING}),
    (AnthropicBody, {"model": "m", "max_tokens": 5, "system": [{"type": "text", "text": "t"}], "stop_sequences": ["x"],
                     "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]}], "top_k": 5,
                     "tools": [{"name": "f", "input_schema": {}}], "thinking": {"type": "disabled"},
                     "metadata": {"user_id": "u"}}),
    (ResponseBody, {**SAMPLING, "model": "m", "instructions": "s", "max_output_tokens": 5, "metadata": {"a": "b"},
                    "input": [{"role": "user", "content": [{"type": "input_text", "text": "t"}]},
                              {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                              {"type": "function_call_output", "call_id": "c", "output": "r"},
                              {"type": "reasoning", "summary": []}],
                    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
                    "tool_choice": {"type": "allowed_tools", "tools": [{"name": "f"}]}, "store": False,
                    "text": {"format": {"type": "json_schema", "name": "s", "schema": {"a": 1}}, "verbosity": "low"},
                    "reasoning": {"effort": "low"}, "include": ["x"], "parallel_tool_calls": True}),
    (RelayedGeneration, {"generation": {"model": "m", "messages": [{"role": "user", "content": "t"}],
                                        "sampling": {"top_p": 0.5}, "stops": ["x"]},
                         "client": "c", "key": "k", "had": 3}),
]  # fmt: skip
ANYTHING: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1.5, 1e308, "", "x", "json", "user", "\ud800", "\x00",
    "x" * 5000, [], [[]], [None], [1, "a"], [{}], {}, {"type": "text"}, {"a": {"b": [1]}}, [1] * 50, "5m", "-1", "nan",
]  # fmt: skip


def changed(body: Any, chance: random.Random) -> Any:
    """One place of it holds something else, or is gone, or is new."""
    body = copy.deepcopy(body)
    place = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys) if keys else "new" if isinstance(place, dict) else None
        if key is None:
            place.append(chance.choice(ANYTHING))
            return body
        inner = place.get(key) if isinstance(place, dict) else place[key]
        if not isinstance(inner, (dict, list)) or chance.random() < 0.3:
            break
        place = inner
    if keys and chance.random() < 0.2:
        del place[key]
    else:
        place[key] = chance.choice(ANYTHING)
    return body


@pytest.mark.parametrize(("kind", "full"), FULL, ids=[kind.__name__ for kind, _ in FULL])
def test_it_is_taken_or_refused(kind: Any, full: dict[str, Any]) -> None:
    chance, taken, lines = random.Random(1), 0, list[str]()
    for _ in range(BODIES):
        body = changed({name: one for name, one in full.items() if name in NEEDED or chance.random() < 0.3}, chance)
        try:
            made = decoded(json.dumps(body).encode(), kind)
            for name in ("generation", "generations"):
                if callable(ask := getattr(made, name, None)):
                    ask()
            if isinstance(made, ResponseBody):
                orjson.dumps([made.told(), [one.told() for one in made.items()]])
            taken += 1
        except BadInputError as error:
            lines.append(str(error))
    assert not [one for one in lines if "\n" in one or "`" in one]
    assert min(one.count(" ") for one in lines) >= 2, "each says what is wrong"
    assert taken > 20 and len(lines) > 20
