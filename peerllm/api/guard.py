"""Who may call which route. One pure decision, applied to every route by one middleware.

Bound to loopback, whoever has an account on this machine may chat; what must be kept out is the web: a page of another
origin (its Origin or Sec-Fetch-Site gives it away, or that it has neither the JSON content type nor a token in a
header) and a foreign name that resolves to 127.0.0.1 (DNS rebinding; its Host gives it away).
Bound to any other address, every route needs the token, as
`Authorization: Bearer TOKEN`, as `X-Api-Key: TOKEN`, or as the cookie that `/?token=TOKEN` sets. What changes the
household (POST below /peerllm/) needs, on top of the rules above, the token in one of these headers or the header
`X-PeerLLM`, which a foreign page cannot add without a preflight that is never granted. A person's token opens what the
device's own does, but not what changes the household.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from peerllm.api.askers.person_tokens import PersonTokens
from peerllm.api.core.caller import PERSON
from peerllm.api.error_answers import refused

ADMIN_PREFIX = "/peerllm/"
PAGE_PATH = "/"
PAGE_HEADER = "X-PeerLLM"
API_KEY_HEADER = "X-Api-Key"  # where Anthropic's clients put the token
COOKIE_AGE_S = 30 * 24 * 3600  # seconds the page stays signed in
_READING = ("GET", "HEAD")
_WHERE = "the file `token` in its data directory"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Server": "peerllm",
}


def is_loopback(host: str) -> bool:
    """True for localhost and for addresses that never leave the machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Call:
    """The parts of a request that decide whether it may pass."""

    method: str
    path: str
    headers: Mapping[str, str]
    cookies: Mapping[str, str] = field(default_factory=dict)
    query_token: str = ""
    routed: bool = True  # a route takes this method; what none takes changes nothing


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Guard:
    """`names` are the hosts, beside the loopback ones, by which the owner calls this device."""

    token: str
    loopback: bool
    names: frozenset[str] = frozenset()
    persons: PersonTokens = field(default_factory=PersonTokens)

    @property
    def cookie(self) -> str:
        """The session cookie's name, one for each device: browsers share cookies between all ports of a host."""
        return "peerllm_" + hashlib.sha256(self.token.encode()).hexdigest()[:12]

    def refusal(self, call: Call) -> Refusal | None:
        """Why this call may not pass, None if it may."""
        host = call.headers.get("Host", "")
        if self.loopback and not self._own_host(host):
            return Refusal(403, f"this device does not answer to the host {host[:100]!r}; use 127.0.0.1 or localhost")
        foreign = self._foreign_page(call, host)
        if foreign:
            return foreign
        owner, person = any(map(self.is_token, _tokens(call))), self.person(call)
        if not self.loopback and not (owner or person or self._signed_in(call)):
            return Refusal(401, f"this needs the device's token ({_WHERE}): Authorization: Bearer TOKEN")
        if call.method in _READING or not call.routed:
            return None
        kind = call.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        bare = call.method == "DELETE" and not kind  # never without a preflight, and no foreign page has the token
        if kind != "application/json" and not bare and not any(map(self.opens, _tokens(call))):
            return Refusal(415, "send the body as Content-Type: application/json")
        if not call.path.startswith(ADMIN_PREFIX) or owner:
            return None
        if person:
            return Refusal(
                403, f"the token of {person} does not change the household; it takes the device's own ({_WHERE})"
            )
        if not call.headers.get(PAGE_HEADER):
            return Refusal(401, f"this needs the device's token ({_WHERE}), or its own page's header {PAGE_HEADER}")
        return None

    def person(self, call: Call) -> str:
        """Whose token comes with it, "" if no person's does."""
        given = *_tokens(call), call.cookies.get(self.cookie, "")
        return next(filter(None, map(self.persons.person_of, given)), "")

    def opens(self, token: str) -> bool:
        """Whether it is the device's token, or a person's."""
        return self.is_token(token) or bool(self.persons.person_of(token))

    def _own_host(self, host: str) -> bool:
        name = host_name(host)
        return is_loopback(name) or name in self.names

    def _foreign_page(self, call: Call, host: str) -> Refusal | None:
        origin = call.headers.get("Origin")
        if origin is not None:
            scheme, _, netloc = origin.lower().partition("://")
            if scheme not in {"http", "https"} or netloc != host.lower():
                return Refusal(403, "pages of another origin may not call this device")
        followed_link = call.path == PAGE_PATH and call.method in _READING
        if call.headers.get("Sec-Fetch-Site") in {"cross-site", "same-site"} and not followed_link:
            return Refusal(403, "pages of another origin may not call this device")
        return None

    def _signed_in(self, call: Call) -> bool:
        if self.is_token(call.cookies.get(self.cookie, "")):
            return True
        return call.path == PAGE_PATH and call.method in _READING and self.opens(call.query_token)

    def is_token(self, given: str) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def _tokens(call: Call) -> tuple[str, str]:
    scheme, _, given = call.headers.get("Authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else "", call.headers.get(API_KEY_HEADER, "")


def host_name(host: str) -> str:
    """A Host header without its port, lower case; "" if it is none."""
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    if port and not port.isdecimal():
        return ""
    return name.lower()


def guarded(guard: Guard) -> Middleware:
    """The middleware that asks `guard` before any handler runs, for unknown routes too."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        token, routed = request.query.get("token", ""), request.match_info.http_exception is None
        call = Call(request.method, request.path, request.headers, request.cookies, token, routed)
        refusal = guard.refusal(call)
        request[PERSON] = guard.person(call)
        if refusal is None:
            return await handler(request)
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        return refused(request, refusal.status, refusal.message, headers)

    return check


async def add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Signal `on_response_prepare`: on every answer, streams and errors included."""
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
