"""A deployment's decider is told what happens, one event at a time, and what it wants done is done."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from peerllm.daemon.decide.deployment_life.deployment_events import DeadlineReached, DeploymentAction, DeploymentEvent

log = logging.getLogger(__name__)


class Decider(Protocol):
    """The pure part: from what happens to what is to be done (decide/deployment_life/deployment_decider.py)."""

    def handle(self, event: DeploymentEvent, now: float) -> list[DeploymentAction]: ...

    def deadline(self) -> float | None: ...


class DecisionLoop:
    """`do` carries out each action. Deadlines of the decider are told to it, too, until `close`."""

    def __init__(self, name: str, decider: Decider, do: Callable[[DeploymentAction], None]) -> None:
        self._name, self._decider, self._do = name, decider, do
        self._events: deque[DeploymentEvent] = deque()
        self._handling = self.closed = False
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, event: DeploymentEvent) -> None:
        """Events that actions cause wait for the actions."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                one = self._events.popleft()
                actions = self._decider.handle(one, asyncio.get_running_loop().time())
                if actions:
                    log.debug("%s: %s: %s", self._name, one, actions)
                for action in actions:
                    self._do(action)
        finally:
            self._handling = False
        self._set_timer()

    def close(self) -> None:
        """No further deadline is told; nothing more may be fed. Idempotent."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = None if self.closed else self._decider.deadline()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self.feed, DeadlineReached())
