"""One id goes through everything that a request causes: its answer, the log, and the device that answers for it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from io import StringIO

import aiohttp
import pytest

from peerllm import request_ids
from peerllm.errors import EngineError
from peerllm.request_ids import LOG_FORMAT, CauseInLog
from tests.api.fake import FakeHousehold
from tests.api.relay_pair import ASK, PATH, Pair

MESSAGES = "/v1/messages"
CLAUDE = {**ASK, "max_tokens": 4}


@pytest.fixture
def log() -> Iterator[StringIO]:
    """As a device writes it."""
    written = StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.addFilter(CauseInLog())
    ours = logging.getLogger("peerllm")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield written
    ours.removeHandler(handler)
    ours.setLevel(before)


def lines(log: StringIO, request_id: str) -> list[str]:
    return [line for line in log.getvalue().splitlines() if f"[{request_id}] " in line]


async def ask(client: aiohttp.ClientSession, path: str, given: str = "", body: object = ASK, **headers: str) -> str:
    """The id that the answer has, the same under both names."""
    if given:
        headers["X-Request-Id"] = given
    async with client.post(path, json=body, headers=headers) as response:
        await response.read()
        assert response.headers["X-Request-Id"] == response.headers["request-id"]
        return response.headers["X-Request-Id"]


def test_it_ends_with_what_it_causes() -> None:
    with request_ids.caused_by("outer"):
        with request_ids.caused_by(""):
            assert request_ids.current() == ""
        assert request_ids.current() == "outer"
    assert request_ids.current() == ""


async def test_kept_answers_are_counted(client: aiohttp.ClientSession) -> None:
    for key, count in (("", 0), ("one", 1), ("one", 1), ("two", 2)):
        await ask(client, PATH, **({"Idempotency-Key": key} if key else {}))
        async with client.get("/peerllm/v1/process") as response:
            assert (await response.json())["answers"] == count


async def test_a_short_plain_id_is_kept_and_any_other_replaced(client: aiohttp.ClientSession) -> None:
    assert await ask(client, PATH, "req_7.B-2") == "req_7.B-2"
    made = {await ask(client, PATH, given) for given in ("", "a b", "é", "-x", "x" * 65, 'a"b', "a\tb", "a[b]")}
    assert len(made) == 8 and all(re.fullmatch("req_[0-9a-f]{12}", one) for one in made)
    assert await ask(client, MESSAGES, "m" * 64, CLAUDE) == "m" * 64


async def test_streams_refusals_and_unknown_routes_have_one(client: aiohttp.ClientSession) -> None:
    for path, body in ((PATH, {**ASK, "stream": True}), (PATH, {}), ("/nowhere", {}), ("/api/chat", {"model": 1})):
        assert await ask(client, path, "here-1", body) == "here-1"
    async with client.get("/v1/models", headers={"Origin": "https://evil.example", "X-Request-Id": "evil"}) as refused:
        assert (refused.status, refused.headers["X-Request-Id"]) == (403, "evil")


async def test_anthropics_errors_name_it_in_the_body(client: aiohttp.ClientSession, household: FakeHousehold) -> None:
    async with client.post(MESSAGES, json={**CLAUDE, "model": "x"}, headers={"X-Request-Id": "m-1"}) as response:
        assert (await response.json())["request_id"] == "m-1"
    household.error_midway = EngineError("the engine died")
    streamed = {**CLAUDE, "max_tokens": 9, "stream": True}
    async with client.post(MESSAGES, json=streamed, headers={"X-Request-Id": "m-2"}) as response:
        assert '"request_id":"m-2"' in (await response.text()).splitlines()[-2]


async def test_a_line_says_who_asked_for_what_and_how_it_ended(client: aiohttp.ClientSession, log: StringIO) -> None:
    await ask(client, f"{PATH}?token=secret", "ok-1")
    await ask(client, "/api/pull%0Ainjected", "bad-1")
    async with client.get("/v1/models", headers={"X-Request-Id": "read-1"}):
        pass
    (line,) = lines(log, "ok-1")
    assert f"POST {PATH} of 127.0.0.1: 200 after " in line
    assert "404" in lines(log, "bad-1")[0]
    assert not lines(log, "read-1")
    assert "secret" not in log.getvalue() and "\ninjected" not in log.getvalue()


async def test_what_fails_unforeseen_is_logged_under_it(
    client: aiohttp.ClientSession, household: FakeHousehold, log: StringIO
) -> None:
    household.error_at_once = RuntimeError("boom")
    await ask(client, PATH, "boom-1")
    assert any("ERROR" in line and "RuntimeError" in line for line in lines(log, "boom-1"))


async def test_a_client_that_leaves_is_logged(
    client: aiohttp.ClientSession, household: FakeHousehold, log: StringIO
) -> None:
    household.endless = True
    async with client.post(PATH, json={**ASK, "stream": True}, headers={"X-Request-Id": "left-1"}) as response:
        await response.content.readany()
    await asyncio.wait_for(household.closed.wait(), 10)
    for _ in range(1000):  # turns of the loop
        if lines(log, "left-1"):
            break
        await asyncio.sleep(0)
    assert "its client left after" in lines(log, "left-1")[0]


async def test_two_requests_on_one_connection_do_not_share_it(client: aiohttp.ClientSession, log: StringIO) -> None:
    await asyncio.gather(*(ask(client, PATH, f"many-{n}") for n in range(8)))
    assert [len(lines(log, f"many-{n}")) for n in range(8)] == [1] * 8
    assert request_ids.current() == ""


async def test_the_device_that_answers_for_it_logs_the_same_id(pair: Pair, log: StringIO) -> None:
    await ask(pair.session, PATH, "far-1")
    relayed, asked = lines(log, "far-1")
    assert "POST /answer of " in relayed and f"POST {PATH} of 127.0.0.1: 200" in asked


async def test_who_only_says_a_name_is_told_with_the_address(client: aiohttp.ClientSession, log: StringIO) -> None:
    """Else anybody could ask in the name of a person who has a token."""
    headers = {"X-Request-Id": "said-1", "X-OpenWebUI-User-Name": "anna"}
    async with client.post("/api/show", json={"model": "none"}, headers=headers):
        pass
    assert " of anna (127.0.0.1): 404 " in lines(log, "said-1")[0]
