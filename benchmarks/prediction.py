"""What was predicted against what runs: two to four real devices on this machine, the built-in model.

Layer times are measured by the devices' own engines, for several sequences while the others of the machine work; links
by the devices too. Nothing is fitted. The prediction is the simulator's; the measurement is `peerllm bench`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerllm.cli.demo_memory import limits, sizes_of
from tests.household import household

SLOTS, CONTEXT = 8, 512
BUILTIN = Path(__file__).parent.parent / "peerllm" / "builtin" / "model"
FLOAT32_BYTES = 4  # the built-in model computes in float32 whatever its file holds
TARGET = 0.15
NAMES = ("anna", "bert", "carla", "dora")


def measure(devices: int, objective: str) -> list[dict[str, Any]]:
    """One household: a row for each number of sequences."""
    names = NAMES[:devices]
    lent = limits(sizes_of(BUILTIN, SLOTS, CONTEXT, FLOAT32_BYTES), devices)
    memory = {name: str(nbytes) for name, nbytes in zip(names, lent, strict=True)}
    pins = {name: ["taskset", "-c", str(place % 2)] for place, name in enumerate(names)} if devices == 2 else None
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        with household(Path(directory), names, memory=memory, prefixes=pins) as (source, *_):
            source.cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT), "--objective", objective)
            stages = source.status()["deployments"][0]["plan"]["stages"]
            assert len({stage["device"] for stage in stages}) == devices, stages
            runs = json.loads(source.cli("bench", "--json").stdout)["runs"]
    return [{"devices": devices, "objective": objective, "stages": len(stages), **run} for run in runs]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| devices | objective | sequences | predicted tokens/s | measured | measured / predicted | within 15 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said, seen = row["predicted"]["steady_tokens_per_second"], row["measured"]["steady_tokens_per_second"]
        ratio = seen / said
        lines.append(
            f"| {row['devices']} | {row['objective']} | {row['sequences']} | {said:.1f} | {seen:.1f} | {ratio:.2f} "
            f"| {'yes' if abs(ratio - 1) <= TARGET else 'no'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--objective", choices=("latency", "throughput"), default="throughput")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = [row for devices in args.devices for row in measure(devices, args.objective)]
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
