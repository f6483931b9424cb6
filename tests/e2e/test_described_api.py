"""schemathesis asks devices what their OpenAPI document allows, and what it does not: nothing fails or surprises."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.engine import events, from_schema

from tests.household import Device, household
from tests.sizes import FULL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if FULL else 300)]

FUZZED = 15 if FULL else 3  # cases of each operation, beside those that cover its schema
LEAST = 2000 if FULL else 75  # requests to each device
SOME_TOKENS = 4  # of an answer
# Would end what the household does, or reaches beyond it.
NOT_ASKED = {
    "/peerllm/v1/invite": "opens the door to others", "/peerllm/v1/join": "goes to another household",
    "/peerllm/v1/leave": "ends the household", "/peerllm/v1/remove": "ends the household",
    "/peerllm/v1/stop": "ends the model", "/peerllm/v1/pause": "moves the model away",
    "/api/pull": "fetches from a hub",
}  # fmt: skip
CHECKS = {
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method",
    "allow_header_conformance", "ignored_auth",
}  # fmt: skip
TOO_MUCH = ["400", "401", "403", "404", "405", "408", "409", "413", "415", "422", "429"]  # ways to reject
# Valid, and refused by a model that only writes text, or together with others; of the household's routes, what would
# change what it does.
UNSUPPORTED = {
    "": ("best_of", "context", "logprobs", "max_completion_tokens", "previous_response_id", "suffix", "template",
         "think", "thinking", "top_logprobs"),
    "/peerllm/v1/run": ("name",),
    "/peerllm/v1/limits": ("memory_bytes", "threads", "hours", "battery_percent", "hot_celsius", "paused"),
}  # fmt: skip
TOKENS = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/messages"), ("max_tokens",)),
    "/v1/responses": ("max_output_tokens",),
    "/peerllm/v1/bench": ("sequences", "prompt_tokens", "output_tokens"),
}
NEVER_DONE = {"POST /v1/responses/{id}/cancel"}  # it has only refusals
ANOTHER_NAME = "another"  # of the model; it is taken away again
MAX_URL_CHARS = 8000  # longer ones are not HTTP for aiohttp


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """The second one listens beyond loopback, so all of its routes need the token, and answers for the first."""
    apis = {"mini-pc": "0.0.0.0:0"}
    with household(tmp_path_factory.mktemp("described"), ["laptop", "mini-pc"], apis=apis) as devices:
        devices[0].cli("run", "builtin", "--slots", "8", "--context", "512")
        yield devices


@schemathesis.deserializer("application/x-ndjson")
def lines_of(_: Any, response: Any) -> list[Any]:
    return [json.loads(line) for line in response.content.splitlines()]


def sensible(case: Any, turn: int, kept: Callable[[], str]) -> None:
    """Most valid requests are made such that a model answers them in a few tokens; invalid ones are left alone.

    `kept`: the id of a response that can be read.
    """
    body, path = case.body, case.path
    if path == "/peerllm/v1/status" and case.query.get("wait") is True:
        case.query["wait"] = False
    if case.meta is not None and not case.meta.generation.mode.is_positive:
        return
    if path.startswith("/static/"):
        case.path_parameters["name"] = "app.js"
    if path.startswith("/v1/responses/{id}") and turn % 4:
        case.path_parameters["id"] = kept()
        case.query.pop("after", None)
    if path == "/v1/models/{id}" and turn % 4:
        case.path_parameters["id"] = "builtin"
    if path == "/peerllm/v1/scenario" and turn % 4:
        case.query["model"] = "builtin"
    if not isinstance(body, dict):
        return
    for name in ("model", "source"):
        if isinstance(body.get(name), str) and body[name] and (turn % 8 or path == "/peerllm/v1/run"):
            body[name] = "builtin"
    if path == "/api/copy":
        body["destination"] = ANOTHER_NAME
    if path == "/api/delete":
        body["model"] = ANOTHER_NAME
    for name in UNSUPPORTED.get(path, UNSUPPORTED[""]):
        body.pop(name, None)
    if turn % 4:
        for name in ("Idempotency-Key", "Last-Event-ID"):
            (case.headers or {}).pop(name, None)
        for name in ("messages", *(("input",) if path.startswith("/v1/responses") else ())):
            if body.get(name) or name == "input":
                body[name] = [{"role": "user", "content": "Hello"}]
        if not body.get("tools"):
            body.pop("tool_choice", None)
        if isinstance(body.get("prompt"), list) or body.get("prompt") == "":
            body["prompt"] = ["Hello", "you"] if path == "/v1/completions" else "Hello"
    for name in TOKENS.get(path, ()):
        body[name] = SOME_TOKENS
    if path in ("/api/chat", "/api/generate"):
        body["options"] = {**(body.get("options") or {}), "num_predict": SOME_TOKENS}


def schema_of(device: Device) -> Any:
    phases = {
        "coverage": {"enabled": FULL}, "fuzzing": {"enabled": True}, "examples": {"enabled": False},
        "stateful": {"enabled": False},
    }  # fmt: skip
    told: dict[str, Any] = {
        "base-url": device.url, "headers": {"Authorization": f"Bearer {device.token()}"}, "request-timeout": 60,
        "continue-on-failure": True, "phases": phases, "generation": {"max-examples": FUZZED, "no-shrink": True},
        "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        "operations": [{"include-path": "/peerllm/v1/events", "max-stream-events": 1}],
    }  # fmt: skip
    told["checks"]["negative_data_rejection"]["expected-statuses"] = TOO_MUCH
    if not FULL:
        told["seed"] = 16
    config = schemathesis.Config.from_dict(told)
    head = {"Authorization": f"Bearer {device.token()}"}
    schema = schemathesis.openapi.from_url(device.url + "/openapi.json", config=config, headers=head)
    schema = schema.exclude(path=list(NOT_ASKED))
    turns = itertools.count()

    def kept() -> str:
        return str(device.post("/v1/responses", {"model": "builtin", "input": "Hi", "max_output_tokens": 1})["id"])

    @schema.hook
    def map_case(_: Any, case: Any) -> Any:
        sensible(case, next(turns), kept)
        return case

    @schema.hook
    def filter_case(_: Any, case: Any) -> bool:
        return len(case.as_transport_kwargs(base_url=device.url)["url"]) < MAX_URL_CHARS

    return schema


@pytest.mark.parametrize("which", [0, 1], ids=["the model's source, on loopback", "another device, with its token"])
def test_every_answer_is_described_and_nothing_fails(two: list[Device], which: int) -> None:
    device, since = two[which], time.monotonic()
    wrong: dict[str, str] = {}
    statuses: Counter[tuple[str, int]] = Counter()
    for event in from_schema(schema_of(device)).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            wrong[f"{event}"] = str(getattr(event, "value", None) or getattr(event, "exception", None))
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        for one in recorder.interactions.values():
            statuses[recorder.label, one.response.status_code if one.response is not None else 0] += 1
        for case_id, checks in recorder.checks.items():
            for check in checks:
                if check.failure_info is None:
                    continue
                failure, answer = check.failure_info.failure, recorder.interactions[case_id].response
                what = f"{recorder.label}: {check.name}: {failure.title}: {failure.message}"[:500]
                said = b"" if answer is None else answer.content[:500]
                wrong.setdefault(what, f"{recorder.cases[case_id].value.as_curl_command()[:2000]}\n{said!r}")
    print(f"{statuses.total()} requests in {time.monotonic() - since:.0f} s: {dict(statuses)}")
    assert not wrong, "\n\n".join(f"{what}\n{how}" for what, how in wrong.items())
    assert statuses.total() >= LEAST and not [one for one in statuses if not one[1]]
    answered = {label for label, status in statuses if status < 300}
    assert not FULL or not {label for label, _ in statuses} - answered - NEVER_DONE
    assert not FULL or {"POST /v1/chat/completions", "POST /api/generate", "POST /v1/messages"} <= answered
    for one in two:
        assert one.process is not None and one.process.poll() is None
        assert "Exception in callback" not in one.log_tail() and " failed: " not in one.log_tail()
    assert two[0].post("/v1/chat/completions", {"model": "builtin", "messages": [{"role": "user", "content": "Hi"}]})
