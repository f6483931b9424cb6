"""Which device or link of the running plan has become slower or faster for good, told from noise. Sans-I/O.

A change is one against the running plan's own beginning; `beginning` tells how that was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

from peerllm.planner.cost.layer_costs import Links, hop_ms
from peerllm.planner.cost.observed_times import Points
from peerllm.types import DeviceId, Plan

EVERY_S = 2.0  # seconds between two looks
FIRST = 3  # looks whose median is what later ones are compared with
AGREEING = 3  # looks one after another that must say the same
CHANGED = 1.5  # times as long, or as short
SLIGHT_MS = 2.0  # a link whose hop changed by less matters to nobody

Key = DeviceId | tuple[DeviceId, DeviceId]


class ConditionsWatch:
    """Compares what an epoch's devices and links take with what they took at its beginning, every EVERY_S."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._first: dict[tuple[Key, int, int], list[float]] = {}  # (whose, stage, batch): milliseconds at first
        self._ratios: dict[Key, deque[float]] = {}
        self._last: dict[Key, object] = {}

    def devices(self, paces: Mapping[int, Points]) -> dict[DeviceId, float]:
        """The devices that changed, and how many times as long passes take. `paces`: ms by stage and batch size."""
        result = {}
        for device in self._plan.devices:
            places = [i for i, stage in enumerate(self._plan.stages) if stage.device == device and i in paces]
            told = {(place, size): ms for place in places for size, ms in paces[place]}
            if told and told != self._last.get(device):  # else nothing was computed since
                self._last[device] = told
                changed = self._changed(device, told)
                if changed is not None:
                    result[device] = changed
        return result

    def beginning(self) -> dict[int, Points]:
        """What batches took at each stage at first; empty until FIRST looks saw one at every stage."""
        result = dict[int, Points]()
        for place, stage in enumerate(self._plan.stages):
            whole = {n: ms for (key, at, n), ms in self._first.items() if (key, at) == (stage.device, place)}
            points = tuple((n, median(ms)) for n, ms in sorted(whole.items()) if len(ms) == FIRST)
            if not points:
                return {}
            result[place] = points
        return result

    def links(self, now: Links, nbytes: float) -> dict[tuple[DeviceId, DeviceId], float]:
        """The hops of the plan that changed, and how many times as long `nbytes` bytes take there."""
        result = {}
        stages = self._plan.stages
        for place, stage in enumerate(stages):
            after = stages[(place + 1) % len(stages)].device
            if stage.device == after or (stage.device, after) not in now:
                continue
            pair = stage.device, after
            changed = self._changed(pair, {(0, 0): hop_ms(now, *pair, nbytes)}, SLIGHT_MS)
            if changed is not None:
                result[pair] = changed
        return result

    def _changed(self, key: Key, told: Mapping[tuple[int, int], float], least_ms: float = 0.0) -> float | None:
        """How many times as long it takes, once AGREEING looks say so; later looks are compared with these."""
        ratios = []
        for (place, size), ms in told.items():
            first = self._first.setdefault((key, place, size), [])
            if len(first) < FIRST:
                first.append(ms)
            elif (before := median(first)) > 0 and abs(ms - before) >= least_ms:
                ratios.append(ms / before)
            else:
                ratios.append(1.0)
        if not ratios:
            return None
        seen = self._ratios.setdefault(key, deque(maxlen=AGREEING))
        seen.append(median(ratios))
        if len(seen) < AGREEING or not (min(seen) >= CHANGED or max(seen) <= 1 / CHANGED):
            return None
        times = median(seen)
        seen.clear()
        for (place, size), ms in told.items():
            self._first[key, place, size] = [ms] * FIRST
        return times
