"""The answers that can be asked for again: bounded in number, tokens, and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from peerllm.api.core.kept.kept_answer import BegunAnswer, KeptAnswer
from peerllm.errors import BadInputError, OverloadedError, PeerLLMError

KEPT_S = 600.0  # seconds that a finished answer is kept
ALONE_S = 60.0  # seconds that an answer is computed on without anybody who reads it
MAX_KEPT = 256  # answers ...
MAX_KEPT_OF_ASKER = 192  # ... of one device or address, whatever clients it tells of ...
MAX_KEPT_OF_CLIENT = 32  # ... and of one client
MAX_KEPT_TOKENS = 1 << 20  # of all finished answers, as their sizes count them


class ReusedKeyError(BadInputError):
    """The key belongs to an answer to another body."""

    http_status = 422


class NotKeptError(BadInputError):
    """An answer that is not there (any more) cannot be resumed."""

    http_status = 409


class AnswerStore:
    """Owned by the API; `close` ends what is computed."""

    def __init__(self) -> None:
        self._answers: dict[str, KeptAnswer] = {}  # by key, the oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, key: str, fingerprint: bytes) -> KeptAnswer | None:
        """The answer of that key; ReusedKeyError if it answers another body."""
        kept = self._answers.get(key)
        if kept is not None and kept.fingerprint != fingerprint:
            raise ReusedKeyError("this Idempotency-Key was used with another body; take a fresh one")
        return kept

    def begin(
        self,
        key: str,
        fingerprint: bytes,
        client: str,
        begin: Coroutine[Any, Any, BegunAnswer],
        fleeting: bool = False,
    ) -> KeptAnswer:
        """A new answer under a key that is free; OverloadedError if no room can be made for it.

        `fleeting`: it ends with its reader, and takes no room when it is over.
        """
        try:
            if not fleeting:
                self._make_room(client)
        except OverloadedError:
            begin.close()
            raise
        kept = self._answers[key] = KeptAnswer(key, fingerprint, client, fleeting)
        if fleeting:
            self._later(ALONE_S, kept)  # one that was inherited may never find its reader
        task = asyncio.create_task(self._compute(kept, begin), name="api: kept answer")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return kept

    @contextlib.contextmanager
    def reading(self, kept: KeptAnswer) -> Iterator[None]:
        """Around somebody who reads it: without anybody it ends after a while."""
        kept.readers += 1
        try:
            yield
        finally:
            kept.readers -= 1
            if kept.fleeting and not kept.readers:
                self._drop(kept)
            elif not kept.readers and not kept.over:
                self._later(ALONE_S, kept)

    async def _compute(self, kept: KeptAnswer, begin: Coroutine[Any, Any, BegunAnswer]) -> None:
        encoding = asyncio.ensure_future(begin)
        try:
            await kept.compute(encoding)
        except PeerLLMError:
            self._drop(kept)  # its readers hear of it; who asks again gets a new answer
        except BaseException:
            self._drop(kept)
            raise
        else:
            if self._answers.get(kept.key) is kept:
                self._later(KEPT_S, kept)
            self._bound_tokens()
        finally:
            encoding.cancel()

    def _make_room(self, client: str) -> None:
        everyone = [kept for kept in self._answers.values() if not kept.fleeting]
        theirs = [kept for kept in everyone if kept.client.partition("/")[0] == client.partition("/")[0]]
        own = [kept for kept in theirs if kept.client == client]
        shares = (own, MAX_KEPT_OF_CLIENT), (theirs, MAX_KEPT_OF_ASKER), (everyone, MAX_KEPT)
        crowd = next((crowd for crowd, most in shares if len(crowd) >= most), None)
        if crowd is None:
            return
        oldest = next((kept for kept in crowd if kept.over and not kept.readers), None)
        if oldest is None:
            raise OverloadedError("too many answers with an Idempotency-Key are under way; ask again in a moment")
        self._drop(oldest)

    def _bound_tokens(self) -> None:
        finished = [kept for kept in self._answers.values() if kept.over]
        tokens = sum(kept.size for kept in finished)
        for kept in finished[:-1]:
            if tokens <= MAX_KEPT_TOKENS:
                break
            tokens -= kept.size
            self._drop(kept)

    def _later(self, seconds: float, kept: KeptAnswer) -> None:
        if kept.key in self._timers:
            self._timers.pop(kept.key).cancel()
        self._timers[kept.key] = asyncio.get_running_loop().call_later(seconds, self._expire, kept)

    def _expire(self, kept: KeptAnswer) -> None:
        self._timers.pop(kept.key, None)
        if kept.over or not kept.readers:
            self._drop(kept)

    def _drop(self, kept: KeptAnswer) -> None:
        if self._answers.get(kept.key) is not kept:
            return
        del self._answers[kept.key]
        if (timer := self._timers.pop(kept.key, None)) is not None:
            timer.cancel()
        task = self._tasks.get(kept.key)
        if task is not None and not kept.over:
            task.cancel()

    async def close(self) -> None:
        """May be called twice."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._answers.clear()
