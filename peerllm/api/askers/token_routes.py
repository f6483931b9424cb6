"""/peerllm/v1/tokens: the persons who have tokens of this device; adding and taking back are its owner's."""

from __future__ import annotations

from typing import Annotated, TypedDict

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.admin import ChangeMade
from peerllm.api.askers.person_tokens import MAX_PERSON_CHARS
from peerllm.api.guard import ADMIN_PREFIX
from peerllm.api.keys import GUARD
from peerllm.api.routes.api_route import ApiRoute, add_routes


class PersonBody(Struct):
    person: Annotated[str, Meta(min_length=1, max_length=MAX_PERSON_CHARS)]


class ListedPerson(TypedDict):
    """`created` in Unix seconds."""

    person: str
    created: int


class Persons(TypedDict):
    """The oldest first."""

    tokens: list[ListedPerson]


class GivenToken(TypedDict):
    person: str
    token: str


def add_tokens(app: web.Application) -> None:
    path = f"{ADMIN_PREFIX}v1/tokens"
    add_routes(
        app,
        ApiRoute("GET", path, tokens),
        ApiRoute("POST", path, add_token),
        ApiRoute("POST", f"{path}/revoke", revoke_token, refuses=(404,)),
    )


async def tokens(request: web.Request) -> Persons:
    """The persons who have tokens of this device."""
    return {"tokens": [{"person": one.person, "created": one.created} for one in request.app[GUARD].persons.listed()]}


async def add_token(request: web.Request, body: PersonBody) -> GivenToken:
    """Make a token for a person; it is told this once."""
    return {"person": body.person, "token": await request.app[GUARD].persons.add(body.person)}


async def revoke_token(request: web.Request, body: PersonBody) -> ChangeMade:
    """From now on the person's token opens nothing."""
    await request.app[GUARD].persons.revoke(body.person)
    return {"ok": True}
