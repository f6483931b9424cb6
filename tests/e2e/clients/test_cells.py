"""Each cell of docs/clients.md: one client, and one thing that it can do, at the demo's household.

`make test` takes a few of the cells, `make lab-share` all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from jsonschema import Draft202012Validator

from tests.e2e.clients import scripted_model
from tests.e2e.clients.asked import EVERY, PARROT, WEATHER, Client, Question, Said, say
from tests.e2e.clients.libraries import VECTORS
from tests.e2e.clients.matrix import CLIENTS
from tests.e2e.clients.ollamas import FOR_GOOD_S, MISSING
from tests.household import Device

QUICK = {  # what `make test` takes
    "openai": ("whole answer", "streamed answer", "vectors", "hanging up"),
    "ollama": ("whole answer", "streamed answer", "vectors"),
    "anthropic": ("whole answer", "streamed answer"),
}
LIGHTS = say("Turn on the lights in the kitchen.")
STORY = say("Tell me a story.", max_tokens=24)
OSLO = say("What is the weather in Oslo?", model=PARROT, tools=(WEATHER,))
ROME = say("What is the weather in Oslo and in Rome?", model=PARROT, tools=(WEATHER,))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"type": "string", "enum": ["kitchen", "bath"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
LONG = 900  # tokens: far from over when its client hangs up
FREE_S = 20.0
LATE_S = 15.0  # seconds that a request may take, of what a model is to stay
HEARD_S = 10.0  # until the device that was asked has heard how long the model stays, from the one that answered


@pytest.fixture(scope="module")
def parrot(demo: list[Device]) -> Iterator[None]:
    """The scripted model, pulled from a hub by a client, as homes do; it starts when somebody asks."""
    client = ollama.Client(demo[-1].url, headers={"Authorization": f"Bearer {demo[-1].token()}"})
    client.pull(MISSING)
    client.copy("builtin", VECTORS)
    yield
    client.delete(VECTORS)
    client.generate(PARROT, keep_alive=0)
    client.chat("builtin", [{"role": "user", "content": "Hello."}], keep_alive=-1)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device whose API other machines reach, so that it wants its key."""
    device = Device(tmp_path_factory.mktemp("locked"), "locked", options=("--no-mdns",), api="0.0.0.0:0")
    try:
        yield device.start().wait_ready()
    finally:
        device.stop()


def truth(demo: list[Device], question: Question) -> Said:
    """What the device that the model was started on says to a bare request."""
    body = {"model": question.model, "messages": question.messages, "max_tokens": question.max_tokens, "temperature": 0}
    made = demo[0].post("/v1/chat/completions", body)
    (choice,), usage = made["choices"], made["usage"]
    text, finish = choice["message"]["content"], choice["finish_reason"]
    return Said(text, "", [], finish, usage["prompt_tokens"], usage["completion_tokens"])


def models(client: Client, demo: list[Device]) -> None:
    assert {"builtin", PARROT} <= set(client.models())


def whole(client: Client, demo: list[Device]) -> None:
    assert (said := client.ask(LIGHTS)).text == truth(demo, LIGHTS).text
    assert said.finish == "stop"


def streamed(client: Client, demo: list[Device]) -> None:
    said = client.ask(LIGHTS.but(stream=True))
    assert said.text == truth(demo, LIGHTS).text and said.finish == "stop"
    assert said.pieces > 5


def system(client: Client, demo: list[Device]) -> None:
    asked = Question(({"role": "system", "content": "Speak of bread only."}, *LIGHTS.messages))
    _like(client, demo, asked, LIGHTS)


def turns(client: Client, demo: list[Device]) -> None:
    asked = say("Turn on the lights in the kitchen.", truth(demo, LIGHTS).text, "And now off again.")
    _like(client, demo, asked, say("And now off again."))


def _like(client: Client, demo: list[Device], asked: Question, otherwise: Question) -> None:
    said, wanted = client.ask(asked), truth(demo, asked)
    assert (said.text, said.finish) == (wanted.text, "stop")
    assert said.prompt_tokens == wanted.prompt_tokens != truth(demo, otherwise).prompt_tokens


def stops(client: Client, demo: list[Device]) -> None:
    text = truth(demo, STORY).text
    word = text.split()[6]
    said = client.ask(STORY.but(stop=(word,)))
    assert said.text.strip() == text[: text.index(word)].strip() and said.finish == "stop"


def limit(client: Client, demo: list[Device]) -> None:
    for stream in {"streamed answer" in client.cells, "whole answer" not in client.cells}:
        said = client.ask(STORY.but(max_tokens=7, stream=stream))
        assert said.finish == "length" and truth(demo, STORY).text.startswith(said.text) and said.text


def usage(client: Client, demo: list[Device]) -> None:
    wanted = truth(demo, LIGHTS)
    for stream in {"streamed answer" in client.cells, "whole answer" not in client.cells}:
        said = client.ask(LIGHTS.but(stream=stream))
        assert (said.prompt_tokens, said.answer_tokens) == (wanted.prompt_tokens, wanted.answer_tokens)


def call(client: Client, demo: list[Device]) -> None:
    said = client.ask(OSLO)
    assert (said.text, said.calls, said.finish) == ("", [("weather", scripted_model.CALL)], "tool_calls")


def calls(client: Client, demo: list[Device]) -> None:
    said = client.ask(ROME)
    assert (said.text.strip(), said.calls, said.finish) == ("", scripted_model.CALLS, "tool_calls")


def result(client: Client, demo: list[Device]) -> None:
    """The scripted model says this only where the result came, behind a call of that name."""
    called = {"role": "assistant", "content": "", "calls": [("c12345678", "weather", scripted_model.CALL)]}
    came = {"role": "tool", "id": "c12345678", "name": "weather", "content": '{"data": "7 degrees", "error": null}'}
    said = client.ask(OSLO.but(messages=(*OSLO.messages, called, came)))
    assert (said.text, said.calls, said.finish) == (scripted_model.RESULT, [], "stop")


@pytest.mark.slow
def test_anthropics_own_loop_of_calls_and_results(demo: list[Device], parrot: None) -> None:
    """It asks for a conversation that is kept, and sends all of it when it hears that none is."""
    import anthropic

    @anthropic.beta_tool
    def weather(city: str, days: int = 1) -> str:
        """The weather."""
        return f"7 degrees in {city} for {days} days"

    with anthropic.Anthropic(base_url=demo[1].url, api_key=demo[1].token()) as client:
        told = client.beta.messages.tool_runner(
            model=PARROT, max_tokens=60, tools=[weather], messages=[{"role": "user", "content": "Oslo?"}]
        )
        *_, last = told
    assert [one.text for one in last.content if one.type == "text"] == [scripted_model.RESULT]


def arguments(client: Client, demo: list[Device]) -> None:
    said = client.ask(OSLO.but(stream=True))
    assert said.calls == [("weather", scripted_model.CALL)] and said.argument_pieces >= 3
    said = client.ask(ROME.but(stream=True))
    assert (said.calls, said.finish) == (scripted_model.CALLS, "tool_calls")


def json_object(client: Client, demo: list[Device]) -> None:
    assert isinstance(json.loads(client.ask(say("Tell me of the kitchen.", form="json", max_tokens=400)).text), dict)


def schema(client: Client, demo: list[Device]) -> None:
    made = json.loads(client.ask(say("Turn on the lights in the bath.", form=SCHEMA)).text)
    Draft202012Validator(SCHEMA).validate(made)


def continued(client: Client, demo: list[Device]) -> None:
    text = "Once upon a time, in a"
    made = demo[0].post("/v1/completions", {"model": "builtin", "prompt": text, "max_tokens": 12, "temperature": 0})
    assert client.continued(text) == made["choices"][0]["text"]


def vectors(client: Client, demo: list[Device]) -> None:
    texts = ["a small house", "a large house", "rain"]
    made = client.vectors(texts)
    wanted = demo[0].post("/v1/embeddings", {"model": "builtin", "input": texts})["data"]
    for mine, one in zip(made, wanted, strict=True):
        assert max(abs(a - b) for a, b in zip(mine, one["embedding"], strict=True)) < 1e-6
    near, far = (sum(a * b for a, b in zip(made[0], other, strict=True)) for other in made[1:])
    assert 1 > near > far


def thought(client: Client, demo: list[Device]) -> None:
    for stream in {False, "streamed answer" in client.cells}:
        said = client.ask(say("What is 2 + 2?", model=PARROT, think=True, stream=stream))
        assert said.text.strip() == scripted_model.SAID
        assert not client.shows_thought or said.thought.strip() == scripted_model.THOUGHT


def unthought(client: Client, demo: list[Device]) -> None:
    said = client.ask(say("What is 2 + 2?", model=PARROT, think=False))
    assert (said.text, said.thought) == (scripted_model.UNTHOUGHT, "")


def must(client: Client, demo: list[Device]) -> None:
    """The built-in model knows no tools: masks make it call, and in the form of the arguments."""
    lamp = {"name": "lamp", "description": "Switch a lamp", "parameters": SCHEMA}
    said = client.ask(LIGHTS.but(tools=(lamp,), must_call=True))
    ((name, given),) = said.calls
    Draft202012Validator(SCHEMA).validate(given)
    assert (name, said.finish) == ("lamp", "tool_calls")


def chances(client: Client, demo: list[Device]) -> None:
    said = client.ask(LIGHTS.but(chances=True))
    assert said.answer_tokens is not None and 0 <= said.answer_tokens - len(said.chances) <= 1
    assert all(-3 < one <= 0 for one in said.chances), "the likeliest tokens"


def responses(client: Client, demo: list[Device]) -> None:
    wanted = truth(demo, LIGHTS).text
    for stream in (False, True):
        assert client.responded(LIGHTS.messages[0]["content"], stream) == wanted


def unknown(client: Client, demo: list[Device]) -> None:
    _refused(client, "unknown model", LIGHTS.but(model="nothing"), 404, "no model 'nothing")


def wrong_key(client: Client, demo: list[Device]) -> None:
    lists = "list of models" in client.cells and client.name != "llm"
    assert not lists or "builtin" in client.models()
    client.key = "sk-wrong"
    _refused(client, "wrong key", LIGHTS, 401, "token")
    if lists:
        with pytest.raises(Exception) as error:
            client.models()
        assert client.failing["wrong key"] in _classes(error.value)


def wrong_field(client: Client, demo: list[Device]) -> None:
    _refused(client, "wrong field", client.wrong, 400, "")


def _refused(client: Client, cell: str, question: Question, status: int, words: str) -> None:
    for stream in {"streamed answer" in client.cells, "whole answer" not in client.cells}:
        with pytest.raises(Exception) as found:
            client.ask(question.but(stream=stream))
        error: Any = found.value
        assert client.failing[cell] in _classes(error)
        told = getattr(error, "response", None)
        assert (error.status_code if hasattr(error, "status_code") else told.status_code) == status
        assert words in (str(error) if hasattr(error, "status_code") else told.text)


def _classes(error: BaseException) -> set[str]:
    return {one.__name__ for one in type(error).__mro__}


def hanging_up(client: Client, demo: list[Device]) -> None:
    """The story would go on for hundreds of tokens; its slots are free again long before."""
    client.hang_up(say("Tell me a story.", max_tokens=LONG, stream=True))
    begun = time.monotonic()
    while any(device.slots_in_use() for device in demo):
        assert time.monotonic() - begun < FREE_S, "slots are still in use"


def twice(client: Client, demo: list[Device]) -> None:
    """Hot, so that another answer would be another text."""
    hot = STORY.but(temperature=1.0, max_tokens=60, stream="whole answer" not in client.cells)
    client.repeat_key = f"{client.name} {time.time_ns()}"
    first, again = client.ask(hot), client.ask(hot)
    client.repeat_key += " other"
    assert first.text == again.text != client.ask(hot).text


def set_up(client: Client, demo: list[Device]) -> None:
    client.set_up()


def staying(client: Client, demo: list[Device]) -> None:
    for said, wanted in client.staying():
        begun = time.monotonic()
        while not wanted - LATE_S < min(found := client.stays_s(), FOR_GOOD_S) <= wanted + 1:
            assert time.monotonic() - begun < HEARD_S, f"{said}: {found}"


def _quick(client: type[Client], cell: str) -> bool:
    return cell in QUICK.get(client.name, ())


CHECKS: dict[str, Callable[[Client, list[Device]], None]] = dict(
    zip(EVERY, (models, whole, streamed, system, turns, stops, limit, usage, call, calls, result, arguments,
                json_object, schema, continued, vectors, thought, unthought, must, chances, responses,
                unknown, wrong_key, wrong_field, hanging_up, twice, set_up, staying), strict=True)
)  # fmt: skip
CELLS = [
    pytest.param(client, cell, id=f"{client.name}, {cell}", marks=() if _quick(client, cell) else pytest.mark.slow)
    for cell in EVERY
    for client in CLIENTS
    if cell in client.cells
]


@pytest.mark.parametrize(("client", "cell"), CELLS)
def test_cell(
    client: type[Client], cell: str, demo: list[Device], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At one device or another of the household."""
    if not _quick(client, cell):
        request.getfixturevalue("parrot")
    place = CLIENTS.index(client) + EVERY.index(cell)
    device = request.getfixturevalue("locked") if cell == "wrong key" else demo[place % len(demo)]
    CHECKS[cell](client(device.url, device.token(), tmp_path), demo)
