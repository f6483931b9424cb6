"""The answer of a model that another device is the source of, passed on as it comes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from peerllm.api.error_answers import RETRY_AFTER_S
from peerllm.api.peers.caller import MAX_CLIENT_CHARS, Caller
from peerllm.api.repeat import FLEETING_HEADER, KEY_HEADER, LAST_HEADER, DeviceLeavingError, Repeat
from peerllm.api.streams import Stream, pulsed
from peerllm.daemon.facade import Household, RelayedAnswer, ServedModel
from peerllm.errors import LinkError

CLIENT_HEADER = "X-PeerLLM-Client"  # which of the relaying device's clients asks
SILENCE_S = 1.0  # seconds without a byte after which it is looked whether the answer's device is heard
USUAL_SILENCES = 5  # in a row, while it is: it tells something every 5 s
MAX_SILENCES = 90  # in a row: longer than membership waits for a device that is silent altogether
MAX_WHOLE_BYTES = 64 << 20  # of an answer in one piece
MAX_EVENT_BYTES = 4 << 20  # of one event of a stream
_JSON, _EVENTS = "application/json", "text/event-stream"
_KEPT = ("Retry-After", "x-should-retry")  # headers that mean the same here
_LAST = re.compile(rb'data: (\[DONE\]|\{"error":)')  # with one of these every stream ends
_LEAVING = f'"code":"{DeviceLeavingError.code}"'.encode()
_IDS = re.compile(rb"(?m)^id: (?:[0-9]{1,10}|end)\n")
_DATA = re.compile(rb"(?:^|\n)data: ")
_ID = re.compile(rb"(?:^|\n)id: ([0-9]{1,10}|end)\n")


@dataclass(slots=True)
class RemoteAnswer:
    """`moved` says whether another device answers for the model by now; `begun`: some of it has come."""

    household: Household
    model: ServedModel
    caller: Caller
    repeat: Repeat
    moved: Callable[[], bool]
    begun: bool = False

    async def pass_on(self, request: web.Request, path: str, stream: Stream | None) -> web.StreamResponse:
        """What the model's source answers to this request: status, errors and events unchanged.

        `stream` may have begun already; then a refusal becomes its last event. LinkError if the source is lost;
        `repeat` then has the last event that the client got.
        """
        headers = {
            "Content-Type": _JSON,
            CLIENT_HEADER: self.caller.client[:MAX_CLIENT_CHARS],
            KEY_HEADER: self.repeat.key,
        }
        if self.repeat.last is not None:
            headers[LAST_HEADER] = self.repeat.last
        if self.repeat.fleeting:
            headers[FLEETING_HEADER] = "1"
        async with self.household.relay(self.model.source, path, headers, await request.read()) as answer:
            kind = answer.headers.get("Content-Type", "").partition(";")[0]
            if stream is not None and answer.status == web.HTTPOk.status_code and kind == _EVENTS:
                await self._events(stream, answer)
                return await stream.end()
            if kind != _JSON or not 200 <= answer.status < 600:
                raise LinkError(f"its device answered with HTTP {answer.status} {kind[:40]!r}")
            body = (await self._whole(answer.body)).lstrip()
            if body.startswith(b'{"error":') and _LEAVING in body:
                self.begun = False
                raise LinkError("its device does not answer for it any more")
            self.begun = True
        if stream is not None and stream.started:
            await stream.send(orjson.Fragment(body))
            return await stream.end()
        kept = {header: answer.headers[header] for header in _KEPT if header in answer.headers}
        status = answer.status
        if status == web.HTTPOk.status_code and body.startswith(b'{"error":'):  # after signs of life
            status, kept["Retry-After"] = _status_of(body), str(RETRY_AFTER_S)
        return web.Response(body=body, status=status, content_type=_JSON, headers=kept)

    async def _events(self, stream: Stream, answer: RelayedAnswer) -> None:
        """Whole events only, so that one that broke off is not followed by another in its middle."""
        held, ended, silences = bytearray(), False, 0
        async with aclosing(pulsed(answer.body, SILENCE_S)) as pieces:
            async for piece in pieces:
                if piece is None:
                    if self.moved():
                        raise LinkError("another device answers for it now")
                    silences += 1
                    if silences > MAX_SILENCES:
                        raise LinkError(f"its device said nothing for {SILENCE_S * MAX_SILENCES:g} s")
                    source = self._source()
                    if silences > USUAL_SILENCES or source.get("state") == "silent":
                        name = source.get("name") or f"the device of {self.model.name}"
                        await stream.comment(f"nothing is heard of {name}")
                    continue
                silences = 0
                looked = max(0, len(held) - 1)  # in small pieces, too, each byte is looked at once
                held += piece
                if (end := held.rfind(b"\n\n", looked)) >= 0:
                    whole = bytes(held[:end])
                    del held[: end + 2]
                    last = whole.rpartition(b"\n\n")[2]
                    if last.startswith(b'data: {"error":') and _LEAVING in last:
                        raise LinkError("its device does not answer for it any more")
                    self.begun = self.begun or _DATA.search(whole) is not None
                    ids = _ID.findall(whole)
                    await stream.write((_IDS.sub(b"", whole) if self.repeat.fleeting else whole) + b"\n\n")
                    ended = _LAST.search(last) is not None
                    if ids:
                        self.repeat.last = ids[-1].decode()
                if len(held) > MAX_EVENT_BYTES:
                    raise LinkError("its device sends an event without an end")
        if not ended:
            raise LinkError("its device broke it off")

    def _source(self) -> Mapping[str, Any]:
        """What is known of the device that answers."""
        devices = self.household.status()["devices"]
        return next((one for one in devices if one["id"] == self.model.source), {})

    async def _whole(self, body: AsyncIterator[bytes]) -> bytes:
        pieces, size = [], 0
        async for piece in body:
            self.begun = self.begun or not piece.isspace()
            pieces.append(piece)
            size += len(piece)
            if size > MAX_WHOLE_BYTES:
                raise LinkError(f"it is larger than {MAX_WHOLE_BYTES} bytes")
        return b"".join(pieces)


def _status_of(error: bytes) -> int:
    try:
        status = orjson.loads(error)["error"]["status"]
    except (ValueError, LookupError, TypeError):
        status = None
    return status if isinstance(status, int) and 400 <= status < 600 else web.HTTPServiceUnavailable.status_code
