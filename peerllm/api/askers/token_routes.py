"""/peerllm/v1/tokens: the persons who have tokens of this device; adding and taking back are its owner's."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.askers.person_tokens import MAX_PERSON_CHARS
from peerllm.api.bodies import read_body
from peerllm.api.error_answers import json_response
from peerllm.api.keys import GUARD


class PersonBody(Struct):
    person: Annotated[str, Meta(min_length=1, max_length=MAX_PERSON_CHARS)]


def add_tokens(app: web.Application) -> None:
    app.router.add_get("/peerllm/v1/tokens", tokens)
    app.router.add_post("/peerllm/v1/tokens", add_token)
    app.router.add_post("/peerllm/v1/tokens/revoke", revoke_token)


async def tokens(request: web.Request) -> web.Response:
    """{"tokens": [{"person", "created"}]}, the oldest first."""
    listed = [{"person": one.person, "created": one.created} for one in request.app[GUARD].persons.listed()]
    return json_response({"tokens": listed})


async def add_token(request: web.Request) -> web.Response:
    """{"person"} gives {"person", "token"}."""
    person = (await read_body(request, PersonBody)).person
    return json_response({"person": person, "token": await request.app[GUARD].persons.add(person)})


async def revoke_token(request: web.Request) -> web.Response:
    """{"person"}."""
    await request.app[GUARD].persons.revoke((await read_body(request, PersonBody)).person)
    return json_response({"ok": True})
