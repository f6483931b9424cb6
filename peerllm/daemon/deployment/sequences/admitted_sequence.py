"""One generation on the source, from when it is accepted until its answer is complete or given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from peerllm import request_ids
from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.engine.messages import Tokens
from peerllm.errors import BadInputError, EngineError, PeerLLMError


@dataclass(frozen=True, slots=True)
class ServingCapacity:
    """What a serving deployment offers its sequences."""

    slots: int
    context: int
    vocabulary: int
    stop_ids: tuple[int, ...]

    def check(self, request: GenerateRequest) -> None:
        """BadInputError if the prompt does not fit, or is not one of this model."""
        count = len(request.prompt)
        if count >= self.context:
            raise BadInputError(f"the prompt has {count} tokens, it and its answer must fit {self.context}; shorten it")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.vocabulary:
            raise BadInputError(f"the prompt holds a token id outside 0..{self.vocabulary - 1}")


@dataclass(slots=True)
class AdmittedSequence:
    """`events` holds at most one entry per token and one for the end; None wakes who waits for another reason."""

    number: int
    request: GenerateRequest
    max_tokens: int
    events: asyncio.Queue[Tokens | PeerLLMError | None] = field(default_factory=asyncio.Queue)
    submitted: float = 0.0  # 0: still queued
    place: int = 0  # in the queue, from 1
    first: float = 0.0
    answer: list[int] = field(default_factory=list)  # ids so far
    reused: int = 0  # of the prompt's tokens
    until: float | None = None  # when it has waited long enough; None: the deployment serves
    heard: float = 0.0  # when its last token came, or it was noted as stalled
    stalls: int = 0  # since its last token
    cause: str = field(default_factory=request_ids.current)  # the request's id

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """Its places in the queue, then its tokens up to the chunk with `finish`; raises what ends it otherwise."""
        told = 0
        while True:
            if not self.submitted and self.place != told:
                told = self.place
                yield Chunk((), queued=told)
                continue
            event = await self.events.get()
            if event is None:  # the place in the queue changed, or a slot was given
                if told and self.submitted and self.events.empty():
                    told = 0
                    yield Chunk((), queued=0)
                continue
            if isinstance(event, PeerLLMError):
                raise event
            ids, logprobs = list(event.ids), list(event.logprobs)
            while event.finish is None and not self.events.empty():
                later = self.events.get_nowait()
                if isinstance(later, PeerLLMError):
                    self.events.put_nowait(later)
                    break
                if later is not None:
                    ids += later.ids
                    logprobs += later.logprobs
                    event = later
            if event.finish == "error":
                if ids:
                    yield Chunk(tuple(ids), reused=self.reused, logprobs=tuple(logprobs))
                raise EngineError(event.error or "the engine could not go on")
            if ids or event.finish is not None:
                more = event.vector, tuple(logprobs)
                yield Chunk(tuple(ids), event.finish, 0, self.reused, *more)
            if event.finish is not None:
                return
