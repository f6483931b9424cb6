"""`peerllm simulate`: a scenario's plan run event by event; how busy everything is and how fast tokens come."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from peerllm.cli.figures import gantt
from peerllm.cli.figures.plan import MALFORMED, OK, Outcome, answer
from peerllm.cli.terminal import human_ms, human_rate, printable, table
from peerllm.errors import BadInputError, InfeasibleError
from peerllm.planner.cost.prediction import lap_of
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.simulator.run_report import SimulatedRun, formula_tokens_per_second
from peerllm.planner.simulator.simulation import simulate
from peerllm.types import Plan, ScheduleName

USAGE = "usage: peerllm simulate SCENARIO.json --plot FILE.svg|FILE.png"
BAR = 24  # characters of a utilisation bar


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run of a scenario's plan, and the rate that the closed formula promises for it."""

    scenario: Scenario
    plan: Plan
    run: SimulatedRun
    formula_tokens_per_second: float

    def hops(self) -> list[tuple[str, str]]:
        """Names of sender and receiver for each link that carries something, in the order of first use."""
        places = [self.scenario.devices[stage.device].name for stage in self.plan.stages]
        return list(dict.fromkeys((a, b) for a, b in zip(places, (*places[1:], places[0]), strict=True) if a != b))


def run(args: argparse.Namespace) -> int:
    """0 simulated, 1 one of the scenarios is infeasible, 2 one is malformed."""
    if args.plot and (wrong := _unplottable(args.plot, len(args.scenarios))):
        print(f"{USAGE}\npeerllm simulate: error: {wrong}", file=sys.stderr)
        return MALFORMED
    if args.plot:
        gantt.require()
    many, code = len(args.scenarios) > 1, OK
    for name in args.scenarios:
        found = answer(name, args.strategy, args.objective)
        done: Simulated | None = None
        if found.scenario and found.plan:
            try:
                done = simulated(found.scenario, found.plan, args.schedule, args.steps)
            except InfeasibleError as error:
                found = replace(found, plan=None, reason=str(error))
            except BadInputError as error:
                found = replace(found, plan=None, error=str(error))
        code = max(code, found.code)
        if args.json or many:
            line = json_line(found, args.schedule, done)
            print(json.dumps({**line, "file": name} if many else line), flush=True)
        elif done:
            print(run_text(found, done))
        else:
            print(f"peerllm: {printable(' '.join((found.error or found.reason or '').split()))}", file=sys.stderr)
        if args.plot and done:
            gantt.draw(done.run, done.scenario, done.plan, args.plot, whole=args.steps is not None)
    return code


def simulated(scenario: Scenario, plan: Plan, schedule: ScheduleName, tokens: int | None = None) -> Simulated:
    """The plan's own micro-batches, each sequence generating `tokens` (the workload's, unless said)."""
    predicted, where = plan.predicted, (scenario.model, scenario.devices, scenario.links, plan.stages)
    done = simulate(
        *where,
        scenario.workload,
        schedule=schedule,
        micro_batch=predicted.micro_batch,
        micro_batches=predicted.micro_batches,
        steps=None if tokens is None else tokens - 1,
        media=scenario.media,
    )
    lap = lap_of(*where, predicted.micro_batch, scenario.media)
    return Simulated(scenario, plan, done, formula_tokens_per_second(lap, schedule, predicted.micro_batches))


def _unplottable(plot: Path, scenarios: int) -> str | None:
    if scenarios > 1:
        return f"--plot draws one scenario, not {scenarios}"
    return None if plot.suffix.lower() in gantt.SUFFIXES else f"{plot} must end in {' or '.join(gantt.SUFFIXES)}"


def json_line(found: Outcome, schedule: ScheduleName, done: Simulated | None) -> dict[str, Any]:
    """The JSON object; without a run its figures are null. Utilisations are shares of the makespan."""
    line: dict[str, Any] = {
        "strategy": found.strategy,
        "objective": found.objective,
        "schedule": schedule,
        "feasible": None if found.error is not None else done is not None,
        "reason": found.reason,
        **_figures(done),
    }
    return line if found.error is None else {**line, "error": found.error}


def _figures(done: Simulated | None) -> dict[str, Any]:
    if done is None:
        empty: dict[str, Any] = {"stages": [], "devices": {}, "links": [], "media": {}}
        return empty | dict.fromkeys(
            ("micro_batch", "micro_batches", "tokens", "makespan_ms", "tokens_per_second", "steady_tokens_per_second",
             "formula_tokens_per_second", "time_to_first_token_ms", "step_ms")
        )  # fmt: skip
    run = done.run
    stages, computing, waited = run.stage_utilisation(), run.utilisation("compute"), run.waiting_ms("compute")
    sending, queued = run.utilisation("transfer"), run.waiting_ms("transfer")
    air, aired = run.utilisation("air"), run.waiting_ms("air")
    return {
        "stages": [
            {"device": done.scenario.devices[s.device].name, "first_layer": s.first_layer, "last_layer": s.last_layer,
             "utilisation": stages[place]}
            for place, s in enumerate(done.plan.stages)
        ],
        "devices": {name: _busy(computing, waited, name) for name in computing},
        "links": [{"from": a, "to": b, **_busy(sending, queued, f"{a} to {b}")} for a, b in done.hops()],
        "media": {name: _busy(air, aired, name) for name in air},
        "micro_batch": run.micro_batch,
        "micro_batches": len(run.returns),
        "tokens": run.tokens,
        "makespan_ms": run.makespan_ms,
        "tokens_per_second": _finite(run.tokens_per_second),
        "steady_tokens_per_second": _finite(run.steady_tokens_per_second),
        "formula_tokens_per_second": _finite(done.formula_tokens_per_second),
        "time_to_first_token_ms": list(run.time_to_first_token_ms),
        "step_ms": run.step_ms,
    }  # fmt: skip


def _busy(shares: Mapping[str, float], waits: Mapping[str, float], name: str) -> dict[str, float]:
    return {"utilisation": shares[name], "mean_wait_ms": waits[name]}


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def run_text(found: Outcome, done: Simulated) -> str:
    """A run for people: a bar for each stage and each link, and the rates."""
    run, devices = done.run, done.scenario.devices
    shares, waits = run.stage_utilisation(), run.waiting_ms("compute")
    rows = [("DEVICE", "LAYERS", "COMPUTING", "", "MEAN WAIT")]
    for place, stage in enumerate(done.plan.stages):
        name, share = devices[stage.device].name, shares[place]
        layers = f"{stage.first_layer}-{stage.last_layer}"
        rows.append((name, layers, bar(share), f"{share:4.0%}", human_ms(waits[name])))
    sending, queued = run.utilisation("transfer"), run.waiting_ms("transfer")
    names = [f"{a} to {b}" for a, b in done.hops()]
    rows += [("LINK", "", "SENDING", "", "")] if names else []
    rows += [(name, "", bar(sending[name]), f"{sending[name]:4.0%}", human_ms(queued[name])) for name in names]
    air, aired = run.utilisation("air"), run.waiting_ms("air")
    rows += [("SHARED MEDIUM", "", "CARRYING", "", "")] if air else []
    rows += [(name, "", bar(share), f"{share:4.0%}", human_ms(aired[name])) for name, share in air.items()]
    count, tokens = len(run.returns) * run.micro_batch, len(run.returns[0])
    groups = f"{len(run.returns)} × {run.micro_batch} sequences, {tokens} tokens each"
    sequences = groups if count > 1 else f"one sequence, {tokens} tokens"
    head = f"{done.scenario.model.name}: {found.strategy}, {found.objective}; {run.schedule}, {sequences}"
    return f"{printable(head)}\n{table(rows)}\n{rates(done)}"


def rates(done: Simulated) -> str:
    run, steady = done.run, done.run.steady_tokens_per_second
    pace = "too few tokens for a steady rate" if steady is None else f"{human_rate(steady)} tokens/s while all decode"
    first = dict.fromkeys(human_ms(pick(run.time_to_first_token_ms)) for pick in (min, max))
    step = "" if run.step_ms is None else f", then one every {human_ms(run.step_ms)}"
    return (
        f"{pace} (formula {human_rate(done.formula_tokens_per_second)}); {human_rate(run.tokens_per_second)} over all: "
        f"{run.tokens} tokens in {human_ms(run.makespan_ms)}.\nFirst tokens after {' to '.join(first)}{step}."
    )


def bar(share: float, width: int = BAR) -> str:
    """How much of the time, in `width` characters; anything above zero shows."""
    full = min(width, max(round(share * width), share > 0))
    return "█" * full + "·" * (width - full)
