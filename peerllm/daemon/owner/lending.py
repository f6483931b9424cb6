"""Watches the machine and does what decide/owner_limits.py decides: says that it leaves, lets go, lends again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, assert_never

from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.decide.owner_limits import (
    Elapsed,
    Going,
    Holds,
    LendingEvent,
    LendNoMore,
    LetGo,
    LimitsSet,
    MachineRead,
    OwnerDecider,
    OwnerLimits,
    SayLeaving,
    StartEngineAnew,
)
from peerllm.daemon.owner import limits_file
from peerllm.types import DeviceId

READ_S = 5.0  # between two looks at the machine
LOOK_S = 0.1  # while a farewell waits: the end of an answer is no event here

log = logging.getLogger(__name__)


class Lender(Protocol):
    """What is needed of the daemon."""

    ledger: Ledger

    def lent_now(self, limits: OwnerLimits) -> int:
        """What these limits lend of this machine's memory."""
        ...

    def lending_changed(self) -> None:
        """Tell the household what is lent now, and whether this device leaves."""
        ...

    async def let_go(self, reason: str) -> None:
        """Drop what is held for deployments."""
        ...

    async def restart_engine(self, threads: int | None) -> None: ...


class Lending:
    """`start` it, tell it when promises change (`look`), `close` it. `given`: limits among the options of `up`."""

    def __init__(
        self,
        lender: Lender,
        data_dir: Path,
        limits: OwnerLimits,
        given: Mapping[str, Any],
        read: Callable[[OwnerLimits], MachineRead],
    ) -> None:
        self._lender, self._data_dir, self._given, self._read = lender, data_dir, given, read
        self._decider = OwnerDecider(limits)
        self._tasks = BackgroundTasks()
        self._timer: asyncio.TimerHandle | None = None
        self._going = False
        self._looked = asyncio.Event()

    @property
    def limits(self) -> OwnerLimits:
        return self._decider.limits

    @property
    def leaving(self) -> str:
        """Why this device asks to hold nothing now; "" while it lends."""
        return self._decider.leaving

    @property
    def going(self) -> bool:
        """Whether the device goes down or to sleep."""
        return self._going

    async def start(self) -> None:
        """Returns when the machine was looked at once: a device that may not lend does not begin to."""
        await self._look_at_machine()
        self.look()
        self._tasks.start(self._watch(), "owner's limits")

    async def close(self) -> None:
        """May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()

    async def change(self, changes: Mapping[str, Any]) -> None:
        """Set some limits, for now and for later starts. BadInputError names what is no limit."""
        limits = limits_file.changed(self.limits, changes)
        try:
            await asyncio.to_thread(limits_file.keep, self._data_dir, limits, self._given)
        except OSError as error:
            log.warning("the limits cannot be remembered for the next start: %s", error)
        self._lender.ledger.lent_bytes = self._lender.lent_now(limits)
        await self._look_at_machine(limits)
        self._handle(LimitsSet(limits))
        self.look()
        self._lender.lending_changed()

    def look(self) -> None:
        """Promises may have changed."""
        ledger = self._lender.ledger
        self._handle(Holds(ledger.promised_bytes, ledger.lent_bytes))
        self._looked.set()

    def go(self, reason: str) -> None:
        """The device goes down or to sleep: hold nothing any more. "" takes it back."""
        self._going = bool(reason)
        self._handle(Going(reason))

    async def gone(self, here: Callable[[DeviceId], bool], busy: Callable[[], bool], within_s: float) -> bool:
        """Wait until nothing is held for devices that are `here`, and no answer is under way; False: time is up."""
        ledger = self._lender.ledger
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while busy() or any(here(promise.coordinator) for promise in ledger.promises()):
                    self._looked.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await self._looked.wait()
                return True
        return False

    # ---- inside -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(READ_S)
            await self._look_at_machine()

    async def _look_at_machine(self, limits: OwnerLimits | None = None) -> None:
        try:
            found = await asyncio.to_thread(self._read, limits or self.limits)
        except Exception:  # a sensor of a kind that nobody has seen must not end the watch
            log.exception("the machine cannot be read")
            return
        self._handle(found)

    def _handle(self, event: LendingEvent) -> None:
        for action in self._decider.handle(event, time.monotonic()):
            match action:
                case SayLeaving(reason):
                    log.info("%s", f"this device lends nothing: {reason}" if reason else "this device lends again")
                    self._lender.ledger.leaving = reason
                    self._lender.lending_changed()
                case LendNoMore(held):
                    log.info("memory is short here: %s", "nothing more is lent" if held else "no more")
                    self._lender.ledger.full = held
                    self._lender.lending_changed()
                case LetGo(reason):
                    self._tasks.start(self._lender.let_go(reason), "owner's limits: let go")
                case StartEngineAnew():
                    again = self._lender.restart_engine(self.limits.threads)
                    self._tasks.start(again, "owner's limits: start the engine anew")
                case _:
                    assert_never(action)
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._decider.deadline()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._handle, Elapsed()) if due else None
