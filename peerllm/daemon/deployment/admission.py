"""The source's sequences of one deployment: admitted when a slot is free, else queued; their tokens handed on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from statistics import fmean

from peerllm.daemon.decide.fair_queue import FairQueue
from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.engine.messages import Cancel, Submit, Tokens
from peerllm.errors import BadInputError, EngineError, PeerLLMError, UnavailableError
from peerllm.types import DeploymentId

PATIENCE_S = 30.0  # how long a queued sequence waits for a deployment that does not serve
CANCEL_CONFIRM_S = 15.0  # after this the slot of a cancelled sequence counts as free even if the engine is silent
MEASURED_ANSWERS = 16  # the last answers that `measured` is the mean of
RETRY_UNKNOWN_S, RETRY_LEAST_S, RETRY_MOST_S = 5.0, 1.0, 60.0  # what one who finds the queue full is told
_numbers = itertools.count(1)


@dataclass(slots=True)
class _Sequence:
    """One generation; `events` holds at most one entry per token and one for the end."""

    number: int
    request: GenerateRequest
    max_tokens: int
    events: asyncio.Queue[Tokens | PeerLLMError | None] = field(default_factory=asyncio.Queue)
    submitted: float = 0.0  # 0: still queued
    place: int = 0  # in the queue, from 1
    first: float = 0.0
    count: int = 0  # tokens so far
    reused: int = 0  # of the prompt's tokens


@dataclass(frozen=True, slots=True)
class ServingCapacity:
    """What a serving deployment offers its sequences."""

    slots: int
    context: int
    vocabulary: int
    stop_ids: tuple[int, ...]


class Admission:
    """`open` when the deployment serves, `interrupt` when it stops serving for now, `close` for good."""

    def __init__(
        self, deployment: DeploymentId, tell: Callable[[Submit | Cancel], None], changed: Callable[[], None]
    ) -> None:
        self._deployment = deployment
        self._tell, self._changed = tell, changed
        self._queue = FairQueue()
        self._all: dict[int, _Sequence] = {}  # queued and running
        self._running: dict[int, str] = {}  # slots and their clients; cancelled ones until the engine confirms
        self._room: ServingCapacity | None = None
        self._closed: PeerLLMError | None = None
        self._reason = "the model is being loaded"
        self._patience: asyncio.TimerHandle | None = None
        self._expired = False
        self._answers: deque[tuple[float, float]] = deque(maxlen=MEASURED_ANSWERS)  # first token ms, step ms
        self._held_s: deque[float] = deque(maxlen=MEASURED_ANSWERS)  # how long those answers held their slots

    @property
    def measured(self) -> dict[str, float]:
        """Means over the last answers; empty before the first."""
        if not self._answers:
            return {}
        result = {"time_to_first_token_ms": fmean(first for first, _ in self._answers)}
        steps = [step for _, step in self._answers if step > 0]
        if steps:
            result |= {"step_ms": fmean(steps), "tokens_per_second": 1000 / fmean(steps)}
        return result

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def retry_after_s(self) -> float:
        """Seconds until those who wait now have slots, if answers take as long as they did of late; bounded."""
        if not self._held_s or self._room is None:
            return RETRY_UNKNOWN_S
        seconds = len(self._queue) * fmean(self._held_s) / self._room.slots
        return min(max(seconds, RETRY_LEAST_S), RETRY_MOST_S)

    def open(self, room: ServingCapacity) -> None:
        """The deployment serves: let in who waits."""
        self._calm()
        self._room, self._expired = room, False
        self._admit()

    def interrupt(self, reason: str) -> None:
        """Running sequences end with an error; queued ones wait on for PATIENCE_S."""
        self._room, self._reason = None, reason
        self._end(self._running.keys() & self._all.keys(), EngineError(reason))
        self._running.clear()
        if self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._expire)

    def close(self, reason: str) -> None:
        """End all sequences with an error, and refuse every later one."""
        self._calm()
        self._room, self._closed = None, UnavailableError(reason)
        self._end(set(self._all), UnavailableError(reason))
        self._running.clear()

    def hear(self, event: Tokens) -> None:
        """New tokens from the engine."""
        if event.finish is not None:
            self._running.pop(event.sequence, None)
        sequence = self._all.get(event.sequence)
        if sequence is not None:
            if event.start != sequence.count:
                text = f"the engine's tokens jump from {sequence.count} to {event.start}"
                self._end({event.sequence}, EngineError(text))
                self._give_up(event.sequence)
            else:
                now = time.monotonic()
                if not sequence.count and event.ids:
                    sequence.first = now
                sequence.count += len(event.ids)
                sequence.reused = max(sequence.reused, event.reused)
                sequence.events.put_nowait(event)
                if event.finish is not None:
                    del self._all[event.sequence]
                    self._note(sequence, now)
        if event.finish is not None:
            self._admit()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Chunks up to the one with `finish`. Closing it early cancels the sequence and frees its slot."""
        sequence = self._accept(request)
        place = -1
        try:
            while True:
                if not sequence.submitted and place != (place := sequence.place) and place:
                    yield Chunk((), queued=place)
                    continue
                event = await sequence.events.get()
                if event is None:
                    continue  # the place in the queue changed, or a slot was given
                if isinstance(event, PeerLLMError):
                    raise event
                ids = list(event.ids)
                while event.finish is None and not sequence.events.empty():
                    later = sequence.events.get_nowait()
                    if isinstance(later, PeerLLMError):
                        sequence.events.put_nowait(later)
                        break
                    if later is not None:
                        ids += later.ids
                        event = later
                if event.finish == "error":
                    if ids:
                        yield Chunk(tuple(ids), reused=sequence.reused)
                    raise EngineError(event.error or "the engine could not go on")
                if ids or event.finish is not None:
                    yield Chunk(tuple(ids), event.finish, reused=sequence.reused)
                if event.finish is not None:
                    return
        finally:
            self._leave(sequence)

    def _accept(self, request: GenerateRequest) -> _Sequence:
        if self._closed is not None:
            raise UnavailableError(str(self._closed))
        if self._room is None and self._expired:
            raise UnavailableError(self._reason)
        if not request.prompt or request.max_tokens < 1:
            raise BadInputError("the prompt is empty" if not request.prompt else "max_tokens must be at least 1")
        if self._room is not None:
            self._check(request, self._room)
        elif self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._expire)
        sequence = _Sequence(next(_numbers), request, request.max_tokens)
        self._queue.add(sequence.number, request.client, self.retry_after_s)
        self._all[sequence.number] = sequence
        self._admit()
        return sequence

    @staticmethod
    def _check(request: GenerateRequest, room: ServingCapacity) -> None:
        if len(request.prompt) >= room.context:
            count = len(request.prompt)
            raise BadInputError(f"the prompt has {count} tokens, it and its answer must fit {room.context}; shorten it")
        if not 0 <= min(request.prompt) <= max(request.prompt) < room.vocabulary:
            raise BadInputError(f"the prompt holds a token id outside 0..{room.vocabulary - 1}")

    def _admit(self) -> None:
        """Give free slots to who is next."""
        while self._room is not None and len(self._running) < self._room.slots:
            number = self._queue.next(Counter(self._running.values()))
            if number is None:
                break
            sequence, request = self._all[number], self._all[number].request
            try:
                self._check(request, self._room)
            except BadInputError as error:  # it was queued before the context was known
                self._end({number}, error)
                continue
            sequence.submitted = time.monotonic()
            self._running[number] = request.client
            fits = min(sequence.max_tokens, self._room.context - len(request.prompt))
            stop_ids = () if request.ignore_stop else self._room.stop_ids
            self._tell(
                Submit(
                    self._deployment, number, tuple(request.prompt), fits, stop_ids, request.sampling, request.client
                )
            )
            sequence.events.put_nowait(None)
        self._number()

    def _number(self) -> None:
        """Tell waiting sequences their new place in the queue."""
        for place, number in enumerate(self._queue.order(Counter(self._running.values())), 1):
            sequence = self._all[number]
            if sequence.place != place:
                sequence.place = place
                if sequence.events.empty():
                    sequence.events.put_nowait(None)

    def _leave(self, sequence: _Sequence) -> None:
        """The client is gone or has all of its answer."""
        if self._all.pop(sequence.number, None) is None:
            return
        if sequence.number in self._running:
            self._give_up(sequence.number)
        elif not sequence.submitted:
            self._queue.remove(sequence.number)
            self._number()

    def _give_up(self, number: int) -> None:
        """Cancel on the engine; the slot is free when it says so, or after a bounded silence."""
        if number in self._running:
            self._tell(Cancel(self._deployment, number))
            asyncio.get_running_loop().call_later(CANCEL_CONFIRM_S, self._free, number)

    def _free(self, number: int) -> None:
        if number in self._running:
            del self._running[number]
            self._admit()

    def _end(self, numbers: set[int], error: PeerLLMError) -> None:
        for number in numbers:
            self._queue.remove(number)
            self._all.pop(number).events.put_nowait(error)

    def _note(self, sequence: _Sequence, now: float) -> None:
        if sequence.count and sequence.submitted:
            step = 1000 * (now - sequence.first) / (sequence.count - 1) if sequence.count > 1 else 0.0
            self._answers.append((1000 * (sequence.first - sequence.submitted), step))
            self._held_s.append(now - sequence.submitted)
            self._changed()

    def _expire(self) -> None:
        self._patience, self._expired = None, True
        self._end(set(self._all), UnavailableError(self._reason))

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
