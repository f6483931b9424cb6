"""How long the planner takes, and how much of what it says is proven, beside the targets it was built for.

One solve at a time in one thread; households are seeded, so that every run asks the same. A gap is the part of the
value that the bound leaves open. `--write` puts the table and the plot of the growth into docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

from benchmarks.edgeshard_testbed import SourceKind
from benchmarks.planner_instances import Instance, all_different, kinds, testbed
from peerllm.errors import InfeasibleError
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.types import Objective, Plan

PLANNERS: dict[Objective, Callable[..., Plan]] = {"latency": plan_latency, "throughput": plan_throughput}
GAP = 0.02  # narrow enough to count
PAGE = Path(__file__).parent.parent / "docs" / "planner.md"
PLOT = PAGE.with_name("planner-growth.png")
GROWTH_DEVICES = (2, 4, 8, 16, 32, 64, 128, 256)  # at GROWTH_DEVICES_LAYERS layers
GROWTH_LAYERS = (10, 18, 34, 66, 130, 258)  # at GROWTH_LAYERS_DEVICES devices
GROWTH_DEVICES_LAYERS, GROWTH_LAYERS_DEVICES, GROWTH_KINDS, GROWTH_SEEDS = 34, 16, 8, 3
GIVE_UP_MS = 10_000.0  # a line ends where its median has come so far

Ask = Callable[[], Instance]


@dataclass(frozen=True, slots=True)
class Case:
    """Households to plan for, and what is expected of every one of them."""

    name: str
    asks: tuple[Ask, ...]
    target_ms: float
    proven: bool = False  # every plan proven optimal
    narrow: float = 0.0  # the part of them whose gap must be at most GAP


@dataclass(frozen=True, slots=True)
class Solve:
    """One household planned once. `gap` is infinite where no plan was found."""

    ms: float
    cpu_ms: float  # of this process: less than `ms` where other work took the core
    optimal: bool
    gap: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    case: str
    objective: str
    target_ms: float
    solves: tuple[Solve, ...]
    holds: bool


@dataclass(frozen=True, slots=True)
class Point:
    """One size of the growth: medians over the seeds."""

    objective: str
    household: str  # "all different" or "8 kinds"
    layers: int
    devices: int
    ms: float
    optimal: bool  # all of them proven
    gap: float  # the widest


def cases(quick: bool) -> list[Case]:
    """The targets; `quick` takes fewer seeds of each."""
    few, many, large = (3, 6, 1) if quick else (12, 50, 5)
    paper = product(get_args(SourceKind), (1.0, 10.0, 1000.0), (1, 8))
    small = tuple(partial(testbed, source, mbps, sequences) for source, mbps, sequences in paper)
    middle = tuple(partial(all_different, 34, 16, seed) for seed in range(few))
    wide = tuple(partial(all_different, 82, 32, seed) for seed in range(many))
    huge = tuple(partial(kinds, 128, 256, 8, seed) for seed in range(large))
    return [
        Case("34 × 15, the paper's testbed", small, 100),
        Case("34 × 16, all different", middle, 10_000, proven=True),
        Case("82 × 32, all different", wide, 2_000, narrow=0.9),
        Case("128 × 256, 8 kinds", huge, 10_000),
    ]


def solve(objective: Objective, asked: Instance) -> Solve:
    """Plan once, on the clock."""
    started, burnt = time.perf_counter(), time.process_time()
    try:
        plan: Plan | None = PLANNERS[objective](*asked)
    except InfeasibleError:
        plan = None
    ms, cpu_ms = 1000 * (time.perf_counter() - started), 1000 * (time.process_time() - burnt)
    if plan is None:
        return Solve(ms, cpu_ms, False, float("inf"))
    did = plan.predicted.request_ms if objective == "latency" else plan.predicted.tokens_per_second
    return Solve(ms, cpu_ms, plan.optimal, abs(did - plan.bound) / max(did, plan.bound))


def measured(case: Case, objective: Objective) -> Row:
    """All of a case, and whether what was expected of it holds."""
    solves = tuple(solve(objective, ask()) for ask in case.asks)
    narrow = sum(one.gap <= GAP for one in solves)
    holds = all(one.ms <= case.target_ms and one.gap < 1 and one.optimal >= case.proven for one in solves)
    return Row(case.name, objective, case.target_ms, solves, holds and narrow >= case.narrow * len(solves))


def growth() -> list[Point]:
    """Over devices, then over layers; both objectives, all different and of a few kinds."""
    points: list[Point] = []
    along = (
        [(GROWTH_DEVICES_LAYERS, devices) for devices in GROWTH_DEVICES],
        [(layers, GROWTH_LAYERS_DEVICES) for layers in GROWTH_LAYERS],
    )
    for objective, sizes, few in product(get_args(Objective), along, (False, True)):
        for layers, devices in sizes:
            many = min(GROWTH_KINDS, devices) if few else devices
            solves = [solve(objective, kinds(layers, devices, many, seed)) for seed in range(GROWTH_SEEDS)]
            ms = statistics.median(one.ms for one in solves)
            household = f"{GROWTH_KINDS} kinds" if few else "all different"
            optimal, gap = all(one.optimal for one in solves), max(one.gap for one in solves)
            points.append(Point(objective, household, layers, devices, ms, optimal, gap))
            print(f"{layers} × {devices}, {household}, {objective}: {ms:.0f} ms", file=sys.stderr, flush=True)
            if ms > GIVE_UP_MS:
                break  # the sizes only grow
    return points


def table(rows: Sequence[Row]) -> str:
    """Markdown, as it stands in docs/planner.md."""
    lines = [
        "| layers × devices | objective | households | median, ms | longest, ms (its CPU time) | target, ms "
        "| proven optimal | gap ≤ 2 % | widest gap | holds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        longest, many = max(row.solves, key=lambda one: one.ms), len(row.solves)
        narrow, widest = sum(one.gap <= GAP for one in row.solves), max(one.gap for one in row.solves)
        median = statistics.median(one.ms for one in row.solves)
        lines.append(
            f"| {row.case} | {row.objective} | {many} | {median:.0f} | {longest.ms:.0f} ({longest.cpu_ms:.0f}) "
            f"| {row.target_ms:.0f} | {sum(one.optimal for one in row.solves)} | {narrow} | {100 * widest:.1f} % "
            f"| {'yes' if row.holds else '**no**'} |"
        )
    return "\n".join(lines)


def write(rows: Sequence[Row], points: Sequence[Point]) -> None:
    """Put the table between its marks on the page, and draw the growth beside it."""
    from benchmarks.planner_plots import draw

    text, marks = PAGE.read_text(), re.compile(r"(<!-- solve times -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(text):
        raise RuntimeError(f"{PAGE} has no place for the solve times")
    PAGE.write_text(marks.sub(lambda mark: f"{mark[1]}{table(rows)}\n{mark[2]}", text))
    draw(points, PLOT)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--json` the rows, and with `--write` the points of the growth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds of each case")
    parser.add_argument("--write", action="store_true", help="put table and plot into docs/planner.md")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    for objective in PLANNERS:
        solve(objective, testbed())  # whatever is done once is not timed
    rows = [measured(case, objective) for case in cases(options.quick) for objective in get_args(Objective)]
    points = growth() if options.write else []
    if options.write:
        write(rows, points)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "growth": [asdict(point) for point in points]}))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
