"""`peerllm bench`: what a served model does now, beside what was predicted of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from peerllm.cli.device import LocalDevice
from peerllm.cli.figures.trace import recording, writable
from peerllm.cli.figures.trace import text as trace_text
from peerllm.cli.served import served_here
from peerllm.cli.terminal import human_ms, human_rate, printable, table
from peerllm.planner.cost.prediction import lap_of
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.simulator.run_report import formula_tokens_per_second
from peerllm.planner.simulator.simulation import simulate
from peerllm.types import ScheduleName, Stage, Workload, batches_of, chunk_of

DRAWS = 5  # runs of the simulator that are averaged where passes vary
NO_SPREADS: Mapping[str, Mapping[str, float]] = {}
ROUNDS = 3  # of each number of sequences; the median counts
WARM_S = 4.5  # of load before each prediction: what links take under it, every device has told by then
BENCH_TIMEOUT_S = 600.0


def run(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    model = served_here(device, args.model)
    if args.trace:
        writable(args.trace)  # said now, not after minutes of measuring
    planned = _planned(device, model)
    work = parse(planned["scenario"]).workload
    stages = tuple(Stage(one["device"], one["first_layer"], one["last_layer"]) for one in planned["stages"])
    prompt = args.prompt_tokens or min(work.prompt_tokens, work.context // 2)
    output = args.output_tokens or min(64, work.context - prompt)
    counts = [args.sequences] if args.sequences else _counts(work.sequences)
    rows = []
    for count in tqdm(counts, desc="sequences", disable=not sys.stderr.isatty(), leave=False):
        body = {"model": model, "sequences": count, "prompt_tokens": prompt, "output_tokens": output,
                "apart": args.apart}  # fmt: skip
        warm = time.monotonic() + WARM_S
        while device.post("/peerllm/v1/bench", body, BENCH_TIMEOUT_S) and time.monotonic() < warm:
            pass
        said, rounds = [], []
        for _ in range(ROUNDS):  # each predicted from what was seen before it: a machine's other work comes and goes
            planned = _planned(device, model)
            how = stages, *divided(planned, count), prompt, output, chunk_of(planned["cuts"], prompt)
            one = predicted(parse(planned["running"]), *how, planned["spreads"])
            if args.apart:  # what is simulated begins at once
                one["predicted"]["time_to_first_token_ms"] = None
            profiled = predicted(parse(planned["scenario"]), *how)["predicted"]["formula_tokens_per_second"]
            said.append({**one, "profiled": {"formula_tokens_per_second": profiled}})
            rounds.append(device.post("/peerllm/v1/bench", body, BENCH_TIMEOUT_S))
        said.sort(key=lambda one: one["predicted"]["formula_tokens_per_second"])
        rows.append({**said[ROUNDS // 2], "measured": _median(rounds)})
    if args.trace:  # a round of its own: what is measured is not recorded
        with recording(device, model, args.trace) as trace:
            device.post("/peerllm/v1/bench", body, BENCH_TIMEOUT_S)
        print(trace_text(args.trace, trace), file=sys.stderr)
    if args.json:
        print(json.dumps({"model": model, "prompt_tokens": prompt, "output_tokens": output,
                          "apart": args.apart, "runs": rows}))  # fmt: skip
    else:
        print(text(model, prompt, output, rows, args.apart))


def _planned(device: LocalDevice, model: str) -> Any:
    return device.get(f"/peerllm/v1/scenario?model={quote(model, safe='')}")


def divided(planned: Mapping[str, Any], sequences: int) -> tuple[ScheduleName, int, int]:
    """(schedule, sequences, batches): how a deployment divides so many sequences."""
    schedule: ScheduleName = planned["schedule"]
    if schedule == "sequential":
        return schedule, sequences, sequences
    return schedule, sequences, batches_of(sequences, int(planned["micro_batch"]), int(planned["micro_batches"]))


def predicted(
    scenario: Scenario,
    stages: Sequence[Stage],
    schedule: ScheduleName,
    sequences: int,
    batches: int,
    prompt: int,
    output: int,
    chunk: int | None = None,
    spreads: Mapping[str, Mapping[str, float]] = NO_SPREADS,
) -> dict[str, Any]:
    """By the simulator, event by event, and by EdgeShard's closed formula, for so many sequences at once.

    Where batches cannot be equal all take as long as the largest. `spreads`: by stage and batch, how far passes vary.
    """
    old = scenario.workload
    work = Workload(prompt, output, sequences, old.context, old.objective, chunk)
    batch = -(-sequences // batches)
    spread = {int(place): told[str(batch)] for place, told in spreads.items() if str(batch) in told}
    known = scenario.model, scenario.devices, scenario.links, tuple(stages)
    runs = [
        simulate(*known, work, schedule=schedule, micro_batch=batch, micro_batches=batches, media=scenario.media,
                 spread=spread, seed=seed)
        for seed in range(DRAWS if spread else 1)
    ]  # fmt: skip
    lap = lap_of(*known, batch, scenario.media)
    share = sequences / (batch * batches)
    steady = [run.steady_tokens_per_second for run in runs if run.steady_tokens_per_second is not None]
    steps = [run.step_ms for run in runs if run.step_ms is not None]
    return {
        "sequences": sequences,
        "predicted": {
            "time_to_first_token_ms": fmean(fmean(run.time_to_first_token_ms) for run in runs),
            "step_ms": fmean(steps) if steps else None,
            "steady_tokens_per_second": share * fmean(steady) if steady else None,
            "formula_tokens_per_second": share * formula_tokens_per_second(lap, schedule, batches),
            "bottleneck": lap.bottleneck,
        },
    }


def text(model: str, prompt: int, output: int, rows: Sequence[Mapping[str, Any]], apart: bool = False) -> str:
    """Prediction beside measurement, a line for each number of sequences."""
    head = [("SEQUENCES", "FIRST TOKEN", "", "A STEP", "", "TOKENS/S", "", "RATIO")]
    head.append(("", "predicted", "measured", "predicted", "measured", "predicted", "measured", ""))
    for one in rows:
        said, seen = one["predicted"], one["measured"]
        rate, got = said["steady_tokens_per_second"], seen["steady_tokens_per_second"]
        head.append((
            str(one["sequences"]), _first(said["time_to_first_token_ms"]), human_ms(seen["time_to_first_token_ms"]),
            human_ms(said["step_ms"]), human_ms(seen["step_ms"]), "" if rate is None else human_rate(rate),
            "" if got is None else human_rate(got), "" if None in (rate, got) else f"{got / rate:.2f}",
        ))  # fmt: skip
    begun = ", begun one after another" if apart else ""
    title = f"{printable(model)}: prompts of {prompt} tokens, answers of {output}{begun}, median of {ROUNDS}"
    return f"{title}\n{table(head)}\nRATIO is measured over predicted tokens/s."


def _median(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = [one["steady_tokens_per_second"] for one in rounds if one["steady_tokens_per_second"] is not None]
    steps = [fmean(one["step_ms"]) for one in rounds if one["step_ms"]]
    return {
        "time_to_first_token_ms": median(fmean(one["time_to_first_token_ms"]) for one in rounds),
        "step_ms": median(steps) if steps else 0.0,
        "tokens_per_second": median(one["tokens_per_second"] for one in rounds),
        "steady_tokens_per_second": median(rates) if rates else None,
    }


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def _first(value: float | None) -> str:
    return "" if value is None else human_ms(value)
