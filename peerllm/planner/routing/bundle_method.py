"""Raising a Lagrangian bound: the proximal bundle method (Lemaréchal 1978; Kiwiel 1990).

The bound is a concave function of prices, known by its values and slopes where it was asked. These make a model of it
from above; the next prices maximise that model, less what keeps them near the best prices so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from peerllm.planner.arrays import Floats

FIRST_GAIN = 0.05  # relative gain that the first step is laid out for
TOLERANCE = 2e-4  # relative; less to be gained, by the model, is nothing
SERIOUS_STEP = 0.1  # share of the gain promised by the model that makes new prices the best ones
GOOD_STEP = 0.5  # share that makes the next step longer
LONGER, SHORTER = 2.0, 0.7
PROBES, PROBE_GROWTH = 4, 4.0  # the patient look further where nothing is to be gained near by
PLANES = 60  # of the model, at most
MIX_ROUNDS = {True: 400, False: 80}  # of the search for the best mix of planes; patient or not
MIX_TOLERANCE = 1e-2  # of the tolerance: how well the mix is found
NEGLIGIBLE = 1e-12


class ProvenBound(Protocol):
    """Something found under prices, with the bound it proves."""

    @property
    def value(self) -> float: ...


Found = TypeVar("Found", bound=ProvenBound)
Judged = tuple[Floats, bool]  # how far each priced limit is broken; whether what was found will do


class BundleMethod(Generic[Found]):
    """`solve` gives the bound under prices, `judge` how far its optimum breaks each limit and whether it will do."""

    def __init__(
        self, solve: Callable[[Floats], Found], judge: Callable[[Found], Judged], *, patient: bool = False
    ) -> None:
        """`patient`: to the top, where there are many prices and what follows is dear."""
        self._solve, self._judge = solve, judge
        self._rounds, self._probes = MIX_ROUNDS[patient], PROBES if patient else 0

    def maximise(self, price: Floats, cutoff: float, steps: int) -> tuple[Found, bool, int]:
        """The best bound met; whether the last optimum will do; the passes it took. Ends when `goal` is passed."""
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
    """Planes over the prices: where each is above the best value there, and its slope."""

    def __init__(self, slope: Floats) -> None:
        self._slopes, self._excess, self._mix = slope[None], np.zeros(1), np.ones(1)

    def trial(self, price: Floats, step_size: float, tolerance: float, rounds: int) -> tuple[Floats, float]:
        """The prices, none negative, where the model, less the square of the move over 2·reach, is highest; its gain.

        From `price` a mix of slopes is followed `reach` far; the mix is found by pairwise Frank-Wolfe steps.
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
        """The best prices are elsewhere."""
        self._excess = np.maximum(self._excess + self._slopes @ by - gained, 0.0)

    def add(self, slope: Floats, excess: float) -> None:
        """One plane more; the least of use goes if there are too many, or all are mixed into one."""
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
