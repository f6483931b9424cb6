"""Several answers to one request, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from peerllm.api.core.answer_events import AnswerEvent

MAX_ANSWERS = 16  # to one request
_MAX_READY = 64  # events waiting for a client that reads slowly


async def merged(sources: Sequence[AsyncGenerator[AnswerEvent]]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
    """Their events as they come, each with the place of its source; closing it closes all. The first error ends it."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield 0, event
        return
    ready = asyncio.Queue[tuple[int, AnswerEvent] | Exception | None](_MAX_READY)

    async def feed(index: int, source: AsyncGenerator[AnswerEvent]) -> None:
        try:
            async with aclosing(source) as events:
                async for event in events:
                    await ready.put((index, event))
            await ready.put(None)
        except Exception as error:  # told by whoever reads
            await ready.put(error)

    tasks = [asyncio.create_task(feed(*one), name="api: one of several answers") for one in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            found = await ready.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
