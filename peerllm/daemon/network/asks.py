"""Questions and their answers over control links: numbered, bounded, failed at once when the device vanishes.

A question to a silent device waits on; if the device is reached over another connection then, the question fails.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

from peerllm.daemon.control_messages import Answer, Ask, Question
from peerllm.errors import LinkError, OverloadedError, PeerLLMError, UnavailableError, error_class
from peerllm.types import DeviceId

MAX_PENDING = 1024  # questions this device waits for
MAX_ANSWERING = 64  # questions of one device being answered
MAX_REASON_CHARS = 1000

Handler = Callable[[DeviceId, Question], Awaitable[Answer]]
Send = Callable[[DeviceId, Ask | Answer], None]  # LinkError if the device is away

log = logging.getLogger(__name__)


def named_error(answer: Answer) -> PeerLLMError:
    """The error that an answer names, with its `free_bytes`; a plain PeerLLMError if its class is unknown here."""
    error = error_class(answer.error)(answer.reason or answer.error)
    error.free_bytes = answer.free_bytes  # type: ignore[attr-defined]
    return error


class Asks:
    """Numbers this device's questions, matches the answers to them, and answers what others ask."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[DeviceId, asyncio.Future[Answer]]] = {}
        self._handler: Handler | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._load: Counter[DeviceId] = Counter()

    def answer_with(self, handler: Handler) -> None:
        self._handler = handler

    async def ask(self, device: DeviceId, question: Question, timeout_s: float) -> Answer:
        """The answer. Raises the error it names; LinkError if the device is away, vanishes or stays silent too long."""
        if len(self._waiting) >= MAX_PENDING:
            raise OverloadedError(f"{MAX_PENDING} questions to other devices are open; try again later")
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (device, future)
        try:
            self._send(device, Ask(number, question))
            async with asyncio.timeout(timeout_s):
                answer = await future
        except TimeoutError as error:
            kind = type(question).__name__
            raise LinkError(f"{device[:8]} did not answer {kind} within {timeout_s:g} s") from error
        finally:
            del self._waiting[number]
        if answer.error:
            raise named_error(answer)
        return answer

    def answered(self, device: DeviceId, answer: Answer) -> None:
        """Take an answer; one that nobody waits for, or of another device, is dropped."""
        asked, future = self._waiting.get(answer.number, ("", None))
        if future is None or asked != device:
            log.info("%s answered question %d, which is not open", device[:8], answer.number)
        elif not future.done():
            future.set_result(answer)

    def vanished(self, device: DeviceId, reason: str) -> None:
        """Fail what the device has not answered."""
        for asked, future in self._waiting.values():
            if asked == device and not future.done():
                future.set_exception(LinkError(f"{device[:8]} went away before it answered: {reason}"))

    def asked(self, device: DeviceId, ask: Ask) -> None:
        """Answer a question of another device, in a task of its own."""
        if self._load[device] >= MAX_ANSWERING:
            reason = f"{MAX_ANSWERING} questions of this device are being answered"
            self._reply(device, Answer(ask.number, "OverloadedError", reason))
            return
        self._load[device] += 1
        task = asyncio.create_task(self._answer(device, ask), name=f"answer-{device[:8]}-{ask.number}")
        self._answering.add(task)
        task.add_done_callback(lambda done: self._answered_task(device, done))

    async def close(self) -> None:
        """Cancel what is being answered and fail what is waited for."""
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkError("this device is going down"))

    def _answered_task(self, device: DeviceId, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._load[device] -= 1
        if self._load[device] <= 0:
            del self._load[device]

    async def _answer(self, device: DeviceId, ask: Ask) -> None:
        try:
            if self._handler is None:
                raise UnavailableError("this device answers no questions yet")
            answer = await self._handler(device, ask.body)
            reply = replace(answer, number=ask.number, reason=answer.reason[:MAX_REASON_CHARS])
        except PeerLLMError as error:
            free = getattr(error, "free_bytes", 0)
            reply = Answer(ask.number, type(error).__name__, str(error)[:MAX_REASON_CHARS], int(free))
        except Exception as error:
            log.exception("answering %s of %s failed", type(ask.body).__name__, device[:8])
            reply = Answer(ask.number, "PeerLLMError", f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS])
        self._reply(device, reply)

    def _reply(self, device: DeviceId, answer: Answer) -> None:
        try:
            self._send(device, answer)
        except LinkError as error:
            log.info("the answer %d cannot be sent: %s", answer.number, error)
