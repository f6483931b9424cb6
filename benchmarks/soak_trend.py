"""Does a series grow? The median of all slopes between two samples (Theil-Sen), which single jumps do not move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

# What a series may gain over the watched time, by what is counted: of its median, and at least.
TOLERANCES: Mapping[str, tuple[float, float]] = {
    "memory": (0.005, 1e6),  # bytes
    "tasks": (0.0, 2.0),
    "files": (0.0, 2.0),
    "threads": (0.0, 0.5),
}
Series = Sequence[tuple[float, float]]  # (seconds since the load began, value), rising in time


@dataclass(frozen=True, slots=True)
class Trend:
    """Of one series of one process over the last part of the time."""

    process: str
    counted: str
    level: float  # median
    growth: float  # slope times the watched time
    tolerance: float

    @property
    def grows(self) -> bool:
        return self.growth > self.tolerance


def slope(series: Series) -> float:
    """Per second; 0 for fewer than two samples."""
    slopes = [(b - a) / (then - when) for (when, a), (then, b) in combinations(series, 2) if then > when]
    return median(slopes) if slopes else 0.0


def trend(process: str, counted: str, series: Series) -> Trend:
    """Of the second half of the time: before, caches fill and free lists find their size."""
    start, end = series[0][0], series[-1][0]
    watched = [(when, value) for when, value in series if when >= (start + end) / 2]
    level = median(value for _, value in watched)
    share, least = TOLERANCES[counted]
    growth = slope(watched) * (watched[-1][0] - watched[0][0])
    return Trend(process, counted, level, growth, max(share * level, least))
