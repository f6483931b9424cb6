"""The answer of a model that another device is the source of: asked for and heard in the form that all APIs share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from peerllm import request_ids
from peerllm.api.core.answer_events import (
    TOLD,
    AnswerEnds,
    AnswerEvent,
    AnswerFails,
    AnswerWaits,
)
from peerllm.api.core.caller import MAX_CLIENT_CHARS, MAX_TOLD_CHARS, Caller
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.repeat import ALL_TOKENS, MAX_KEY_CHARS, DeviceLeavingError, Repeat
from peerllm.api.error_answers import ErrorFacts, RelayedError
from peerllm.api.streams import LINES, pulsed
from peerllm.daemon.facade import Household, RelayedAnswer, ServedModel
from peerllm.errors import EngineError, LinkError, PeerLLMError

ANSWER_PATH = "/answer"  # of the requests between devices
SILENCE_S = 1.0  # seconds without a byte after which it is looked whether the answer's device is heard
USUAL_SILENCES = 5  # in a row, while it is: it tells something every 5 s
MAX_SILENCES = 90  # in a row: longer than membership waits for a device that is silent altogether
MAX_REFUSAL_BYTES = 1 << 20
MAX_EVENT_BYTES = 4 << 20
MAX_ANSWER_BYTES = 512 << 20  # a hundred thousand tokens, each with the 20 that were likeliest, take some 200 MB
_JSON = "application/json"


class RelayedGeneration(Struct, frozen=True, omit_defaults=True):
    """What one device asks another for one of its clients; the rest as in Repeat."""

    generation: Generation
    client: Annotated[str, Meta(max_length=MAX_CLIENT_CHARS)]
    key: Annotated[str, Meta(min_length=1, max_length=MAX_KEY_CHARS)]
    had: Annotated[int, Meta(ge=0, le=ALL_TOKENS)] | None = None
    fleeting: bool = False
    beyond: Annotated[int, Meta(ge=0, le=ALL_TOKENS)] = 0
    person: Annotated[str, Meta(max_length=MAX_TOLD_CHARS)] = ""


@dataclass(slots=True)
class RemoteAnswer:
    """`moved` says whether another device answers for the model by now."""

    household: Household
    model: ServedModel
    caller: Caller
    repeat: Repeat
    moved: Callable[[], bool]

    async def events(self, wanted: Generation) -> AsyncGenerator[AnswerEvent]:
        """What the model's source tells of this answer; its refusals and errors are RelayedErrors.

        LinkError if the source is lost, or does not answer for it any more.
        """
        repeat, client = self.repeat, self.caller.client[:MAX_CLIENT_CHARS]
        how = repeat.key, repeat.had, repeat.fleeting, repeat.beyond, self.caller.person
        body = msgspec.json.encode(RelayedGeneration(wanted, client, *how))
        headers = {"Content-Type": _JSON, request_ids.HEADER: request_ids.current()}
        async with self.household.relay(self.model.source, ANSWER_PATH, headers, body) as answer:
            kind = answer.headers.get("Content-Type", "").partition(";")[0]
            if kind == _JSON and not 200 <= answer.status < 300:
                raise _refusal(answer.status, await _whole(answer.body), answer.headers)
            if kind != LINES:
                raise LinkError(f"its device answered with HTTP {answer.status} {kind[:40]!r}")
            nbytes = 0
            async with aclosing(self._lines(answer)) as lines:
                async for line in lines:
                    nbytes += len(line or b"")
                    if nbytes > MAX_ANSWER_BYTES:
                        raise EngineError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
                    event = _event(line)
                    if event is None:
                        yield AnswerWaits(f"nothing is heard of {self._source().get('name') or self._unnamed}")
                        continue
                    yield event
                    if isinstance(event, AnswerEnds):
                        with contextlib.suppress(LinkError, TimeoutError):  # read to its end the connection is kept
                            async with asyncio.timeout(SILENCE_S):
                                await anext(lines, None)
                        return
        raise LinkError("its device broke it off")

    @property
    def _unnamed(self) -> str:
        return f"the device of {self.model.name}"

    def _source(self) -> Mapping[str, Any]:
        """What is known of the device that answers."""
        devices = self.household.status()["devices"]
        return next((one for one in devices if one["id"] == self.model.source), {})

    async def _lines(self, answer: RelayedAnswer) -> AsyncGenerator[bytes | None]:
        """Whole lines; None after each SILENCE_S in which nothing was heard of the device."""
        held, silences = bytearray(), 0
        async with aclosing(pulsed(answer.body, SILENCE_S)) as pieces:
            async for piece in pieces:
                if piece is None:
                    if self.moved():
                        raise LinkError("another device answers for it now")
                    silences += 1
                    if silences > MAX_SILENCES:
                        raise LinkError(f"its device said nothing for {SILENCE_S * MAX_SILENCES:g} s")
                    if silences > USUAL_SILENCES or self._source().get("state") == "silent":
                        yield None
                    continue
                silences = 0
                looked = len(held)  # in small pieces, too, each byte is looked at once
                held += piece
                if (end := held.rfind(b"\n", looked)) >= 0:
                    whole = bytes(held[:end])
                    del held[: end + 1]
                    for line in whole.split(b"\n"):
                        yield line
                if len(held) > MAX_EVENT_BYTES:
                    raise LinkError("its device sends an event without an end")


def _event(line: bytes | None) -> AnswerEvent | None:
    """None stays None; an error that is told is raised."""
    if line is None:
        return None
    try:
        event = TOLD.decode(line)
    except msgspec.MsgspecError as error:
        raise LinkError(f"its device tells what makes no sense: {error}") from error
    if not isinstance(event, AnswerFails):
        return event
    raise _told_error(ErrorFacts.of(event.error))


def _told_error(facts: ErrorFacts, retry_after: str = "") -> PeerLLMError:
    """The last words of a device that leaves are a LinkError: the answer is sought elsewhere."""
    if facts.code == DeviceLeavingError.code:
        return LinkError("its device does not answer for it any more")
    return RelayedError(facts, retry_after)


def _refusal(status: int, body: bytes, headers: Mapping[str, str]) -> PeerLLMError:
    try:
        error: Any = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except msgspec.MsgspecError:
        error = None
    if not isinstance(error, dict) or not web.HTTPBadRequest.status_code <= status < 600:
        raise LinkError(f"its device answered with HTTP {status} and no reason")
    return _told_error(ErrorFacts.of({**error, "status": status}), headers.get("Retry-After", ""))


async def _whole(body: AsyncIterator[bytes]) -> bytes:
    pieces, size = [], 0
    async for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size > MAX_REFUSAL_BYTES:
            raise LinkError(f"its refusal is larger than {MAX_REFUSAL_BYTES} bytes")
    return b"".join(pieces)
