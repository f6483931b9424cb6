"""The answer of a model that another device is the source of, passed on as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import orjson
from aiohttp import web

from peerllm.api.keys import HOUSEHOLD
from peerllm.api.peers.caller import MAX_CLIENT_CHARS, Caller
from peerllm.api.streams import Stream, pulsed
from peerllm.daemon.facade import RelayedAnswer, ServedModel
from peerllm.errors import LinkError

CLIENT_HEADER = "X-PeerLLM-Client"  # which of the relaying device's clients asks
SILENCE_S = 10.0  # seconds after which the client is told that its answer's device is silent
MAX_WHOLE_BYTES = 64 << 20  # of an answer in one piece
MAX_EVENT_BYTES = 4 << 20  # of one event of a stream
_JSON, _EVENTS = "application/json", "text/event-stream"
_KEPT = ("Retry-After", "x-should-retry")  # headers that mean the same here


async def pass_on(
    app: web.Application, request: web.Request, path: str, model: ServedModel, caller: Caller, stream: Stream | None
) -> web.StreamResponse:
    """What the model's source answers to this request: status, errors and events unchanged.

    `stream` may have begun with comments; then a refusal becomes its last event. LinkError if the source is lost.
    """
    headers = {"Content-Type": _JSON, CLIENT_HEADER: caller.client[:MAX_CLIENT_CHARS]}
    async with app[HOUSEHOLD].relay(model.source, path, headers, await request.read()) as answer:
        kind = answer.headers.get("Content-Type", "").partition(";")[0]
        if stream is not None and answer.status == web.HTTPOk.status_code and kind == _EVENTS:
            await _events(stream, answer, model.name)
            return await stream.end()
        if kind != _JSON or not 200 <= answer.status < 600:
            raise LinkError(f"the device of {model.name} answered with HTTP {answer.status} {kind!r}")
        body = await _whole(answer.body)
    if stream is not None and stream.started:
        await stream.send(orjson.Fragment(body))
        return await stream.end()
    kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
    return web.Response(body=body, status=answer.status, content_type=_JSON, headers=kept)


async def _events(stream: Stream, answer: RelayedAnswer, name: str) -> None:
    """Whole events only, so that one that broke off is not followed by another in its middle."""
    held = b""
    async with aclosing(pulsed(answer.body, SILENCE_S)) as pieces:
        async for piece in pieces:
            if piece is None:
                await stream.comment(f"the device of {name} is silent")
                continue
            whole, mark, held = (held + piece).rpartition(b"\n\n")
            if mark:
                await stream.write(whole + mark)
            if len(held) > MAX_EVENT_BYTES:
                raise LinkError(f"the device of {name} sends an event without an end")
    if held:
        raise LinkError(f"the answer of {name} broke off")


async def _whole(body: AsyncIterator[bytes]) -> bytes:
    pieces, size = [], 0
    async for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size > MAX_WHOLE_BYTES:
            raise LinkError(f"another device's answer is larger than {MAX_WHOLE_BYTES} bytes")
    return b"".join(pieces)
