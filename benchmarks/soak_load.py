"""The fixed load of a soak: clients that ask again as soon as they are answered, most well behaved, some not."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import aiohttp

from tests.clients import PATH, body, stream

QUESTIONS = ("What are you?", "Tell me a story.", "Hello!", "What is 3 plus 4?", "Turn on the light.")
LONGEST = 48  # tokens of an answer
STREAMING, HANGING_UP, WHOLE, BAD, WATCHING = 10, 3, 2, 1, 1  # clients of each kind
PAUSE_S = 0.05  # of a bad client after each refusal, and of a watcher: they cost the household little themselves
BAD_BODIES: tuple[tuple[Any, int], ...] = (
    (b"{", 400),
    (b"[]", 400),
    ({"messages": []}, 400),
    (body("Hello!", 4, model="gpt-9"), 404),
    (body("Hello!", 4, temperature=-1), 400),
    (body("Hello! " * 5000, 4), 400),
)


class Load:
    """`counts` says what was asked and came; an answer that is not the one that was due raises AssertionError."""

    def __init__(self, session: aiohttp.ClientSession, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self._session, self._random = session, random.Random(seed)
        self._right: Mapping[str, list[int]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; every client ends with the answer it is at."""
        alone = {question: await stream(self._session, question, LONGEST) for question in QUESTIONS}
        self._right = {question: heard.ids for question, heard in alone.items()}
        kinds: tuple[tuple[Callable[[], Coroutine[Any, Any, None]], int], ...] = (
            (self._streaming, STREAMING), (self._hanging_up, HANGING_UP), (self._whole, WHOLE), (self._bad, BAD),
            (self._watching, WATCHING),
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for one, count in kinds:
                for _ in range(count):
                    group.create_task(self._again(one, stop))

    async def _again(self, one: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
        while not stop.is_set():
            await one()

    def _draw(self) -> tuple[str, int]:
        return self._random.choice(QUESTIONS), self._random.randint(1, LONGEST)

    async def _streaming(self) -> None:
        question, length = self._draw()
        heard = await stream(self._session, question, length)
        assert heard.done, heard
        assert heard.ids == self._right[question][:length], heard
        self.counts["streamed"] += 1
        self.counts["tokens"] += len(heard.ids)

    async def _hanging_up(self) -> None:
        heard = await stream(self._session, QUESTIONS[1], LONGEST, hang_up_after=self._random.randint(0, 12))
        assert heard.status == 200, heard
        self.counts["hung up"] += 1

    async def _whole(self) -> None:
        question, length = self._draw()
        async with self._session.post(PATH, json=body(question, length)) as response:
            answer = await response.json()
        assert response.status == 200, answer
        assert answer["choices"][0]["token_ids"] == self._right[question][:length], answer
        self.counts["whole"] += 1

    async def _bad(self) -> None:
        bad, status = self._random.choice(BAD_BODIES)
        data = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
        async with self._session.post(PATH, data=data, headers={"Content-Type": "application/json"}) as response:
            assert response.status == status, (bad, response.status, await response.text())
        self.counts["refused"] += 1
        await asyncio.sleep(PAUSE_S)

    async def _watching(self) -> None:
        """A page that is opened and closed."""
        async with self._session.get("/peerllm/v1/events") as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    break
        self.counts["watched"] += 1
        await asyncio.sleep(PAUSE_S)
