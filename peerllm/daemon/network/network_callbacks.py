"""The callbacks registered with a Network. One that raises is logged; the others are called all the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from peerllm.daemon.control_messages import Control
from peerllm.daemon.decide.membership_events import State
from peerllm.transport.roster.entry import RosterEntry
from peerllm.types import DeviceId

log = logging.getLogger(__name__)


class NetworkCallbacks:
    """The callbacks of one Network."""

    def __init__(self) -> None:
        self.message: list[Callable[[DeviceId, Control], None]] = []
        self.state: list[Callable[[DeviceId, State, State, str, bool], None]] = []
        self.roster: list[Callable[[tuple[RosterEntry, ...]], None]] = []
        self.change: list[Callable[[], None]] = []
        self._due: asyncio.Handle | None = None

    def changed(self) -> None:
        """Call `change` soon; several changes at once count as one."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._due = None
        call(self.change)


def call(callbacks: list[Callable[..., None]] | list[Callable[[], None]], *arguments: object) -> None:
    """Call each."""
    for callback in list(callbacks):
        try:
            callback(*arguments)
        except Exception:
            log.exception("a callback failed")
