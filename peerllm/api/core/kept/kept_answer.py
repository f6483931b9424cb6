"""One answer that was asked for with an Idempotency-Key: computed once, read by whoever shows the key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from peerllm.api.core.answer_events import AnswerBegins
from peerllm.api.core.generation import CallsWanted
from peerllm.api.core.growing_answer import GrowingAnswer
from peerllm.api.text.stops import StopScanner
from peerllm.api.text.text_store import AnswerText
from peerllm.api.text.tokens.token_bytes import TokenBytes
from peerllm.api.text.tokens.token_places import TokenPlaces
from peerllm.daemon.facade import Chunk
from peerllm.engine.messages import FinishReason
from peerllm.errors import EngineError, UnavailableError
from peerllm.logprobs import named_ids


@dataclass(frozen=True, slots=True)
class BegunAnswer:
    """An answer whose prompt is encoded: what its tokens come from, and what turns them into text."""

    chunks: AsyncIterator[Chunk]
    begins: AnswerBegins
    text: AnswerText
    silent: frozenset[int]  # ids without text
    stops: Sequence[str]
    prompt: Sequence[int]
    calls: CallsWanted
    chat: bool = False  # the prompt is no mere text: the model may think first, and call tools
    logprobs: bool = False  # what is said is told with its tokens
    tells_ids: bool = False  # the end tells the ids of prompt and answer

    def growing(self) -> GrowingAnswer:
        """The answer from its first token on."""
        schemas = {tool.name: tool.parameters for tool in self.calls.tools}
        detokenizer = self.text.detokenizer(self.silent, self.chat, bool(schemas))
        chat = self.prompt if self.chat else None
        reader = self.text.reader(chat, schemas, not self.calls.parallel, self.calls.keep != "")
        places = TokenPlaces(TokenBytes(self.text.decoder)) if self.logprobs else None
        return GrowingAnswer(detokenizer, StopScanner(self.stops), reader, places)

    def all_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Of the prompt and the answer, up to where the model ended it; none where they are not told."""
        if not self.tells_ids:
            return ()
        end = len(ids)
        while end and ids[end - 1] in self.silent:
            end -= 1
        return (*self.prompt, *ids[:end])


@dataclass(slots=True)
class KeptAnswer:
    """`fingerprint` is of the body that asked for it, `client` who is charged for it; `fleeting` as in Repeat."""

    key: str
    fingerprint: bytes
    client: str
    fleeting: bool = False
    begun: BegunAnswer | None = None  # None: the prompt is being encoded
    ids: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)  # of each, where they are asked for
    finish: FinishReason | None = None
    error: BaseException | None = None
    reused: int = 0  # tokens of the prompt that were computed for an earlier one
    queued: int = 0
    readers: int = 0
    _changes: int = 0
    _change: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def size(self) -> int:
        """Of its ids, and of those that its log probabilities name."""
        return len(self.ids) * (1 + named_ids(self.logprobs))

    async def compute(self, begin: asyncio.Future[BegunAnswer]) -> None:
        """Fill it up to its end, or to where nothing of use comes behind it."""
        try:
            self.begun = await begin
            self._changed()
            answer = self.begun.growing()
            async with aclosing(cast("AsyncGenerator[Chunk]", self.begun.chunks)) as chunks:
                async for chunk in chunks:
                    self.queued, self.reused = chunk.queued, max(self.reused, chunk.reused)
                    self.ids += chunk.ids
                    self.logprobs += chunk.logprobs
                    answer.feed(chunk.ids, chunk.finish)
                    self.finish = chunk.finish or ("stop" if answer.stopped else None)
                    self._changed()
                    if self.finish is not None:
                        return
            raise EngineError("the answer broke off without a reason; ask again")
        except asyncio.CancelledError:
            self.error = UnavailableError("the answer broke off: this device is shutting down")
            raise
        except BaseException as error:
            self.error, self.finish = error, None
            raise
        finally:
            self._changed()

    async def started(self) -> BegunAnswer:
        """What turns its tokens into text; raises why there is none."""
        while self.begun is None:
            if self.error is not None:
                raise self.error
            await self._next(self._changes)
        return self.begun

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """All tokens from the first on, then those that come; as facade.Household.generate gives them."""
        told, queued = 0, 0
        while True:
            # As it is now: what comes while the reader deals with a chunk is the next chunk's, its end above all.
            seen, fresh, finish, error = self._changes, tuple(self.ids[told:]), self.finish, self.error
            logprobs = tuple(self.logprobs[told:])
            told += len(fresh)
            if fresh or finish is not None:
                yield Chunk(fresh, finish, reused=self.reused, logprobs=logprobs)
            elif self.queued != queued:
                queued = self.queued
                yield Chunk((), queued=queued)
            if finish is not None:
                return
            if error is not None:
                raise error
            await self._next(seen)

    def _changed(self) -> None:
        self._changes += 1
        self._change.set()
        self._change = asyncio.Event()

    async def _next(self, seen: int) -> None:
        """Returns when something has changed since `seen`."""
        if self._changes == seen:
            await self._change.wait()
