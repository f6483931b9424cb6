"""Maximise a Lagrangian bound over its prices: the proximal bundle method (Lemaréchal 1978; Kiwiel 1990).

The bound is a concave function of the prices. Its values and slopes at the prices tried so far give cutting planes,
which bound it from above; the next prices maximise these planes less a penalty for moving away from the best prices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from peerllm.planner.arrays import Floats

FIRST_GAIN = 0.05  # relative gain that the length of the first step aims at
TOLERANCE = 2e-4  # relative; stop when the planes promise less
SERIOUS_STEP = 0.1  # share of the promised gain from which on new prices become the best ones
GOOD_STEP = 0.5  # share of the promised gain from which on the next step is longer
LONGER, SHORTER = 2.0, 0.7
PROBES, PROBE_GROWTH = 4, 4.0  # longer steps tried, if patient, before the planes promise nothing
PLANES = 60  # cutting planes kept
MIX_ROUNDS = {True: 400, False: 80}  # Frank-Wolfe steps, patient or not
MIX_TOLERANCE = 1e-2  # share of TOLERANCE at which the mix is good enough
NEGLIGIBLE = 1e-12


class ProvenBound(Protocol):
    """The relaxed optimum under some prices; `value` is the bound that it proves."""

    @property
    def value(self) -> float: ...


Found = TypeVar("Found", bound=ProvenBound)
Judged = tuple[Floats, bool]  # excess over each priced limit; good enough to stop at


class BundleMethod(Generic[Found]):
    """Maximise the bound that `solve` returns for prices.

    `judge` says by how much the relaxed optimum breaks each limit, and whether it is good enough to stop at.
    """

    def __init__(
        self, solve: Callable[[Floats], Found], judge: Callable[[Found], Judged], *, patient: bool = False
    ) -> None:
        """`patient` spends more work on each step: worth it with many prices, before an expensive search."""
        self._solve, self._judge = solve, judge
        self._rounds, self._probes = MIX_ROUNDS[patient], PROBES if patient else 0

    def maximise(self, price: Floats, cutoff: float, steps: int) -> tuple[Found, bool, int]:
        """Return the best bound, whether the last optimum was good enough, and how many bounds were computed.

        Stops at the first bound above `cutoff`, after `steps` bounds, or when the planes promise no more gain.
        """
        best = self._solve(price)
        if not best.value <= cutoff:
            return best, False, 1
        slope, good = self._judge(best)
        if good:
            return best, True, 1
        model = _CuttingPlanes(slope)
        step_size = FIRST_GAIN * abs(best.value) / max(float(slope @ slope), NEGLIGIBLE)
        step = 1
        for step in range(2, steps + 1):
            least = TOLERANCE * abs(best.value)
            trial, promised = model.trial(price, step_size, least, self._rounds)
            for _ in range(self._probes):
                if promised >= least:
                    break
                step_size *= PROBE_GROWTH
                trial, promised = model.trial(price, step_size, least, self._rounds)
            if promised < least:
                break
            found = self._solve(trial)
            if not found.value <= cutoff:
                return found, False, step
            slope, good = self._judge(found)
            if good:
                return found, True, step
            gained = found.value - best.value
            if gained >= SERIOUS_STEP * promised:
                model.move(trial - price, gained)
                model.add(slope, 0.0)
                price, best = trial, found
                step_size *= LONGER if gained >= GOOD_STEP * promised else 1.0
            else:
                excess = max(gained + float(slope @ (price - trial)), 0.0)
                model.add(slope, excess)
                step_size *= SHORTER if excess > 2 * promised else 1.0
        return best, False, step


class _CuttingPlanes:
    """Cutting planes: the slope of each, and by how much it exceeds the best value at the best prices."""

    def __init__(self, slope: Floats) -> None:
        self._slopes, self._excess, self._mix = slope[None], np.zeros(1), np.ones(1)

    def trial(self, price: Floats, step_size: float, tolerance: float, rounds: int) -> tuple[Floats, float]:
        """The prices >= 0 that maximise the planes less |move|² / (2 · step_size), and the promised gain.

        The maximum follows a convex mix of the slopes from `price`; pairwise Frank-Wolfe steps find the mix.
        """
        trial = np.maximum(0.0, price + step_size * (self._mix @ self._slopes))
        for _ in range(rounds):
            values = self._excess + self._slopes @ (trial - price)
            to = int(values.argmin())
            off = int(np.where(self._mix > NEGLIGIBLE, values, -np.inf).argmax())
            gap = float(values[off] - values[to])
            if gap < MIX_TOLERANCE * tolerance:
                break
            direction = self._slopes[to] - self._slopes[off]
            moved = direction[(trial > 0) | (direction > 0)]
            bend = step_size * float(moved @ moved)
            share = min(float(self._mix[off]), gap / bend if bend > 0 else np.inf)
            self._mix[to] += share
            self._mix[off] -= share
            trial = np.maximum(0.0, price + step_size * (self._mix @ self._slopes))
        return trial, float((self._excess + self._slopes @ (trial - price)).min())

    def move(self, by: Floats, gained: float) -> None:
        """Shift the planes to new best prices, `by` away, whose value is higher by `gained`."""
        self._excess = np.maximum(self._excess + self._slopes @ by - gained, 0.0)

    def add(self, slope: Floats, excess: float) -> None:
        """Add a plane; when there are PLANES, drop the unused one that exceeds most, or merge all into their mix."""
        if len(self._excess) >= PLANES:
            idle = np.flatnonzero(self._mix <= NEGLIGIBLE)
            if len(idle):
                keep = np.arange(len(self._excess)) != idle[self._excess[idle].argmax()]
                self._slopes, self._excess, self._mix = self._slopes[keep], self._excess[keep], self._mix[keep]
            else:
                mixed, high = self._mix @ self._slopes, float(self._mix @ self._excess)
                self._slopes, self._excess, self._mix = mixed[None], np.array([high]), np.ones(1)
        self._slopes = np.vstack([self._slopes, slope])
        self._excess, self._mix = np.append(self._excess, excess), np.append(self._mix, 0.0)
