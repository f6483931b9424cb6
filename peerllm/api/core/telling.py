"""An answer to a client of any API: asked for in the shared form, told in that API's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson
from aiohttp import web

from peerllm.api.bodies import most_bytes
from peerllm.api.core.answer_events import (
    AnswerBegins,
    AnswerEnds,
    AnswerEvent,
    AnswerWaits,
    TextDelta,
    ToolCallBegins,
    ToolCallDelta,
)
from peerllm.api.core.asking import answer
from peerllm.api.core.caller import caller_of
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.repeat import DeviceLeavingError, Repeat, repeat_of
from peerllm.api.core.several_answers import merged
from peerllm.api.error_answers import FieldError, facts_of, failing_as, json_response, shape_of
from peerllm.api.keys import TASKS
from peerllm.api.streams import Failing, Stream
from peerllm.api.text.calls.answer_parts import ToldToken
from peerllm.errors import EngineError

MAX_WHOLE_CHARS = 64 << 20  # of answers in one piece
_TOLD_CHARS = 64  # of a token and its log probability, about
_EVENT_CHARS = 16  # that an event takes beside its text, about

Piece = tuple[object, str | None]  # one event's object (bytes: as they are), and its id


@dataclass(slots=True)
class WholeCall:
    """A call of a tool, with all of its arguments."""

    id: str
    name: str
    arguments: str = ""

    def given(self) -> dict[str, Any] | None:
        """The arguments as an object; None where they are none, as when the answer was cut."""
        try:
            found = orjson.loads(self.arguments or "{}")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def as_text(self) -> str:
        """What is told of one that was cut, where only objects can be arguments."""
        return f"{self.name}({self.arguments}"


@dataclass(slots=True)
class WholeAnswer:
    """All of one answer."""

    begins: AnswerBegins
    ends: AnswerEnds
    thought: str
    text: str
    calls: list[WholeCall]
    ids: list[int]
    logprobs: list[ToldToken]
    thought_tokens: int


class ToldForm(Protocol):
    """How one API tells the answers to one request; `choice` counts them from 0."""

    content_type: str  # of the stream
    named: bool  # as in Stream

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        """All of them in one piece."""
        ...

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        """What the stream tells of an event. `repeat`: the client's own, if it sent a key."""
        ...

    def closing(self) -> Iterator[Piece]:
        """The last words of the stream, after all answers."""
        ...


def taking(request: web.Request) -> AbstractContextManager[None]:
    """Around reading a request and answering it: OverloadedError where that is too much."""
    return request.app[TASKS].stream(caller_of(request).asker, most_bytes(request))


async def tell(
    request: web.Request, wanted: Sequence[Generation], form: ToldForm, stream: bool, failing: Failing | None = None
) -> web.StreamResponse:
    """Within `taking`. Errors before the first sign of life have their own status; after it they end the stream.

    `failing`: what it ends with then, if not with the shape that errors of this route have.
    """
    repeats = [repeat_of(request, one) for one in wanted]
    if len(wanted) > 1:
        for index, repeat in enumerate(repeats):
            if repeat is not None and repeat.had is not None:
                raise FieldError("Last-Event-ID: a stream of several answers cannot be resumed", "Last-Event-ID")
            if repeat is not None:
                repeat.key = f"{repeat.key}#{index}"
    caller = caller_of(request)
    told = Stream(request, form.content_type, failing or failing_as(shape_of(request)), form.named) if stream else None
    asked = [
        answer(request.app, one, caller, replace(repeat) if repeat is not None else None)
        for one, repeat in zip(wanted, repeats, strict=True)
    ]
    async with aclosing(merged(asked)) as events:
        if told is None:
            return json_response(form.whole(await _collected(events, len(wanted))))
        async with ending_well(request.app, told):
            begun = set[int]()
            async for choice, event in events:
                if isinstance(event, AnswerBegins):
                    if choice in begun:  # it goes on on another device
                        continue
                    begun.add(choice)
                for body, event_id in form.pieces(choice, event, repeats[choice]):
                    await told.send(body, event_id)
            for body, event_id in form.closing():
                await told.send(body, event_id)
    return await told.end()


@contextlib.asynccontextmanager
async def ending_well(app: web.Application, stream: Stream) -> AsyncGenerator[None]:
    """Around a stream: one that the closing of the API cuts off says so."""
    try:
        yield
    except asyncio.CancelledError:
        if stream.started and app[TASKS].closing:
            await stream.fail(facts_of(DeviceLeavingError("the answer broke off: this device is shutting down")))
        raise


async def _collected(events: AsyncGenerator[tuple[int, AnswerEvent]], count: int) -> list[WholeAnswer]:
    begins, ends = dict[int, AnswerBegins](), dict[int, AnswerEnds]()
    texts: list[list[str]] = [[] for _ in range(count)]
    thoughts: list[list[str]] = [[] for _ in range(count)]
    calls: list[list[WholeCall]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    thinking = [0] * count  # tokens
    logprobs: list[list[ToldToken]] = [[] for _ in range(count)]
    size = 0
    async for choice, event in events:
        size += _EVENT_CHARS
        match event:
            case AnswerBegins():
                begins.setdefault(choice, event)
            case TextDelta():
                (thoughts if event.thought else texts)[choice].append(event.text)
                thinking[choice] += len(event.ids) if event.thought else 0
                ids[choice] += event.ids
                logprobs[choice] += event.logprobs
                size += (
                    len(event.text)
                    + len(event.ids)
                    + sum(_TOLD_CHARS * (1 + len(one.likeliest)) for one in event.logprobs)
                )
            case ToolCallBegins():
                calls[choice].append(WholeCall(event.id, event.name))
                ids[choice] += event.ids
                size += len(event.id) + len(event.name) + len(event.ids)
            case ToolCallDelta():
                if not 0 <= event.index < len(calls[choice]):
                    raise EngineError("the answer has arguments of a call that never began; ask again")
                calls[choice][event.index].arguments += event.arguments
                ids[choice] += event.ids
                size += len(event.arguments) + len(event.ids)
            case AnswerEnds():
                ends[choice] = event
                ids[choice] += event.ids
            case AnswerWaits():
                pass
        if size > MAX_WHOLE_CHARS:
            raise EngineError(f"the answer has more than {MAX_WHOLE_CHARS} characters")
    parts = zip(thoughts, texts, strict=True)
    whole = [("".join(thought), "".join(text)) for thought, text in parts]
    return [
        WholeAnswer(begins[one], ends[one], *whole[one], calls[one], ids[one], logprobs[one], thinking[one])
        for one in range(count)
    ]
