"""How often a deployment tries again after failures, and how often it looks for a better plan."""

from __future__ import annotations

from collections import deque
from math import inf

from peerllm.types import DeviceId

MAX_ATTEMPTS = 5  # plans tried one after another when devices refuse or fail, before the deployment waits or gives up
CONTENTION_S = 0.2  # wait after the first failed attempt; doubles, and differs from device to device
RETRY_S = 2.0  # a waiting deployment tries again after this, doubling ...
RETRY_MOST_S = 60.0  # ... up to this, and whenever the household changes
RETRY_SETTLE_S = 0.3  # changes come in bursts
ECHO_S = 1.0  # what we let go of ourselves is told back to us as free memory within this
STABLE_S = 10.0  # a plan that ran for so long was a good one; else repairs follow each other ever more slowly
QUICK_REPAIRS = 4  # repairs of unstable plans that follow at once
REPAIR_MOST_S = 5.0  # the longest wait before one: answers wait for it
RENEWALS = 3  # times that links are made anew before the plan does without a device whose links break ...
RENEWALS_S = 30.0  # ... in this time

JOIN_SETTLE_S = 0.5  # devices come in bursts
SETTLE_S = 2.0  # measurements change in bursts
COMPARE_EVERY_S = 5.0  # at most so often the running plan is compared with others
GAIN_RETRY_S = 30.0  # after a move for gain failed; doubles
MOVES = 2  # for better conditions, at most so many ...
MOVES_S = 600.0  # ... in this time; moves to devices that joined and moves away from lost ones do not count


class Attempts:
    """Plans that failed, one after another, and when the next may be tried."""

    def __init__(self, me: DeviceId) -> None:
        self._spread = 1 + int(me[:8], 16) / 2**32  # so that two coordinators do not meet again and again
        self.shunned: set[DeviceId] = set()  # devices that failed in them
        self.reason = ""  # why the last one failed, if there is no hope for now
        self.failed = 0
        self._waits = 0
        self._hopeless: frozenset[DeviceId] | None = None  # without these devices there was no plan ...
        self._retry_at = 0.0  # ... which is not tried again before
        self._given_up_at = -inf
        self._changed = False  # conditions, since the last search began
        self._unstable = 0
        self._not_before = 0.0
        self._renewed: deque[float] = deque(maxlen=RENEWALS)

    def forget(self) -> None:
        """The deployment serves: what failed before counts no more."""
        self.failed, self._waits, self._hopeless, self.reason = 0, 0, None, ""
        self.shunned.clear()

    def wait_s(self) -> float | None:
        """Another attempt failed: the time until the next; None if it was the last."""
        self.failed += 1
        return CONTENTION_S * 2.0 ** (self.failed - 1) * self._spread if self.failed < MAX_ATTEMPTS else None

    def give_up(self, without: frozenset[DeviceId], reason: str, now: float, until: float | None = None) -> None:
        """There is no plan without these devices: do not try before the time is over, or something changes."""
        self._hopeless, self.reason, self._given_up_at, self.failed = without, reason, now, 0
        self._retry_at = now + min(RETRY_MOST_S, RETRY_S * 2.0 ** min(self._waits, 8)) if until is None else until
        if self._changed:  # the search did not know of it
            self._retry_at = min(self._retry_at, now + RETRY_S)
        self._waits += 1
        self.shunned.clear()

    def begin(self) -> None:
        """A plan is searched."""
        self._changed = False

    def hope(self) -> None:
        """A device came, so the next attempt may begin at once, and waits begin anew: another may follow it soon."""
        self._hopeless, self._waits = None, 0

    def conditions_changed(self, now: float) -> None:
        self._changed = True
        if now - self._given_up_at > ECHO_S:
            self._retry_at = min(self._retry_at, now + RETRY_SETTLE_S)

    def asked(self, now: float) -> None:
        self._retry_at = min(self._retry_at, max(now, self._given_up_at + ECHO_S))

    def hopeless(self, without: frozenset[DeviceId]) -> bool:
        """Whether the last search without these devices found no plan."""
        return self._hopeless == without

    def next_at(self, without: frozenset[DeviceId]) -> float:
        """When a plan without these devices may be searched."""
        return max(self._not_before, self._retry_at if self.hopeless(without) else 0.0)

    def repair_after(self, ran_s: float, now: float) -> None:
        """Note that a plan which ran for so long needs repair, and when that may begin."""
        self._unstable = self._unstable + 1 if ran_s < STABLE_S else 0
        if self._unstable > QUICK_REPAIRS:
            wait_s = CONTENTION_S * 2.0 ** min(self._unstable - QUICK_REPAIRS, 16)
            self._not_before = now + min(REPAIR_MOST_S, wait_s)

    def may_renew(self, now: float) -> bool:
        return not self.failed and not self.shunned and now >= self._not_before

    def renew(self, now: float) -> None:
        self._renewed.append(now)

    def renewed_in_vain(self, now: float) -> bool:
        """Whether links broke again each time that they were made anew; a yes starts the count again."""
        vain = len(self._renewed) == RENEWALS and now - self._renewed[0] < RENEWALS_S
        if vain:
            self._renewed.clear()
        return vain


class Comparisons:
    """When the running plan is compared with others, so that plans do not change at every change of a measurement."""

    def __init__(self) -> None:
        self._joins: dict[DeviceId, float] = {}  # when to compare for the sake of a device that joined
        self._conditions_due = inf  # when to compare for the sake of changed conditions
        self._after = 0.0
        self._failed_until = 0.0  # better plans could not be established: conditions alone are no reason before
        self._failures = 0
        self._moved: deque[float] = deque(maxlen=MOVES)  # for better conditions
        self._begun_for: tuple[dict[DeviceId, float], float] = ({}, inf)  # what the search under way knows of

    def joined(self, device: DeviceId, trusted_from: float, now: float) -> None:
        self._joins[device] = max(now + JOIN_SETTLE_S, trusted_from)

    def away(self, device: DeviceId) -> None:
        self._joins.pop(device, None)

    def waits_for(self, device: DeviceId) -> bool:
        return device in self._joins

    def conditions_changed(self, now: float) -> None:
        self._conditions_due = min(self._conditions_due, now + SETTLE_S)

    def at(self) -> float:
        """When the next comparison is due."""
        ration = self._moved[0] + MOVES_S if len(self._moved) == MOVES else 0.0
        due = min([max(self._conditions_due, ration, self._failed_until), *self._joins.values()])
        return max(due, self._after)

    def begin(self, without: frozenset[DeviceId]) -> None:
        """A plan is searched, which knows of all conditions and of all devices but these."""
        known = {device: due for device, due in self._joins.items() if device not in without}
        self._begun_for = known, self._conditions_due
        self._joins = {device: due for device, due in self._joins.items() if device not in known}
        self._conditions_due = inf

    def cancelled(self, unusable: frozenset[DeviceId]) -> None:
        """That search, or the move, was broken off: what it was begun for is due again."""
        joins, due = self._begun_for
        self._joins = {device: at for device, at in joins.items() if device not in unusable} | self._joins
        self._conditions_due = min(self._conditions_due, due)

    def stayed(self, now: float) -> None:
        self._after = now + COMPARE_EVERY_S

    def moved(self, now: float) -> None:
        self._failures, self._after = 0, now + COMPARE_EVERY_S
        if not self._begun_for[0]:
            self._moved.append(now)

    def failed(self, now: float) -> None:
        """The better plan could not be established: what it was begun for is due again after a while."""
        self._failed_until = now + min(GAIN_RETRY_S * 2.0 ** min(self._failures, 8), MOVES_S)
        self._failures += 1
        joins, _ = self._begun_for
        self._joins = dict.fromkeys(joins, self._failed_until) | self._joins
        self._conditions_due = min(self._conditions_due, self._failed_until)
        self._after = now + COMPARE_EVERY_S
