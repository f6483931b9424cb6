"""What official clients see of several devices, beside the cells of docs/clients.md (tests/e2e/clients)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ollama
import openai

from peerllm.cli.demo.demo import SLOTS
from tests.household import Device

STORY: Any = [{"role": "user", "content": "Tell me a story."}]
TOKENS = 24
MEANWHILE = 40  # tokens of an answer that may come until a list of models has come: half a second's


def eventually(there: Callable[[], bool], within_s: float = 30.0) -> bool:
    """Whether it is so before long."""
    until = time.monotonic() + within_s
    while not (found := there()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def stays(client: ollama.Client) -> float:
    """For how many seconds from now the one model that runs is kept."""
    (loaded,) = client.ps().models
    assert loaded.expires_at is not None
    return loaded.expires_at.timestamp() - time.time()


def by_openai(device: Device) -> str:
    with openai.OpenAI(base_url=device.url + "/v1", api_key=device.token()) as client:
        made = client.chat.completions.create(model="builtin", messages=STORY, max_tokens=TOKENS, temperature=0)
    return str(made.choices[0].message.content)


def test_tools_are_told_to_the_model_from_each_device(demo: list[Device]) -> None:
    """The built-in model knows no tools, so they stand in its prompt in words."""
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools: Any = [{"type": "function", "function": function}]

    def asked(device: Device, **more: Any) -> Any:
        with openai.OpenAI(base_url=device.url + "/v1", api_key=device.token()) as client:
            return client.chat.completions.create(
                model="builtin", messages=STORY, max_tokens=TOKENS, temperature=0, **more
            )

    without = asked(demo[0], tools=tools, tool_choice="none")
    answers = [asked(device, tools=tools) for device in demo]
    for answer in answers:
        assert answer.usage.prompt_tokens > without.usage.prompt_tokens + 100
        assert answer.choices[0].message == answers[0].choices[0].message
    assert without.choices[0].message.content == by_openai(demo[0])


def test_models_are_listed_at_once_while_answers_are_written(demo: list[Device]) -> None:
    """Before any of the answers has got many more tokens, at whatever pace the machine goes just then."""
    client = ollama.Client(demo[1].url, headers={"Authorization": f"Bearer {demo[1].token()}"})
    begun, over, tokens = threading.Event(), threading.Event(), [0] * SLOTS

    def write(place: int) -> None:
        while not over.is_set():
            for _ in client.chat("builtin", STORY, options={"num_predict": 400}, stream=True):
                tokens[place] += 1
                begun.set()
                if over.is_set():
                    return

    with ThreadPoolExecutor(SLOTS) as pool:
        writing = [pool.submit(write, place) for place in range(SLOTS)]
        assert begun.wait(60)
        try:
            for listed in (client.list, client.ps):
                came = []
                for _ in range(3):  # the best counts: the machine may stand still for this process alone
                    before = list(tokens)
                    assert next(iter(listed().models)).model == "builtin:latest"
                    came.append(max(now - then for now, then in zip(tokens, before, strict=True)))
                assert min(came) < MEANWHILE, came
        finally:
            over.set()
        for one in writing:
            one.result(60)


def test_a_model_that_was_unloaded_comes_back_for_a_request(demo: list[Device]) -> None:
    """As `ollama stop` says it, at another device than the one that a person started it on."""
    here, there = (ollama.Client(one.url, headers={"Authorization": f"Bearer {one.token()}"}) for one in demo[1:3])
    before = by_openai(demo[0])
    assert here.generate("builtin", keep_alive=0).done_reason == "unload"
    assert eventually(lambda: not here.ps().models and not there.ps().models)
    assert [one.model for one in here.list().models].count("builtin:latest") == 1
    options = {"num_predict": TOKENS, "temperature": 0}
    made = there.chat("Builtin:latest", STORY, options=options, keep_alive="10m")
    assert made.message.content == before
    assert eventually(lambda: 500 < stays(there) <= 600), "the other devices hear of it in a moment"
    assert there.chat("builtin", STORY, options=options, keep_alive=0).message.content == before
    assert eventually(lambda: not any(one.status()["deployments"] for one in demo))
    assert by_openai(demo[0]) == before, "where a person had started it, it comes back as that"
    assert eventually(lambda: stays(here) > 1e9)
