"""Answers that come in pieces: an iterator with a pulse, and the two framings (SSE, lines of JSON)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar, cast

import orjson
from aiohttp import web

T = TypeVar("T")
Failing = Callable[[Any], Iterable[object]]  # of an error's facts the last words of a stream
SSE = "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"
KEEP_ALIVE_S = 5.0  # seconds of silence after which a comment keeps the connection alive
WRITE_TIMEOUT_S = 30.0  # seconds a client may leave its receive buffer full before it counts as gone


async def pulsed(source: AsyncIterator[T], interval_s: float) -> AsyncGenerator[T | None]:
    """The items of `source`, and None after every `interval_s` of silence; closing it closes `source` at once."""
    step: asyncio.Task[T] | None = None
    try:
        while True:
            if step is None:
                step = asyncio.create_task(_next(source), name="api: next item")
            done, _ = await asyncio.wait({step}, timeout=interval_s)
            if not done:
                yield None
                continue
            finished, step = step, None
            try:
                item = finished.result()
            except _EndError:
                return
            yield item
    finally:
        if step is not None:
            step.cancel()
            await asyncio.wait({step})
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


def comment(text: str) -> bytes:
    """An SSE comment of one line."""
    return f": {' '.join(text.split())}\n\n".encode()


async def each(source: AsyncIterator[None]) -> AsyncGenerator[bool]:
    """True for every event of `source`, so that `pulsed` can tell one from silence."""
    async with aclosing(cast("AsyncGenerator[None]", source)) as events:
        async for _ in events:
            yield True


async def _next(source: AsyncIterator[T]) -> T:
    try:
        return await anext(source)
    except StopAsyncIteration as end:
        raise _EndError from end


class _EndError(Exception):
    """A task cannot raise StopAsyncIteration cleanly through a generator."""


class Stream:
    """One streamed answer; writing raises ConnectionError when the client is gone or stopped reading.

    `named`: SSE events carry the name that is their "type".
    """

    def __init__(self, request: web.Request, content_type: str, failing: Failing, named: bool = False) -> None:
        self._request = request
        self._sse, self._named, self._failing = content_type == SSE, named, failing
        request[STREAM] = self  # so that an error is told in the framing that was begun
        self._response = web.StreamResponse(
            headers={"Content-Type": content_type, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )

    @property
    def started(self) -> bool:
        return self._response.prepared

    async def send(self, body: Any, event_id: str | None = None) -> None:
        """One SSE event of JSON, with its id if it has one, or one line of JSON; bytes go as they are."""
        if isinstance(body, bytes):
            return await self.write(body)
        data, head = orjson.dumps(body), f"id: {event_id}\n".encode() if event_id is not None else b""
        if self._named:
            head += f"event: {body['type']}\n".encode()
        await self.write(head + b"data: " + data + b"\n\n" if self._sse else data + b"\n")

    async def comment(self, text: str) -> None:
        """An SSE comment: clients skip it, connections live on."""
        await self.write(comment(text))

    async def write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                if not self._response.prepared:
                    await self._response.prepare(self._request)
                await self._response.write(data)
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client stopped reading") from error

    async def end(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response

    async def fail(self, facts: Any) -> None:
        """End it with an error, if the client is still there."""
        with contextlib.suppress(ConnectionError):
            for body in self._failing(facts):
                await self.send(body)
            await self.end()

    @property
    def response(self) -> web.StreamResponse:
        """What was begun, for a handler whose client is gone."""
        return self._response


STREAM: web.RequestKey[Stream] = web.RequestKey("stream", Stream)  # the answer that a request has begun
