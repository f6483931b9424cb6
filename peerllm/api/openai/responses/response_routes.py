"""OpenAI's routes under /v1/responses."""

from __future__ import annotations

from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.core.asking import prompt_tokens
from peerllm.api.core.caller import caller_of
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.repeat import LAST_HEADER
from peerllm.api.core.telling import tell
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.openai_fields import Flag
from peerllm.api.openai.openai_objects import StreamEnd
from peerllm.api.openai.responses.response_answers import ResponseAnswers
from peerllm.api.openai.responses.response_items import ResponseItem
from peerllm.api.openai.responses.response_objects import (
    RESPONSE_EVENTS,
    DeletedResponse,
    InputTokens,
    ListedItems,
    ResponseObject,
)
from peerllm.api.openai.responses.response_requests import ResponseBody
from peerllm.api.openai.responses.response_store import RESPONSES, ResponseStore, StoredResponse
from peerllm.api.routes.api_route import JSON, ApiRoute, NoFields, add_routes
from peerllm.api.streams import SSE

RESPONSES_PATH = "/v1/responses"
_COUNT = "/input_tokens"
_ONE = RESPONSES_PATH + "/{id:(?!input_tokens$)[^/]+}"
MAX_LISTED, LISTED = 100, 20  # items of one list: at most, and where the client does not say


class ItemPage(Struct):
    """Which items: those behind `after`, in this order."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] = LISTED
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class ResponseQuery(Struct):
    stream: Flag = None


def add_responses(app: web.Application) -> None:
    app[RESPONSES] = ResponseStore()
    streamed = (*RESPONSE_EVENTS, StreamEnd)
    add_routes(
        app,
        ApiRoute("POST", RESPONSES_PATH, create_response, {JSON: ResponseObject, SSE: streamed}, asks=True),
        ApiRoute("POST", RESPONSES_PATH + _COUNT, count_input_tokens, asks=True),
        ApiRoute("GET", _ONE, read_response, {JSON: ResponseObject}, refuses=(404,)),
        ApiRoute("DELETE", _ONE, delete_response, refuses=(404,)),
        ApiRoute("GET", _ONE + "/input_items", list_input_items, refuses=(404,)),
        ApiRoute("POST", _ONE + "/cancel", cancel_response, refuses=(404,)),
    )


async def create_response(request: web.Request, body: ResponseBody) -> web.StreamResponse:
    """The model's answer to items."""
    if LAST_HEADER in request.headers:
        what = "a stream of this route cannot be resumed; ask again with the same Idempotency-Key"
        raise FieldError(f"{LAST_HEADER}: {what}", LAST_HEADER)
    wanted, said = _asked(request, body)
    store, client = request.app[RESPONSES], _client(request)

    def keep(response: ResponseObject) -> None:
        if response["store"]:
            store.keep(client, response, said)

    form = ResponseAnswers(body.told(), keep)
    return await tell(request, [wanted], form, bool(body.stream), form.failing)


async def count_input_tokens(request: web.Request, body: ResponseBody) -> InputTokens:
    """How many tokens such a request has; a model that does not run is started for that."""
    wanted, _ = _asked(request, body)
    count = await prompt_tokens(request.app, wanted, caller_of(request))
    return {"object": "response.input_tokens", "input_tokens": count}


async def read_response(request: web.Request, *, query: ResponseQuery) -> web.Response:
    """A response that is kept, as it was told."""
    stored = _stored(request)
    if query.stream:
        what = "stream: a response that is complete is not streamed again; leave stream out"
        raise FieldError(what, "stream", "unsupported_parameter")
    return web.Response(body=stored.response, content_type=JSON)


async def delete_response(request: web.Request) -> DeletedResponse:
    """Keep a response no longer."""
    name = request.match_info["id"]
    request.app[RESPONSES].delete(_client(request), name)
    return {"id": name, "object": "response", "deleted": True}


async def list_input_items(request: web.Request, *, query: ItemPage) -> ListedItems:
    """What a response answers, the latest first if nothing else is said."""
    items = _stored(request).items()
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        places = [index for index, one in enumerate(items) if one.id == query.after]
        if not places:
            raise FieldError(f"after: there is no item {query.after[:80]!r}", "after")
        items = items[places[0] + 1 :]
    page = [one.told() for one in items[: query.limit]]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(items) > query.limit
    return {"object": "list", "data": page, "first_id": ends[0], "last_id": ends[1], "has_more": more}


async def cancel_response(request: web.Request, body: NoFields) -> ResponseObject:
    """Refused: only what ran in the background could be cancelled so."""
    _stored(request)
    raise FieldError("only responses in the background are cancelled; end a stream by hanging up", "response_id")


def _asked(request: web.Request, body: ResponseBody) -> tuple[Generation, list[ResponseItem]]:
    """The request in the shared form, and all items that it answers."""
    store, client = request.app[RESPONSES], _client(request)
    earlier: list[ResponseItem] = []
    if body.previous_response_id is not None:
        earlier = store.find(client, body.previous_response_id, "previous_response_id").conversation()
    own = store.resolved(client, body.items())
    return body.generation(earlier, own), [*earlier, *own]


def _stored(request: web.Request) -> StoredResponse:
    return request.app[RESPONSES].find(_client(request), request.match_info["id"])


def _client(request: web.Request) -> str:
    """Whose responses are found: whoever shares in what there is for all."""
    return caller_of(request).asker
