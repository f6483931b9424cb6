"""Whether this device lends, and why not: its owner's limits against what the machine is like. Sans-I/O.

A reason not to lend is a farewell. The device says that it leaves, coordinators move to others, and what it still holds
when FAREWELL_S are over it lets go of. It lends again when the reason is over:

| reason | begins | is over |
|---|---|---|
| it goes down or to sleep | at once | when it is awake again |
| its owner pauses it | at once | when its owner resumes it |
| hours | outside of them | within them |
| battery | on battery below the level | on mains, or BATTERY_STEP above the level |
| heat | at the limit for HOT_S | HOT_STEP below it for CALM_S |
| memory taken by others | less than SPARE_BYTES available for LESS_S: lends no more than it holds; for SHORT_S: leaves | SPARE_BYTES beside what it held are available for CALM_S |
| it lends less than it holds | its owner lowered the limit | it holds no more than that |
| other processors | its owner changed them | it holds nothing; its engine is then started anew |
"""  # noqa: E501  a table's line

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

FAREWELL_S = 60.0  # for others to load what this device holds, before it lets go all the same
BATTERY_STEP = 5  # percent
HOT_S, HOT_STEP = 10.0, 8.0  # seconds, degrees
SPARE_BYTES = 256 << 20  # available to others on this machine at least
LESS_S, SHORT_S = 10.0, 30.0  # of too little memory
CALM_S = 60.0  # a machine that was too hot or too full has to be neither for so long
DAY_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """What the owner of a device allows. None: no limit."""

    memory_bytes: int | None = None  # the most that is lent; None: what is free
    threads: int | None = None  # processors that are lent; None: all
    hours: tuple[int, int] | None = None  # lent from the first to the second minute of the day
    battery_percent: int | None = 15  # on battery it lends down to this
    hot_celsius: float | None = None
    paused: bool = False


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LimitsSet:
    limits: OwnerLimits


@dataclass(frozen=True, slots=True)
class MachineRead:
    """What the machine is like now; None: it cannot be told, or does not apply."""

    minute: int = 0  # of the day, as the clock on the wall shows it
    battery_percent: float | None = None  # None: on mains
    celsius: float | None = None
    available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Holds:
    """What is promised to deployments here, of what is lent."""

    promised_bytes: int
    lent_bytes: int


@dataclass(frozen=True, slots=True)
class Going:
    """The device goes down or to sleep; "" takes that back. Whoever ends it knows how long it waits."""

    reason: str


@dataclass(frozen=True, slots=True)
class Elapsed:
    """The time that `deadline` named has come."""


LendingEvent = LimitsSet | MachineRead | Holds | Going | Elapsed

# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SayLeaving:
    """Tell the household that this device asks to hold nothing, and why; "": it lends again."""

    reason: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """Drop what is still held: the time for others to take it over is up."""

    reason: str


@dataclass(frozen=True, slots=True)
class LendNoMore:
    """Promise nothing beyond what is held; False takes that back."""

    held: bool


@dataclass(frozen=True, slots=True)
class StartEngineAnew:
    """Nothing is held: end the engine, so that the next one has the processors that are lent now."""


LendingAction = SayLeaving | LetGo | LendNoMore | StartEngineAnew


@dataclass(slots=True)
class _Lasting:
    """How long something has been true without a break."""

    since: float | None = None

    def for_s(self, true: bool, now: float) -> float:
        if not true:
            self.since = None
            return -1.0
        self.since = now if self.since is None else self.since
        return now - self.since


@dataclass(slots=True)
class _Reason:
    kind: str
    text: str
    until: float  # when what is still held is let go of
    dropped: bool = False


class OwnerDecider:
    """`limits` and `leaving` may be read from outside."""

    def __init__(self, limits: OwnerLimits) -> None:
        self.limits = limits
        self._threads = limits.threads  # of the engine that runs
        self._read = MachineRead()
        self._holds = Holds(0, 0)
        self._going = Going("")
        self._reason: _Reason | None = None
        self._hot, self._cool = _Lasting(), _Lasting()
        self._short, self._roomy = _Lasting(), _Lasting()
        self._too_hot = self._too_full = self._no_more = False
        self._said_no_more = False
        self._held_bytes = 0  # what it held when memory became short

    @property
    def leaving(self) -> str:
        """Why this device asks to hold nothing; "" while it lends."""
        return self._reason.text if self._reason is not None else ""

    def handle(self, event: LendingEvent, now: float) -> list[LendingAction]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case LimitsSet(limits):
                self.limits = limits
            case MachineRead():
                self._read = event
                self._feel(now)
            case Holds():
                self._holds = event
            case Going():
                self._going = event
            case Elapsed():
                pass
            case _:
                assert_never(event)
        return self._settle(now)

    def deadline(self) -> float | None:
        """When Elapsed is wanted; None while nothing waits for a time."""
        reason = self._reason
        waits = reason is not None and not reason.dropped and self._holds.promised_bytes > 0
        return reason.until if reason is not None and waits and reason.until < math.inf else None

    # ---- the machine ------------------------------------------------------------------------------------------------

    def _feel(self, now: float) -> None:
        """Heat and memory, over time."""
        limit, celsius = self.limits.hot_celsius, self._read.celsius
        hot_s = self._hot.for_s(limit is not None and celsius is not None and celsius >= limit, now)
        cool_s = self._cool.for_s(limit is None or celsius is None or celsius <= limit - HOT_STEP, now)
        if hot_s >= HOT_S:
            self._too_hot = True
        elif limit is None or cool_s >= CALM_S:
            self._too_hot = False
        available, wanted = self._read.available_bytes, SPARE_BYTES + (self._held_bytes if self._too_full else 0)
        short_s = self._short.for_s(available is not None and available < SPARE_BYTES, now)
        roomy_s = self._roomy.for_s(available is None or available >= wanted, now)
        if short_s >= LESS_S:
            self._no_more = True
        if short_s >= SHORT_S and self._holds.promised_bytes and not self._too_full:
            self._too_full, self._held_bytes = True, self._holds.promised_bytes
        elif roomy_s >= CALM_S:
            self._too_full = self._no_more = False

    # ---- reasons ----------------------------------------------------------------------------------------------------

    def _why(self) -> tuple[str, str]:
        """The first reason not to lend: (its kind, for people); ("", "") where there is none."""
        limits, read, holds = self.limits, self._read, self._holds
        kind = self._reason.kind if self._reason is not None else ""
        if self._going.reason:
            return "going", self._going.reason
        if limits.paused:
            return "owner", "paused by its owner"
        if limits.hours is not None and not within(limits.hours, read.minute):
            return "hours", f"paused: it lends from {hours_text(limits.hours)} only"
        level = limits.battery_percent
        if level is not None and read.battery_percent is not None:
            level += BATTERY_STEP if kind == "battery" else 0
            if read.battery_percent < level:
                return "battery", f"paused: on battery, {read.battery_percent:.0f} %"
        if self._too_hot:
            return "heat", f"paused: too hot, {read.celsius or 0:.0f} °C"
        if self._too_full:
            return "memory", "paused: its memory is needed by other programs"
        if holds.promised_bytes > holds.lent_bytes:
            return "less", "it lends less memory now"
        if limits.threads != self._threads:
            return "processors", "it lends other processors now"
        return "", ""

    def _settle(self, now: float) -> list[LendingAction]:
        no_more, actions = self._no_more, list[LendingAction]()
        kind, text = self._why()
        if kind == "processors" and not self._holds.promised_bytes:
            self._threads = self.limits.threads
            actions.append(StartEngineAnew())
            kind, text = self._why()
        before = self._reason
        if not kind:
            self._reason = None
            if before is not None:
                actions.append(SayLeaving(""))
        elif before is None or before.kind != kind:
            until = math.inf if kind == "going" else now + FAREWELL_S
            dropped = before is not None and before.dropped
            self._reason = _Reason(kind, text, min(until, before.until) if before is not None else until, dropped)
            actions.append(SayLeaving(text))
        reason = self._reason
        if reason is not None and not reason.dropped and self._holds.promised_bytes and now >= reason.until:
            reason.dropped = True
            actions.append(LetGo(reason.text))
        if no_more != self._said_no_more:
            self._said_no_more = no_more
            actions.append(LendNoMore(no_more))
        return actions


def within(hours: tuple[int, int], minute: int) -> bool:
    """Whether a minute of the day lies in these hours, which may run over midnight."""
    start, end = hours
    return start <= minute < end if start <= end else minute >= start or minute < end


def hours_text(hours: tuple[int, int]) -> str:
    """As people say it: "20:00 to 8:30"."""
    return " to ".join(f"{minute // 60}:{minute % 60:02}" for minute in hours)
