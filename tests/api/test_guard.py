"""Who may call what: the decision itself, and every route of the real server."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from peerllm.api.guard import SECURITY_HEADERS, Call, Guard, host_name, is_loopback
from peerllm.api.server import ApiServer, create_app
from peerllm.api.token import MIN_TOKEN_CHARS, load_or_create_token
from peerllm.errors import BadInputError
from tests.api.fake import FakeHousehold, make_model_dir

TOKEN = "correct-horse-battery-staple"
HOST = "127.0.0.1:8642"
JSON = {"Content-Type": "application/json"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PAGE = {"X-PeerLLM": "page"}
HOME = Guard(TOKEN, loopback=True, names=frozenset({"peerllm.home"}))
OPEN = Guard(TOKEN, loopback=False)


def status(
    guard: Guard,
    method: str,
    path: str,
    headers: dict[str, str],
    cookies: dict[str, str] | None = None,
    query_token: str = "",
) -> int:
    refusal = guard.refusal(Call(method, path, {"Host": HOST, **headers}, cookies or {}, query_token))
    return 200 if refusal is None else refusal.status


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8642", True),
        ("localhost", True),
        ("LocalHost:1", True),
        ("[::1]:8642", True),
        ("127.9.9.9", True),
        ("peerllm.home:80", True),
        ("evil.example", False),
        ("evil.example:8642", False),
        ("192.168.1.5:8642", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[::1", False),
        ("::1", False),
        ("localhost:80@evil.example", False),
        ("evil.example:127.0.0.1", False),
        ("localhost.", False),
        ("0.0.0.0", False),
    ],
)
def test_host(host: str, allowed: bool) -> None:
    assert (HOME.refusal(Call("GET", "/v1/models", {"Host": host})) is None) is allowed


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (f"http://{HOST}", True),
        (f"https://{HOST}", True),
        ("http://127.0.0.1:3000", False),
        ("http://localhost:8642", False),
        ("null", False),
        ("", False),
        ("https://evil.example", False),
        (f"ftp://{HOST}", False),
        (f"http://{HOST}.evil.example", False),
        (f"http://evil.example/{HOST}", False),
        ("http://[", False),
        (f"http://x@{HOST}", False),
        (HOST, False),
    ],
)
@pytest.mark.parametrize("guard", [HOME, OPEN])
def test_origin(guard: Guard, origin: str, allowed: bool) -> None:
    for method, path in (
        ("GET", "/peerllm/v1/status"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/peerllm/v1/leave"),
    ):
        assert (status(guard, method, path, {"Origin": origin, **BEARER, **JSON}) == 200) is allowed


@pytest.mark.parametrize(
    ("site", "path", "allowed"),
    [
        ("cross-site", "/v1/models", False),
        ("same-site", "/v1/models", False),
        ("same-origin", "/v1/models", True),
        ("none", "/v1/models", True),
        ("cross-site", "/", True),
        ("cross-site", "/static/app.js", False),
    ],
)
def test_pages_of_other_sites_cannot_embed_anything(site: str, path: str, allowed: bool) -> None:
    assert (status(HOME, "GET", path, {"Sec-Fetch-Site": site}) == 200) is allowed


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (JSON, 401),
        ({**JSON, "Authorization": "Bearer wrong"}, 401),
        ({**JSON, "Authorization": f"Basic {TOKEN}"}, 401),
        ({**JSON, "Authorization": "Bearer "}, 401),
        ({**JSON, **BEARER}, 200),
        ({**JSON, **PAGE}, 200),
        ({**JSON, "X-Api-Key": TOKEN}, 200),
        ({**JSON, "X-Api-Key": "wrong"}, 401),
        ({**JSON, "Authorization": f"bearer  {TOKEN}"}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8", **PAGE}, 200),
        ({**PAGE, **BEARER}, 200),
        ({**JSON, **PAGE, "Origin": "https://evil.example"}, 403),
        ({**JSON, **BEARER, "Origin": "https://evil.example"}, 403),
    ],
)
def test_changing_the_household_on_loopback(headers: dict[str, str], expected: int) -> None:
    assert status(HOME, "POST", "/peerllm/v1/run", headers) == expected


def test_chatting_on_loopback_needs_no_token_but_json() -> None:
    assert status(HOME, "POST", "/v1/chat/completions", {**JSON, "Authorization": "Bearer sk-anything"}) == 200
    assert status(HOME, "POST", "/v1/chat/completions", {"Content-Type": "text/plain"}) == 415
    assert status(HOME, "POST", "/api/chat", {"Content-Type": "application/x-www-form-urlencoded", **BEARER}) == 200


@pytest.mark.parametrize("form", [{"Content-Type": "application/x-www-form-urlencoded"}, {}])
def test_what_a_person_types_on_loopback_need_not_say_that_it_is_json(form: dict[str, str]) -> None:
    for sign in (
        {"User-Agent": "curl/8.5.0"},
        {"User-Agent": "Wget/1.21"},
        {"X-Api-Key": "any"},
        {"Authorization": "Bearer any"},
    ):
        for method, path in (("POST", "/api/chat"), ("DELETE", "/api/delete")):
            assert status(HOME, method, path, {**form, **sign}) == 200
            assert status(HOME, method, path, {**form, **sign, "Origin": "https://evil.example"}) == 403
        assert status(HOME, "POST", "/peerllm/v1/run", {**form, **sign}) == 401
        assert status(OPEN, "POST", "/api/chat", {**form, **sign}) == 401
    for sign in ({"User-Agent": "Mozilla/5.0 curl/8"}, {"Authorization": "Basic eDp5"}, {"X-Api-Key": ""}):
        assert status(HOME, "POST", "/api/chat", {**form, **sign}) == 415


def test_what_is_deleted_by_name_needs_no_body() -> None:
    path = "/v1/responses/resp_1"
    assert [status(HOME, method, path, {}) for method in ("DELETE", "POST", "PUT")] == [200, 415, 415]
    assert status(HOME, "DELETE", path, {"Content-Type": "text/plain"}) == 415
    assert status(HOME, "DELETE", path, {"Origin": "https://evil.example"}) == 403
    assert status(OPEN, "DELETE", path, {}) == 401


@pytest.mark.parametrize("path", ["/", "/v1/models", "/static/app.js", "/peerllm/v1/status", "/nowhere"])
def test_beyond_loopback_everything_needs_the_token(path: str) -> None:
    cookie = {OPEN.cookie: TOKEN}
    assert status(OPEN, "GET", path, {}) == 401
    assert status(OPEN, "GET", path, {"Authorization": f"Bearer {TOKEN}x"}) == 401
    assert status(OPEN, "GET", path, {}, {OPEN.cookie: "wrong"}) == 401
    assert status(OPEN, "GET", path, {}, {"peerllm_0": TOKEN}) == 401
    assert status(OPEN, "GET", path, BEARER) == 200
    assert status(OPEN, "GET", path, {}, cookie) == 200
    assert status(OPEN, "GET", path, {}, query_token=TOKEN) == (200 if path == "/" else 401)


def test_beyond_loopback_the_cookie_alone_changes_nothing() -> None:
    cookie = {OPEN.cookie: TOKEN}
    assert status(OPEN, "POST", "/peerllm/v1/run", JSON, cookie) == 401
    assert status(OPEN, "POST", "/peerllm/v1/run", {**JSON, **PAGE}, cookie) == 200
    assert status(OPEN, "POST", "/peerllm/v1/run", {**JSON, **PAGE}) == 401
    assert status(OPEN, "POST", "/", JSON, query_token=TOKEN) == 401


def test_tokens_of_any_bytes_are_compared() -> None:
    assert not HOME.is_token("é" * 10)
    assert not HOME.is_token("\udcff")
    assert HOME.is_token(TOKEN)


def test_host_names() -> None:
    assert [host_name(one) for one in ("a:1", "[::1]:2", "[::1]", "A", "a:b")] == ["a", "[::1]", "[::1]", "a", ""]
    assert is_loopback("::1") and is_loopback("[::1]") and is_loopback("127.8.8.8") and not is_loopback("0.0.0.0")


def routes(household: FakeHousehold) -> list[tuple[str, str]]:
    """Every (method, path) of the application, so that a new route cannot be forgotten."""
    found = []
    for route in create_app(household, TOKEN, True).router.routes():
        info: Any = route.resource.get_info() if route.resource else {}
        path = info.get("path") or info["formatter"].format(name="app.js", id="builtin")
        found.append((route.method, path))
    assert len(found) >= 15
    return found


@pytest.fixture
async def exposed(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[ApiServer]:
    one = ApiServer(household, "0.0.0.0", 0, tmp_path / "exposed", in_process=True)
    await one.start()
    yield one
    await one.close()


async def codes(
    server: ApiServer, household: FakeHousehold, headers: dict[str, str], **options: Any
) -> dict[tuple[str, str], int]:
    found = {}
    for method, path in routes(household):
        if path.endswith("/events") and options.get("skip_events"):
            continue
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method, server.url + path, headers=headers, data="{}" if method == "POST" else None
            ) as response,
        ):
            found[method, path] = response.status
            for name, value in SECURITY_HEADERS.items():
                assert response.headers[name] == value
            assert "Access-Control-Allow-Origin" not in response.headers
    return found


async def test_every_route_refuses_a_foreign_host(server: ApiServer, household: FakeHousehold, token: str) -> None:
    headers = {"Host": "evil.example", "Authorization": f"Bearer {token}", **JSON, **PAGE}
    assert set((await codes(server, household, headers)).values()) == {403}


async def test_every_route_refuses_a_foreign_origin(server: ApiServer, household: FakeHousehold, token: str) -> None:
    headers = {"Origin": "https://evil.example", "Authorization": f"Bearer {token}", **JSON, **PAGE}
    assert set((await codes(server, household, headers)).values()) == {403}
    assert not household.calls
    assert not household.runs


async def test_every_route_beyond_loopback_refuses_without_token(exposed: ApiServer, household: FakeHousehold) -> None:
    for given in ({}, {"Authorization": "Bearer " + "x" * 43}, {"Cookie": "peerllm_token=x"}, PAGE):
        assert set((await codes(exposed, household, {**given, **JSON})).values()) == {401}
    assert not household.calls
    assert not household.runs


async def test_every_route_beyond_loopback_passes_with_token(
    exposed: ApiServer, household: FakeHousehold, tmp_path: Path
) -> None:
    token = load_or_create_token(tmp_path / "exposed")
    found = await codes(exposed, household, {"Authorization": f"Bearer {token}", **JSON}, skip_events=True)
    assert not {401, 403, 415} & set(found.values())


async def test_every_change_on_loopback_needs_more_than_json(server: ApiServer, household: FakeHousehold) -> None:
    found = await codes(server, household, JSON, skip_events=True)
    assert {path for (_, path), code in found.items() if code == 401} == {
        path for method, path in routes(household) if method == "POST" and path.startswith("/peerllm/")
    }
    assert not household.calls


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "DELETE", "OPTIONS"])
async def test_a_method_that_no_route_takes_is_refused_with_those_it_takes(
    server: ApiServer, exposed: ApiServer, method: str
) -> None:
    """Also without JSON's content type; the token comes first."""
    async with aiohttp.ClientSession() as session:
        for path, allowed in (("/v1/models", {"GET", "HEAD"}), ("/peerllm/v1/leave", {"POST"})):
            async with session.request(method, server.url + path) as response:
                assert response.status == 405 and set(response.headers["Allow"].split(",")) == allowed
            async with session.request(method, exposed.url + path) as response:
                assert response.status == 401


async def test_preflights_are_never_granted(server: ApiServer, household: FakeHousehold) -> None:
    for _, path in routes(household):
        headers = {
            "Origin": "https://evil.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-peerllm",
        }
        async with aiohttp.ClientSession() as session, session.options(server.url + path, headers=headers) as response:
            assert response.status == 403
            assert not [name for name in response.headers if name.startswith("Access-Control")]


async def test_the_page_signs_a_browser_in(exposed: ApiServer, tmp_path: Path) -> None:
    token = load_or_create_token(tmp_path / "exposed")
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        async with session.get(f"{exposed.url}/?token={token}") as response:
            assert response.status == 200
            cookie = response.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        async with session.get(exposed.url + "/peerllm/v1/status") as response:
            assert response.status == 200
    async with aiohttp.ClientSession() as session, session.get(f"{exposed.url}/?token=wrong") as response:
        assert response.status == 401
        assert "Set-Cookie" not in response.headers


def test_the_token_is_the_owners_alone_and_stays(tmp_path: Path) -> None:
    first = load_or_create_token(tmp_path / "d")
    path = tmp_path / "d" / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert load_or_create_token(tmp_path / "d") == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first) >= 43
    assert load_or_create_token(tmp_path / "e") != first


def test_a_damaged_token_is_said(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * MIN_TOKEN_CHARS + "\n")
    assert load_or_create_token(tmp_path) == "x" * MIN_TOKEN_CHARS
    (tmp_path / "token").write_text("x" * (MIN_TOKEN_CHARS - 1) + "\n")
    with pytest.raises(BadInputError, match="delete it"):
        load_or_create_token(tmp_path)


async def test_a_port_in_use_is_one_line_naming_the_option(
    server: ApiServer, household: FakeHousehold, tmp_path: Path
) -> None:
    second = ApiServer(household, "127.0.0.1", server.port, tmp_path / "other")
    with pytest.raises(BadInputError, match=rf"port {server.port} .* in use.*--api"):
        await second.start()
    await second.close()
    with pytest.raises(BadInputError, match="--api"):
        await ApiServer(household, "no.such.host.invalid", 0, tmp_path / "other").start()


async def test_close_twice_and_urls(household: FakeHousehold, tmp_path: Path) -> None:
    one = ApiServer(FakeHousehold(make_model_dir(tmp_path / "m")), "::1", 0, tmp_path / "six")
    await one.start()
    async with aiohttp.ClientSession() as session, session.get(one.url + "/v1/models") as response:
        assert response.status == 200
    assert one.url.startswith("http://[::1]:")
    await one.close()
    await one.close()
