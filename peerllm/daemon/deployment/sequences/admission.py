"""The source's sequences of one deployment: admitted when a slot is free, else queued; their tokens handed on.

No sequence ends because devices come and go. Its prompt and the ids of its answer are kept, and it waits, or the engine
gets it again and goes on behind the ids that are known.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from peerllm.daemon.decide.fair_queue import FairQueue
from peerllm.daemon.deployment.sequences.admitted_sequence import AdmittedSequence, ServingCapacity
from peerllm.daemon.deployment.sequences.answer_times import AnswerTimes
from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.engine.messages import Cancel, Submit, Tokens
from peerllm.errors import BadInputError, EngineError, PeerLLMError, UnavailableError
from peerllm.types import DeploymentId

PATIENCE_S = 30.0  # how long a queued sequence waits for a deployment that does not serve
RUNNING_PATIENCE_S = 600.0  # the same of a sequence that was running
STALL_S, STALL_STEPS = 30.0, 20.0  # without a token for so long, and for so many usual steps, an answer is stalled
MAX_STALLS = 3  # of one answer without a token between them, before it ends with an error
CANCEL_CONFIRM_S = 15.0  # after this the slot of a cancelled sequence counts as free even if the engine is silent
# Stages keep what they computed for a sequence's number: one of an earlier start of this daemon must not come again.
_numbers = itertools.count(secrets.randbits(48))


class Admission:
    """`open` when the deployment serves, `hold` while it does not go on, `close` when it is over."""

    def __init__(
        self,
        deployment: DeploymentId,
        tell: Callable[[Submit | Cancel], None],
        changed: Callable[[], None],
        begins: Callable[[AdmittedSequence], None] = lambda _: None,
    ) -> None:
        self._deployment = deployment
        self._tell, self._changed, self._begins = tell, changed, begins
        self._queue = FairQueue()
        self._all: dict[int, AdmittedSequence] = {}  # queued, running and to be resumed
        self._running: dict[int, str] = {}  # slots and their clients; cancelled ones until the engine confirms
        self._resumed: deque[int] = deque()  # they ran, and the engine does not have them any more
        self._room: ServingCapacity | None = None
        self._closed: PeerLLMError | None = None
        self._reason = "the model is being loaded"
        self._held_since: float | None = None  # that it does not serve; None: it serves, or nobody has waited yet
        self._patience: asyncio.TimerHandle | None = None
        self._times = AnswerTimes()

    @property
    def measured(self) -> dict[str, float]:
        """Means over the last answers; empty before the first."""
        return self._times.means

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._all)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def retry_after_s(self) -> float:
        """Seconds until those who wait now have slots, if answers take as long as they did of late; bounded."""
        return self._times.retry_after_s(len(self._queue), self._room.slots if self._room is not None else 0)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """How many tokens each answer under way has, its prompt counted."""
        return tuple(len(s.request.prompt) + len(s.answer) for s in self._all.values() if s.submitted)

    def open(self, room: ServingCapacity) -> None:
        """The deployment serves: let in who waits, those first that were running."""
        self._room, self._held_since = room, None
        for sequence in self._all.values():
            sequence.until, sequence.heard = None, max(sequence.heard, time.monotonic())
        self._admit()

    def stalled(self) -> bool:
        """Whether an answer that had begun gets no tokens though the deployment serves; told once for each STALL_S.

        One that has been stalled MAX_STALLS times ends with an error.
        """
        if self._room is None:
            return False
        now, limit_s = time.monotonic(), max(STALL_S, STALL_STEPS * self.measured.get("step_ms", 0.0) / 1000)
        begun = [self._all[one] for one in self._running.keys() & self._all.keys() if self._all[one].answer]
        silent = [sequence for sequence in begun if now - sequence.heard > limit_s]
        for sequence in silent:
            sequence.heard, sequence.stalls = now, sequence.stalls + 1
        given_up = {sequence.number for sequence in silent if sequence.stalls > MAX_STALLS}
        for number in given_up:
            self._give_up(number)
        self._end(given_up, EngineError("the devices of this model give no more tokens of this answer; ask again"))
        return len(silent) > len(given_up)

    def hold(self, reason: str) -> None:
        """The deployment does not go on for now: running sequences wait RUNNING_PATIENCE_S, queued ones PATIENCE_S."""
        self._reason = reason
        if self._room is not None or self._held_since is None:
            self._room, self._held_since = None, time.monotonic()
            for sequence in self._all.values():
                self._bound(sequence)
        self._wake()

    def engine_lost(self) -> None:
        """The engine died: every sequence that it had is given to the next engine, behind the ids that are known."""
        self._resume(sorted(self._running.keys() & self._all.keys(), key=lambda one: self._all[one].submitted))
        self._running.clear()

    def suspend(self) -> None:
        """End the running sequences in the engine; `open`, which follows, gives them to it anew as slots are free."""
        self._room = None
        for number in sorted(self._running.keys() & self._all.keys(), key=lambda one: self._all[one].submitted):
            sequence = self._all.pop(number)
            self._give_up(number)
            sequence.number = next(_numbers)  # what the engine still says of the old one is nobody's
            self._all[sequence.number] = sequence
            self._resumed.append(sequence.number)

    def close(self, reason: str) -> None:
        """End all sequences with an error, and refuse every later one."""
        self.refuse(reason)
        self._room = None
        self._end(set(self._all), UnavailableError(reason))
        self._running.clear()
        self._wake()

    def refuse(self, reason: str) -> None:
        """Refuse every later sequence; those that are here go on."""
        self._closed = UnavailableError(reason)

    def accept(self) -> None:
        """Refuse no longer."""
        self._closed = None

    def hear(self, event: Tokens) -> None:
        """New tokens from the engine. What repeats known ones is ignored."""
        if event.finish is not None:
            self._running.pop(event.sequence, None)
        sequence = self._all.get(event.sequence)
        if sequence is not None:
            self._take(sequence, event)
        if event.finish is not None:
            self._admit()

    def _take(self, sequence: AdmittedSequence, event: Tokens) -> None:
        known = len(sequence.answer)
        if event.start > known:
            self._end({event.sequence}, EngineError(f"the engine's tokens jump from {known} to {event.start}"))
            self._give_up(event.sequence)
            return
        fresh = known - event.start
        now, ids, logprobs = time.monotonic(), event.ids[fresh:], event.logprobs[fresh:]
        if not sequence.first and ids:
            sequence.first = now
        if ids:
            sequence.heard, sequence.stalls = now, 0
        sequence.answer += ids
        sequence.reused = max(sequence.reused, event.reused)
        lost = event.finish == "error" and self._room is None  # it comes of what the deployment waits for
        if ids or (event.finish is not None and not lost):
            finish = None if lost else event.finish
            what = ids, finish, event.error, event.reused, event.vector, logprobs
            sequence.events.put_nowait(Tokens(self._deployment, sequence.number, known, *what))
        if lost:
            self._resume([sequence.number])
        elif event.finish is not None:
            del self._all[sequence.number]
            self._note(sequence, now)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """Chunks up to the one with `finish`. Closing it early cancels the sequence and frees its slot."""
        sequence = self._accept(request)
        try:
            async with aclosing(sequence.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._leave(sequence)
            self._changed()

    def _accept(self, request: GenerateRequest) -> AdmittedSequence:
        if self._closed is not None:
            raise UnavailableError(str(self._closed))
        if not request.prompt or request.max_tokens < 1:
            raise BadInputError("the prompt is empty" if not request.prompt else "max_tokens must be at least 1")
        now = time.monotonic()
        if self._room is not None:
            self._room.check(request)
        elif self._held_since is None:
            self._held_since = now
        elif request.patience_s is None and now >= self._held_since + PATIENCE_S:  # others waited in vain
            raise UnavailableError(self._reason)
        sequence = AdmittedSequence(next(_numbers), request, request.max_tokens, answer=list(request.answer))
        self._queue.add(sequence.number, request.client, self.retry_after_s)
        self._all[sequence.number] = sequence
        if self._room is None:
            self._bound(sequence)
            self._wake()
        self._admit()
        return sequence

    def _admit(self) -> None:
        """Give free slots to who is next; those come first that had one before."""
        while self._room is not None and len(self._running) < self._room.slots:
            if self._resumed:
                number: int | None = self._resumed.popleft()
            else:
                number = self._queue.next(Counter(self._running.values()))
            if number is None:
                break
            self._submit(self._all[number], self._room)
        self._number()

    def _submit(self, sequence: AdmittedSequence, room: ServingCapacity) -> None:
        request, known = sequence.request, tuple(sequence.answer)
        try:
            room.check(request)
        except BadInputError as error:  # the context was not known, or was larger
            self._end({sequence.number}, error)
            return
        fits = min(sequence.max_tokens, room.context - len(request.prompt))
        if len(known) >= fits:  # what fits the new context is there already
            sequence.events.put_nowait(Tokens(self._deployment, sequence.number, len(known), (), "length"))
            del self._all[sequence.number]
            return
        sequence.submitted = sequence.submitted or time.monotonic()
        self._running[sequence.number] = request.client
        stop_ids = () if request.ignore_stop else room.stop_ids
        prompt, client = tuple(request.prompt), request.client
        how = (stop_ids, request.sampling, client, known, request.constraint, request.pool, request.logprobs)
        self._tell(Submit(self._deployment, sequence.number, prompt, fits, *how))
        sequence.events.put_nowait(None)
        self._begins(sequence)

    def _resume(self, numbers: list[int]) -> None:
        """They ran, and are to be given to the engine again, in the order in which they began."""
        self._resumed.extend(number for number in numbers if number not in self._resumed)

    def _number(self) -> None:
        """Tell waiting sequences their new place in the queue."""
        for place, number in enumerate(self._queue.order(Counter(self._running.values())), 1):
            sequence = self._all[number]
            if sequence.place != place:
                sequence.place = place
                if sequence.events.empty():
                    sequence.events.put_nowait(None)

    def _leave(self, sequence: AdmittedSequence) -> None:
        """The client is gone or has all of its answer."""
        if self._all.pop(sequence.number, None) is None:
            return
        if sequence.number in self._running:
            self._give_up(sequence.number)
        elif sequence.submitted:
            self._resumed.remove(sequence.number)
        else:
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
            if number in self._resumed:
                self._resumed.remove(number)
            self._all.pop(number).events.put_nowait(error)

    def _note(self, sequence: AdmittedSequence, now: float) -> None:
        count = len(sequence.answer) - len(sequence.request.answer)
        if count and sequence.first and sequence.submitted:
            self._times.note(sequence.submitted, sequence.first, now, count)
            self._changed()

    # ---- how long sequences wait for a deployment that does not serve ------------------------------------------------

    def _bound(self, sequence: AdmittedSequence) -> None:
        asked = sequence.request.patience_s
        patience_s = RUNNING_PATIENCE_S if sequence.submitted else PATIENCE_S if asked is None else asked
        sequence.until = time.monotonic() + patience_s

    def _wake(self) -> None:
        """End whoever has waited long enough; come back when the next has."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._room is not None:
            return
        now = time.monotonic()
        tired = {number for number, one in self._all.items() if one.until is not None and one.until <= now}
        for number in tired & self._running.keys():
            self._give_up(number)
        self._end(tired, UnavailableError(self._reason))
        due = min((one.until for one in self._all.values() if one.until is not None), default=None)
        if due is not None:
            self._patience = asyncio.get_running_loop().call_later(max(0.0, due - now), self._wake)
