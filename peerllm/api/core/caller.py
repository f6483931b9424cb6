"""Who asks: what fairness between clients goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from aiohttp import web

MAX_CLIENT_CHARS = 128
MAX_TOLD_CHARS = 128
TOLD_BY = ("X-OpenWebUI-User-Name", "X-OpenWebUI-User-Email", "X-OpenWebUI-User-Id")  # a person behind a shared token
PERSON: web.RequestKey[str] = web.RequestKey("person", str)  # whose token came with a request
_TOKEN = "person:"  # noqa: S105  before the name of a client whose token names a person


@dataclass(frozen=True, slots=True)
class Caller:
    """`client` tells clients apart; `device` is the device that relayed the request, "" for a client of this one.

    `person` is the one whom a client names that asks for several: a word for accounts and shares, never for rights.
    """

    client: str
    device: str = ""
    person: str = ""

    @property
    def asker(self) -> str:
        """Whose share of what there is for all is used: a client of this device, or another device."""
        return self.device or self.client

    @property
    def known_by(self) -> Literal["token", "header", "address"]:
        return "token" if self.client.startswith(_TOKEN) else "header" if self.person else "address"

    @property
    def shown(self) -> str:
        """The name in accounts."""
        client = self.client.removeprefix(_TOKEN)
        return f"{self.person} ({client})" if self.person and self.known_by == "token" else self.person or client

    @property
    def logged(self) -> str:
        """The name in logs: who only says so cannot pass for somebody who has a token."""
        return f"{self.shown} ({self.client})" if self.known_by == "header" else self.shown

    def payer(self, user: str) -> str:
        """Whose share of what is kept for clients is used: of another device's clients that device's."""
        return self.device or self.group(user)

    def group(self, user: str) -> str:
        """The name under which slots are shared out: no device can speak for a client of another one."""
        user = user or self.person
        return f"device:{self.device}/{self.client}/{user}" if self.device else f"{self.client}/{user}"


def caller_of(request: web.Request) -> Caller:
    """A client of this device, by the person whose token it has, else by its address."""
    person = request.get(PERSON, "")
    told = next((name for header in TOLD_BY if (name := request.headers.get(header))), "")
    return Caller(f"{_TOKEN}{person}" if person else request.remote or "", person=_tidy(told))


def _tidy(told: str) -> str:
    """A name as a client tells it: percent-encoded, and anything."""
    shown = "".join(one for one in unquote(told) if one.isprintable() and one != "/")
    return " ".join(shown.split())[:MAX_TOLD_CHARS]
