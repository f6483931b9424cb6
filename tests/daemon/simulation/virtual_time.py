"""Time that passes from event to event, and the paths between devices, which can be cut, stalled and reset."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

Call = Callable[[], None]
MOST_EVENTS = 200_000  # of one history; more is something that never rests


class VirtualTime:
    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Call]] = []
        self._numbers = count()

    def at(self, when: float, call: Call) -> None:
        heapq.heappush(self._due, (max(when, self.now), next(self._numbers), call))

    def after(self, seconds: float, call: Call) -> None:
        self.at(self.now + seconds, call)

    def run(self, until: float, ended: Callable[[], bool] = lambda: False) -> None:
        for _ in range(MOST_EVENTS):
            if not self._due or self._due[0][0] > until or ended():
                return
            self.now, _, call = heapq.heappop(self._due)
            call()
        raise AssertionError(f"{MOST_EVENTS} events and no end")


@dataclass
class Machine:
    """A device's process, which may stand still or be dead; `born` counts its lives."""

    name: str
    alive: bool = True
    frozen: bool = False
    born: int = 0
    _waiting: list[Call] = field(default_factory=list)

    def do(self, call: Call) -> None:
        """Now, or when it no longer stands still; never if it dies."""
        if self.frozen:
            self._waiting.append(call)
        elif self.alive:
            call()

    def thaw(self) -> None:
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        for number, call in enumerate(waiting):
            if self.frozen:  # one of them froze it again
                self._waiting = waiting[number:] + self._waiting
                return
            if self.alive:
                call()

    def die(self) -> None:
        self.alive = self.frozen = False
        self._waiting.clear()


class Paths:
    """Messages in order on each connection. What is sent over a cut path arrives when it is mended, as TCP has it."""

    def __init__(self, time: VirtualTime, random: Random, machines: dict[str, Machine]) -> None:
        self._time, self._random, self._machines = time, random, machines
        self._cut: set[tuple[str, str]] = set()
        self._resets: dict[frozenset[str], int] = {}
        self._stalled: dict[tuple[str, str], list[Call]] = {}
        self._last: dict[tuple[str, str, str], float] = {}
        self.slow: dict[str, float] = {}  # devices that answer later, by how much

    def open(self, a: str, b: str) -> bool:
        """Whether both hear each other."""
        return (a, b) not in self._cut and (b, a) not in self._cut

    def cut(self, a: str, b: str) -> None:
        self._cut.add((a, b))

    def mend(self, a: str, b: str) -> None:
        """In that direction; what was sent meanwhile arrives."""
        self._cut.discard((a, b))
        for call in self._stalled.pop((a, b), []):
            call()

    def reset(self, a: str, b: str) -> None:
        """All connections between them break; what is on its way is lost."""
        pair = frozenset((a, b))
        self._resets[pair] = self._resets.get(pair, 0) + 1
        self._stalled.pop((a, b), None)
        self._stalled.pop((b, a), None)

    def resets(self, a: str, b: str) -> int:
        return self._resets.get(frozenset((a, b)), 0)

    def send(self, a: str, b: str, call: Call, channel: str = "control", later_s: float = 0.0) -> None:
        """Have it called on b, after what was sent on this channel before; never if the connection breaks first."""
        lives, resets = (self._machines[a].born, self._machines[b].born), self.resets(a, b)
        delay = 0.0005 if a == b else self._random.choice((0.002, 0.005, 0.02)) + self.slow.get(b, 0.0)
        delay += later_s
        due = max(self._time.now + delay, self._last.get((a, b, channel), 0.0))
        self._last[a, b, channel] = due

        def arrive() -> None:
            if (self._machines[a].born, self._machines[b].born) != lives or self.resets(a, b) != resets:
                return
            if (a, b) in self._cut:
                self._stalled.setdefault((a, b), []).append(arrive)
            else:
                self._machines[b].do(call)

        self._time.at(due, arrive)
