"""Copies of answers under way on the device that would go on with them: told by the source, held by its successor.

A copy may be behind: what an answer's next tokens are follows from any of its beginnings.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from peerllm.daemon.control_messages import AnswerCopied, AnswerGrew
from peerllm.daemon.facade import Chunk, GenerateRequest, InheritedAnswer
from peerllm.errors import UnavailableError
from peerllm.types import DeploymentId, DeviceId

FLUSH_S = 0.1  # between two tellings of ids
MAX_PROMPT_TOKENS = 1 << 18  # an answer to a longer prompt is not copied
MAX_COPIES = 256  # held here, of all coordinators, and half as many of one; the oldest go first
MAX_TOKENS = 4 << 20  # of all of them, as their sizes count them, and half as many of one coordinator
MAX_WITH_LOGPROBS = 4096  # ids of an answer that are copied where each has log probabilities ...
WITH_LOGPROBS_AT_ONCE = 128  # ... and in one message: half of what may be in one

Tell = Callable[[DeviceId, AnswerCopied | AnswerGrew], None]


@dataclass(slots=True)
class _UnderWay:
    request: GenerateRequest
    name: str
    ids: list[int]
    logprobs: list[bytes]
    told_to: DeviceId | None = None  # who has a copy ...
    told: int = 0  # ... and how many ids of it

    def untold(self) -> Iterator[tuple[int, tuple[int, ...], tuple[bytes, ...]]]:
        """Where it begins, ids, and their log probabilities; it counts as told from then on."""
        end = step = len(self.ids)
        if self.request.logprobs is not None:
            end, step = min(end, MAX_WITH_LOGPROBS), WITH_LOGPROBS_AT_ONCE
        while self.told < end:
            start, self.told = self.told, min(self.told + step, end)
            yield start, tuple(self.ids[start : self.told]), tuple(self.logprobs[start : self.told])


class AnswerCopies:
    """On the source. `successor` says who follows in a deployment now, None: nobody is ready to.

    `heir` says who goes on with one that gives way, as which deployment: what breaks off here is left to that device.
    """

    def __init__(
        self,
        tell: Tell,
        successor: Callable[[DeploymentId], DeviceId | None],
        heir: Callable[[DeploymentId], tuple[DeviceId, DeploymentId] | None] = lambda _: None,
    ) -> None:
        self._tell, self._successor, self._heir = tell, successor, heir
        self._under_way: dict[str, _UnderWay] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.going = False  # this device goes down: who follows may go on with what breaks off here

    async def copied(self, request: GenerateRequest, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        """The same chunks, their ids told to the successor as they come."""
        digest = hashlib.sha256(f"{request.deployment} {request.kept}".encode()).hexdigest()[:32]
        known = list(request.answer), list(request.known_logprobs)
        answer = self._under_way[digest] = _UnderWay(request, digest, *known)
        self._see_to_timer()
        try:
            async with aclosing(cast("AsyncGenerator[Chunk]", chunks)) as inner:
                async for chunk in inner:
                    answer.ids += chunk.ids
                    answer.logprobs += chunk.logprobs
                    yield chunk
        except UnavailableError:
            if (heir := self._heir(request.deployment)) is not None:
                self._copy(answer, *heir)
            raise
        finally:
            if self._under_way.get(digest) is answer:
                del self._under_way[digest]
            if answer.told_to is not None and not self.going:
                self._tell(answer.told_to, AnswerGrew(request.deployment, digest, len(answer.ids), (), over=True))

    def again(self, device: DeviceId) -> None:
        """The device may have missed something, or begins to follow: tell it all anew."""
        for answer in self._under_way.values():
            if answer.told_to == device:
                answer.told_to = None

    def flush(self) -> None:
        """Tell what is new."""
        for answer in self._under_way.values():
            request, to = answer.request, self._successor(answer.request.deployment)
            if to is None or len(request.prompt) > MAX_PROMPT_TOKENS:
                continue
            if to != answer.told_to:
                answer.told_to, answer.told = to, self._copy(answer, to, request.deployment)
            for start, ids, logprobs in answer.untold():
                self._tell(to, AnswerGrew(request.deployment, answer.name, start, ids, logprobs=logprobs))

    def _copy(self, answer: _UnderWay, to: DeviceId, deployment: DeploymentId) -> int:
        """How many of its ids it has: none where they come with log probabilities, which follow in pieces."""
        request, ids = answer.request, () if answer.request.logprobs is not None else tuple(answer.ids)
        self._tell(to, AnswerCopied(
            deployment, answer.name, tuple(request.prompt), request.max_tokens, request.sampling, request.client,
            request.kept, ids,
        ))  # fmt: skip
        return len(ids)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _see_to_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._due)

    def _due(self) -> None:
        self._timer = None
        self.flush()
        if self._under_way:
            self._see_to_timer()


def inherited(copy: AnswerCopied) -> InheritedAnswer:
    """As the API goes on with it."""
    sampled = copy.prompt, copy.max_tokens, copy.sampling, copy.client, copy.kept
    return InheritedAnswer(copy.deployment, *sampled, list(copy.ids), [])


class HeldCopies:
    """On the successor."""

    def __init__(self) -> None:
        self._held: dict[tuple[DeploymentId, str], InheritedAnswer] = {}  # the oldest first
        self._of: dict[DeploymentId, DeviceId] = {}  # its coordinator

    def hear(self, device: DeviceId, message: AnswerCopied | AnswerGrew) -> None:
        """From the deployment's coordinator. Ids that do not follow those that are here are left out."""
        key = message.deployment, message.answer
        if isinstance(message, AnswerCopied):
            self._held[key] = inherited(message)
            self._of[message.deployment] = device
            self._bound(device)
        elif message.over:
            self._held.pop(key, None)
        elif (held := self._held.get(key)) is not None and message.start == len(held.ids):
            logprobs = [*held.logprobs[:1], *message.logprobs]
            complete = len(held.logprobs) + len(message.logprobs) in (0, message.start + len(message.ids))
            if not complete or len(set(map(len, logprobs))) > 1:
                return
            cast("list[int]", held.ids).extend(message.ids)
            cast("list[bytes]", held.logprobs).extend(message.logprobs)
            self._bound(device)

    def take(self, deployment: DeploymentId, to: DeploymentId) -> list[InheritedAnswer]:
        """All of a deployment, as answers of the deployment `to` that goes on with them."""
        found = [one for key, one in self._held.items() if key[0] == deployment]
        self.forget(deployment)
        return [replace(one, deployment=to) for one in found]

    def forget(self, deployment: DeploymentId) -> None:
        self._held = {key: one for key, one in self._held.items() if key[0] != deployment}
        self._of.pop(deployment, None)

    def _bound(self, device: DeviceId) -> None:
        own = [key for key in self._held if self._of[key[0]] == device]
        for keys, share in ((own, 2), (list(self._held), 1)):
            sizes = {key: self._held[key].size for key in keys if key in self._held}
            count, tokens = len(sizes), sum(sizes.values())
            for key, size in sizes.items():
                if count <= MAX_COPIES // share and tokens <= MAX_TOKENS // share:
                    break
                del self._held[key]
                count, tokens = count - 1, tokens - size
