"""Who asks: what fairness between clients goes by."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

MAX_CLIENT_CHARS = 128


@dataclass(frozen=True, slots=True)
class Caller:
    """`client` tells clients apart; `device` is the device that relayed the request, "" for a client of this one."""

    client: str
    device: str = ""

    @property
    def asker(self) -> str:
        """Whose share of what there is for all is used: an address of this device's clients, or another device."""
        return self.device or self.client

    def payer(self, user: str) -> str:
        """Whose share of what is kept for clients is used: of another device's clients that device's."""
        return self.device or self.group(user)

    def group(self, user: str) -> str:
        """The name under which slots are shared out: no device can speak for a client of another one."""
        return f"device:{self.device}/{self.client}/{user}" if self.device else f"{self.client}/{user}"


def caller_of(request: web.Request) -> Caller:
    """A client of this device, by its address."""
    return Caller(request.remote or "")
