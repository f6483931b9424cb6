"""Tokens of persons: what they open, whom they name, and how much each asked for."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from peerllm.api.askers.accounts import MAX_ACCOUNTS, Accounts
from peerllm.api.askers.person_tokens import MAX_PERSONS, PersonTokens
from peerllm.api.core.caller import Caller
from peerllm.api.server import ApiServer
from peerllm.daemon.decide.fair_queue import asker_of
from peerllm.errors import BadInputError, NotFoundError
from tests.api.fake import FakeHousehold
from tests.api.relay_pair import ASK, PATH, Pair

BODY = {"Content-Type": "application/json"}
PAGE = {"X-PeerLLM": "page"}


@pytest.fixture
async def persons(tmp_path: Path) -> PersonTokens:
    return PersonTokens(tmp_path / "persons.json")


async def test_only_hashes_are_kept_and_come_back(persons: PersonTokens, tmp_path: Path) -> None:
    given = {name: await persons.add(name) for name in ("anna", "Ben Müller")}
    file = tmp_path / "persons.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(token in file.read_text() for token in given.values())
    again = PersonTokens(file)
    assert [again.person_of(token) for token in given.values()] == list(given)
    assert [again.person_of(one) for one in ("", given["anna"] + "x", "\udcff")] == [""] * 3
    await again.revoke("ANNA")
    assert again.person_of(given["anna"]) == "" and PersonTokens(file).person_of(given["anna"]) == ""
    assert PersonTokens(file).person_of(given["Ben Müller"]) == "Ben Müller"


async def test_names_and_numbers_are_bounded(persons: PersonTokens, tmp_path: Path) -> None:
    for name in ("", " ", "a/b", "a\nb", " a", "x" * 64):
        with pytest.raises(BadInputError):
            await persons.add(name)
    with pytest.raises(NotFoundError):
        await persons.revoke("nobody")
    for number in range(MAX_PERSONS):
        await persons.add(f"p{number}")
    with pytest.raises(BadInputError, match="take one back"):
        await persons.add("one more")
    (tmp_path / "persons.json").write_text("{")
    with pytest.raises(BadInputError, match="delete it"):
        PersonTokens(tmp_path / "persons.json")


@pytest.fixture
async def exposed(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[tuple[ApiServer, str, str]]:
    """Beyond loopback: the server, its own token, and anna's."""
    server = ApiServer(household, "0.0.0.0", 0, tmp_path / "exposed", in_process=True)
    await server.start()
    own = (tmp_path / "exposed" / "token").read_text().strip()
    async with (
        aiohttp.ClientSession(server.url, headers=bearer(own)) as session,
        session.post("/peerllm/v1/tokens", json={"person": "anna"}) as response,
    ):
        anna = (await response.json())["token"]
    yield server, own, anna
    await server.close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def status(session: aiohttp.ClientSession, method: str, path: str, body: Any = None, **more: Any) -> int:
    async with session.request(method, path, json=body, **more) as response:
        await response.read()
        return response.status


async def test_a_person_may_ask_and_look_but_change_nothing(exposed: tuple[ApiServer, str, str]) -> None:
    server, own, anna = exposed
    change = "POST", "/peerllm/v1/tokens", {"person": "eve"}
    for given in (bearer(anna), {"X-Api-Key": anna}):
        async with aiohttp.ClientSession(server.url, headers=given) as session:
            assert await status(session, "POST", PATH, ASK) == 200
            assert await status(session, "GET", "/peerllm/v1/status") == 200
            assert await status(session, *change) == 403
            assert await status(session, *change, headers=PAGE) == 403
    async with aiohttp.ClientSession(server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as page:
        assert await status(page, "GET", "/") == 401
        assert await status(page, "GET", f"/?token={anna}") == 200
        assert await status(page, "POST", PATH, ASK) == 200
        assert await status(page, *change, headers=PAGE) == 403
    async with aiohttp.ClientSession(server.url, headers=bearer(own)) as session:
        assert await status(session, "POST", "/peerllm/v1/tokens/revoke", {"person": "anna"}) == 200
    async with aiohttp.ClientSession(server.url, headers=bearer(anna)) as session:
        assert await status(session, "GET", "/v1/models") == 401


async def test_a_name_in_a_header_opens_nothing(exposed: tuple[ApiServer, str, str]) -> None:
    server, _, _ = exposed
    async with aiohttp.ClientSession(server.url, headers={"X-OpenWebUI-User-Name": "anna"}) as session:
        assert await status(session, "POST", PATH, ASK) == 401


async def test_answers_are_accounted_under_the_persons_name(
    exposed: tuple[ApiServer, str, str], household: FakeHousehold
) -> None:
    server, own, anna = exposed
    named = {"X-OpenWebUI-User-Name": "Carla%20%2FM%C3%BCller%0A", "X-OpenWebUI-User-Id": "7"}
    for given in (bearer(anna), bearer(anna), {**bearer(own), **named}, {**bearer(anna), **named}, bearer(own)):
        async with aiohttp.ClientSession(server.url, headers=given) as session:
            assert await status(session, "POST", PATH, {**ASK, "max_tokens": 3}) == 200
    status_of = f"{server.url}/peerllm/v1/status"
    async with aiohttp.ClientSession(headers=bearer(own)) as session, session.get(status_of) as response:
        told = (await response.json())["asking"]
    found = {(one["name"], one["by"]): (one["answers"], one["under_way"], one["answer_tokens"]) for one in told}
    assert found == {
        ("anna", "token"): (2, 0, 6),
        ("Carla Müller", "header"): (1, 0, 3),
        ("Carla Müller (anna)", "token"): (1, 0, 3),
        ("127.0.0.1", "address"): (1, 0, 3),
    }
    groups = [one.client for one in household.requests]
    assert groups == [
        "person:anna/",
        "person:anna/",
        "127.0.0.1/Carla Müller",
        "person:anna/Carla Müller",
        "127.0.0.1/",
    ]
    assert [asker_of(one) for one in groups] == ["person:anna"] * 2 + ["127.0.0.1", "person:anna", "127.0.0.1"]


async def test_the_source_hears_who_asked_another_device(pair: Pair) -> None:
    named = {"X-OpenWebUI-User-Name": "Carla"}
    async with pair.session.post(PATH, json={**ASK, "max_tokens": 3}, headers=named) as response:
        assert response.status == 200
        await response.read()
    async with aiohttp.ClientSession(pair.server.url) as session, session.get("/peerllm/v1/status") as response:
        (one,) = (await response.json())["asking"]
    assert (one["name"], one["by"], one["answers"], bool(one["device"])) == ("Carla", "header", 1, True)
    assert asker_of(pair.laptop.requests[0].client) == f"device:{pair.mini.id}"


async def test_accounts_of_those_who_ask_no_more_go_first() -> None:
    accounts = Accounts()
    waiting = accounts.counted(Caller("waits"), endless())
    await anext(waiting)
    for number in range(MAX_ACCOUNTS + 5):
        async for _ in accounts.counted(Caller(f"c{number}"), nothing()):
            pass
    told = accounts.told(str)
    assert len(told) == MAX_ACCOUNTS
    assert (told[-1]["name"], told[-1]["under_way"], told[0]["name"]) == ("waits", 1, f"c{MAX_ACCOUNTS + 4}")
    await waiting.aclose()
    assert accounts.told(str)[-1]["under_way"] == 0


async def nothing() -> AsyncIterator[Any]:
    return
    yield


async def endless() -> AsyncIterator[Any]:
    while True:
        yield None
