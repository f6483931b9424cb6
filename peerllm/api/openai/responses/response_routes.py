"""OpenAI's routes under /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from aiohttp import web

from peerllm.api.bodies import read_body
from peerllm.api.core.asking import prompt_tokens
from peerllm.api.core.caller import caller_of
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.repeat import LAST_HEADER
from peerllm.api.core.telling import taking, tell
from peerllm.api.error_answers import FieldError, json_response
from peerllm.api.openai.responses.response_answers import ResponseAnswers
from peerllm.api.openai.responses.response_items import ResponseItem
from peerllm.api.openai.responses.response_requests import ResponseBody
from peerllm.api.openai.responses.response_store import RESPONSES, ResponseStore, StoredResponse

RESPONSES_PATH = "/v1/responses"
MAX_LISTED, LISTED = 100, 20  # items of one list: at most, and where the client does not say
_Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_LISTED)]


def add_responses(app: web.Application) -> None:
    app[RESPONSES] = ResponseStore()
    app.router.add_post(RESPONSES_PATH, create)
    app.router.add_post(RESPONSES_PATH + "/input_tokens", input_tokens)
    app.router.add_get(RESPONSES_PATH + "/{id}", one_response)
    app.router.add_delete(RESPONSES_PATH + "/{id}", delete_response)
    app.router.add_get(RESPONSES_PATH + "/{id}/input_items", input_items)
    app.router.add_post(RESPONSES_PATH + "/{id}/cancel", cancel)


async def create(request: web.Request) -> web.StreamResponse:
    with taking(request):
        body = await read_body(request, ResponseBody)
        if LAST_HEADER in request.headers:
            what = "a stream of this route cannot be resumed; ask again with the same Idempotency-Key"
            raise FieldError(f"{LAST_HEADER}: {what}", LAST_HEADER)
        wanted, said = _asked(request, body)
        store, client = request.app[RESPONSES], _client(request)

        def keep(response: dict[str, Any]) -> None:
            if response["store"]:
                store.keep(client, response, said)

        form = ResponseAnswers(body.told(), keep)
        return await tell(request, [wanted], form, bool(body.stream), form.failing)


async def input_tokens(request: web.Request) -> web.Response:
    """How many tokens such a request has."""
    with taking(request):
        wanted, _ = _asked(request, await read_body(request, ResponseBody))
        count = await prompt_tokens(request.app, wanted, caller_of(request))
    return json_response({"object": "response.input_tokens", "input_tokens": count})


async def one_response(request: web.Request) -> web.Response:
    """One that is kept, as it was told."""
    stored = _stored(request)
    if request.query.get("stream", "").lower() == "true":
        what = "stream: a response that is complete is not streamed again; leave stream out"
        raise FieldError(what, "stream", "unsupported_parameter")
    return web.Response(body=stored.response, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    name = request.match_info["id"]
    request.app[RESPONSES].delete(_client(request), name)
    return json_response({"id": name, "object": "response", "deleted": True})


async def input_items(request: web.Request) -> web.Response:
    """What a response answers, the latest first, as OpenAI's clients page through it."""
    items = _stored(request).items()
    if request.query.get("order", "desc") != "asc":
        items.reverse()
    if (after := request.query.get("after")) is not None:
        places = [index for index, one in enumerate(items) if one.id == after]
        if not places:
            raise FieldError(f"after: there is no item {after[:80]!r}", "after")
        items = items[places[0] + 1 :]
    most = _most(request)
    listed, ids = [one.told() for one in items[:most]], [one.id for one in items[:most]]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return json_response({"object": "list", "data": listed, **ends, "has_more": len(items) > most})


async def cancel(request: web.Request) -> web.Response:
    """Only what runs in the background could be cancelled so."""
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


def _most(request: web.Request) -> int:
    try:
        return msgspec.convert(request.query.get("limit", LISTED), _Limit, strict=False)
    except msgspec.ValidationError as error:
        raise FieldError(f"limit must lie in [1, {MAX_LISTED}]", "limit") from error
