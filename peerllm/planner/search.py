"""Cheapest way through layers × devices under a memory limit per device: exact, or with a proven bound.

Where all blocks are alike, `walk` knows a shorter way. Else: a Lagrangian bound, then sweeps of labels between that
bound and the best way known: proofs close above the bound are cheap, and a way found there leaves little to prove. What
could not be decided is left open, and said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.ascent import Ascent
from peerllm.planner.labels import search
from peerllm.planner.relaxation import (
    Floats,
    Ints,
    Problem,
    Relaxed,
    fair_price,
    relaxed,
    relaxed_way,
    spread,
    usage,
    visits_of,
    way_cost,
)
from peerllm.planner.walk.blocks import blocks_of
from peerllm.planner.walk.contest import Walks

EXACT = 1e-10  # relative; two ways closer than this are one
STEPS = 150  # of the first ascent
STEPS_AGAIN = 30  # once a better way is known
FEW = 16  # devices up to which the search goes on until it is exact, within reason
WIDTHS = {True: (48, 400, 4000, 40_000), False: (48, 400)}  # labels per layer, for few devices and for many
BUDGET = {True: 900_000_000, False: 90_000_000}  # array elements touched before the rest is left open
BUDGET_AGAIN = 20_000_000  # where a walk is known already: what it could not prove is rarely proven here
STRIDE = 0.3  # of the way from the bound to the best that is tried next
CLOSE = 1e-4  # relative; so close to the best, all that is better is tried at once


@dataclass(frozen=True, slots=True)
class Found:
    """`homes` is empty when nothing was found; then `reached` is the last layer that found a place."""

    homes: tuple[int, ...]
    cost: float
    bound: float
    reached: int = -1
    proven: bool = True


class _Bracket:
    """The best way met and the bound, brought together."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.held = problem, visits_of(problem)
        self.best, self.homes = np.inf, ()  # type: tuple[float, tuple[int, ...]]
        self.bound, self.reached, self.work = -np.inf, -1, 0
        self.twins = _twins(problem)
        self._scale = np.maximum(self.held.room, 1).astype(float)
        count = len(self.held.room)
        self._price = np.concatenate([fair_price(self.held) * self._scale, np.zeros(2 * count)])

    def solve(self, price: Floats) -> Relaxed:
        self.work += self.held.hop.size + self.held.far.size * self.held.width
        count = len(self._scale)
        return relaxed(self.held, price[:count] / self._scale, price[count : 2 * count], price[2 * count :])

    def ascend(self, steps: int) -> Relaxed:
        """A better bound, and any way met on the way there that keeps every limit."""

        def judge(found: Relaxed) -> tuple[Floats, bool]:
            way = relaxed_way(self.held, found)
            used, long, count = usage(self.held, way)
            if (used <= self.problem.room).all():
                self.take(way)
            given = found.byte * self.held.room + found.long - found.toll > 0  # back, if the device is left alone
            free = self.held.room / self._scale * given
            return np.concatenate([used / self._scale - free, long - given, given - count]), False

        goal = self.best if np.isfinite(self.best) else 1e300
        found, _, _ = Ascent(self.solve, judge).climb(self._price, goal, steps)
        self._price = np.concatenate([found.byte * self._scale, found.long, found.toll])
        self.bound = max(self.bound, min(found.value, self.best))
        return found

    def take(self, way: list[tuple[int, int]]) -> None:
        homes = spread(way)
        cost = way_cost(self.problem, homes)
        if cost < self.best:
            self.best, self.homes = cost, homes

    @property
    def done(self) -> bool:
        return bool(self.bound >= self.best * (1 - EXACT))


def cheapest(problem: Problem) -> Found:
    """The cheapest assignment of a device to each layer within `room`."""
    blocks = blocks_of(problem)
    if blocks is None:
        return among_all(problem)
    walks = Walks(blocks, lambda homes: way_cost(problem, homes))
    walks.run()
    proven = walks.bound >= walks.best * (1 - EXACT)
    if not walks.homes or not (proven or walks.spent or len(problem.room) > FEW):
        return among_all(problem, Found(walks.homes, walks.best, walks.bound))
    bound = walks.best if proven else walks.bound
    return Found(walks.homes, walks.best, bound, len(problem.cost) - 1, bool(proven))


def among_all(problem: Problem, known: Found | None = None) -> Found:
    """The same, whatever the layers are like; `known` is what was found and proven before."""
    bracket = _Bracket(problem)
    if known is not None and known.homes:
        bracket.best, bracket.homes, bracket.bound = known.cost, known.homes, known.bound
    found = bracket.ascend(STEPS)
    if not np.isfinite(found.value):
        _, _, _, reached = search(bracket.held, found, np.inf, WIDTHS[True][0], bracket.twins)
        return Found((), np.inf, np.inf, reached)
    again = known is not None and bool(known.homes)
    few = len(problem.room) <= FEW and not again
    budget = BUDGET_AGAIN if again else BUDGET[few]
    tried = np.inf
    while not bracket.done and bracket.work < budget:
        top = min(bracket.best * (1 - EXACT), tried)
        near = np.isfinite(top) and top - bracket.bound <= CLOSE * abs(top)
        goal = bracket.bound + STRIDE * (top - bracket.bound) if np.isfinite(top) and not near else top
        decided = _sweep(bracket, found, goal, WIDTHS[few])
        if decided is None and goal == top and np.isinf(bracket.best):
            return Found((), np.inf, np.inf, bracket.reached, proven=False)
        if decided is None:
            tried = goal
            if near or tried - bracket.bound <= CLOSE * abs(tried):
                break
        elif decided:
            tried = np.inf
            found = bracket.ascend(STEPS_AGAIN)
        elif np.isinf(goal):
            return Found((), np.inf, np.inf, bracket.reached)
        else:
            bracket.bound = max(bracket.bound, goal)
    best, bound = bracket.best, min(bracket.bound, bracket.best)
    if not bracket.homes:
        return Found((), np.inf, bound, bracket.reached, proven=False)
    return Found(bracket.homes, best, best if bracket.done else bound, len(problem.cost) - 1, bracket.done)


def _sweep(bracket: _Bracket, found: Relaxed, goal: float, widths: tuple[int, ...]) -> bool | None:
    """True: a way was found; False: there is none within the goal; None: undecided."""
    for width in widths:
        way, whole, work, reached = search(bracket.held, found, goal, width, bracket.twins)
        bracket.work += work
        bracket.reached = max(bracket.reached, reached)
        if way is not None:
            bracket.take(way)
            if whole:
                bracket.bound = bracket.best
            return True
        if whole:
            return False
    return None


def _twins(problem: Problem) -> Ints:
    """For each device the nearest earlier one it could be swapped with unnoticed, or -1: the first comes first."""
    devices = len(problem.room)
    twins = np.full(devices, -1, dtype=np.int64)
    marks = [
        (int(problem.room[j]), problem.cost[:, j].tobytes(), problem.memory[:, j].tobytes(), float(problem.back[j]))
        for j in range(devices)
    ]
    for j in range(2, devices):
        for k in range(j - 1, 0, -1):
            if marks[j] == marks[k] and _alike(problem.hop, j, k):
                twins[j] = k
                break
    return twins


def _alike(hop: Floats, j: int, k: int) -> bool:
    others = np.ones(hop.shape[1], dtype=bool)
    others[[j, k]] = False
    same = np.array_equal(hop[:, j, others], hop[:, k, others]) and np.array_equal(hop[:, others, j], hop[:, others, k])
    return bool(same and np.array_equal(hop[:, j, k], hop[:, k, j]))
