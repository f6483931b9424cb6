"""What was predicted against what runs: two to four real devices on this machine, the built-in model.

What goes into a prediction is measured while the others of the machine work: what a batch takes each stage, all told,
and what a frame of requests takes each link, over the seconds before. Nothing is fitted end to end. The prediction is
the simulator's; the measurement that follows is `peerllm bench`'s. Every household is set up ROUNDS times, profiles and
all; medians count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import household

SLOTS, CONTEXT = 8, 512
BUILTIN = Path(__file__).parent.parent / "peerllm" / "builtin" / "model"
TARGET = 0.15
ROUNDS = 3
NAMES = ("anna", "bert", "carla", "dora")


def measure(devices: int, objective: str) -> list[dict[str, Any]]:
    """One household: a row for each number of sequences."""
    names = NAMES[:devices]
    lent = limits(sizes_of(BUILTIN, SLOTS, CONTEXT), devices)
    memory = {name: str(nbytes) for name, nbytes in zip(names, lent, strict=True)}
    pins = {name: ["taskset", "-c", str(place % 2)] for place, name in enumerate(names)} if devices == 2 else None
    with (
        tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory,
        household(Path(directory), names, memory=memory, prefixes=pins) as (source, *_),
    ):
        source.cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT), "--objective", objective)
        stages = source.status()["deployments"][0]["plan"]["stages"]
        assert len({stage["device"] for stage in stages}) == devices, stages
        runs = json.loads(source.cli("bench", "--json").stdout)["runs"]
    return [{"devices": devices, "objective": objective, "stages": len(stages), **run} for run in runs]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: medians over the rounds, and all their ratios."""
    lines = [
        "| devices | sequences | predicted tokens/s | measured | measured / predicted | of each round | within 15 % |",
        "|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows:
        rates = (row[name]["steady_tokens_per_second"] for name in ("predicted", "measured"))
        cases.setdefault((row["devices"], row["sequences"]), []).append(tuple(rates))
    for (devices, sequences), rounds in sorted(cases.items()):
        said, seen = (median(column) for column in zip(*rounds, strict=True))
        ratios = [got / expected for expected, got in rounds]
        ratio, each = median(ratios), ", ".join(f"{one:.2f}" for one in ratios)
        lines.append(
            f"| {devices} | {sequences} | {said:.0f} | {seen:.0f} | {ratio:.2f} | {each} "
            f"| {'yes' if abs(ratio - 1) <= TARGET else 'no'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--objective", choices=("latency", "throughput"), default="throughput")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = [row for _ in range(args.rounds) for devices in args.devices for row in measure(devices, args.objective)]
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
