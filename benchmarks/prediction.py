"""What a plan predicts for one sequence, its first token and a step, against what comes: one to three real devices.

The prediction is the plan's own, made from the layers' times and the links before anything is loaded; nothing is fitted
to what came. Two devices have a core each, three share both. Every household is set up anew in each round, its layer
times and all; medians count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.models import LLAMA_3_2_1B, write_llama
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import household
from tests.lab.smollm2 import smollm2

SLOTS, CONTEXT = 4, 2048
TARGET = 0.15
ROUNDS = 3
NAMES = ("anna", "bert", "carla")


class Row(NamedTuple):
    """One household's milliseconds, predicted and measured."""

    model: str
    devices: int
    prompt: int
    first: tuple[float, float]
    step: tuple[float, float]


def measure(name: str, model: Path, devices: int) -> Row:
    """One household, set up for this."""
    names = NAMES[:devices]
    lent = limits(sizes_of(model, SLOTS, CONTEXT), devices)
    memory = {device: str(nbytes) for device, nbytes in zip(names, lent, strict=True)}
    pins = {device: ["taskset", "-c", str(core)] for core, device in enumerate(names)} if devices < 3 else None
    with (
        tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory,
        household(Path(directory), names, memory=memory, prefixes=pins) as (source, *_),
    ):
        source.cli("run", str(model), "--slots", str(SLOTS), "--context", str(CONTEXT))
        plan = source.status()["deployments"][0]["plan"]
        assert len({stage["device"] for stage in plan["stages"]}) == devices, plan
        bench = json.loads(source.cli("bench", "--json", "--sequences", "1").stdout)
    said, seen = plan["predicted"], bench["runs"][0]["measured"]
    keys = ("time_to_first_token_ms", "step_ms")
    first, step = ((said[key], seen[key]) for key in keys)
    return Row(name, devices, bench["prompt_tokens"], first, step)


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians over the rounds, and the ratios of each."""
    lines = [
        "| model | devices | first token, ms: predicted | measured | ratio | of each round "
        "| a step, ms: predicted | measured | ratio | of each round | both within 15 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, devices in dict.fromkeys((row.model, row.devices) for row in rows):
        some = [row for row in rows if (row.model, row.devices) == (model, devices)]
        cells, ratios = "", []
        for pairs in ([row.first for row in some], [row.step for row in some]):
            each = [seen / said for said, seen in pairs]
            said, seen = (median(column) for column in zip(*pairs, strict=True))
            ratios.append(median(each))
            cells += f" {said:.3g} | {seen:.3g} | {ratios[-1]:.2f} | {', '.join(f'{one:.2f}' for one in each)} |"
        within = all(abs(ratio - 1) <= TARGET for ratio in ratios)
        lines.append(f"| {model} | {devices} |{cells} {'yes' if within else 'no'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=("smollm2", "llama"), default=["smollm2", "llama"])
    parser.add_argument("--llama", type=Path, default=Path(tempfile.gettempdir()) / "peerllm-llama-3.2-1b",
                        help="where the model of 1.24 B random parameters lies, or is written")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    found = {"smollm2": smollm2, "llama": lambda: write_llama(args.llama, LLAMA_3_2_1B)}
    models = {name: found[name]() for name in args.models}
    rows = [
        measure(name, model, devices)
        for _ in range(args.rounds)
        for name, model in models.items()
        for devices in args.devices
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
