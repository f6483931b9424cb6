"""EdgeShard's evaluation, planned again: its testbed, strategies and models, ours beside the published figures.

`python -m benchmarks.edgeshard_paper` prints the tables and whether each published finding holds; `--write` puts them
into docs/edgeshard.md and draws its plots; `--json` prints everything as data.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

from benchmarks.edgeshard_testbed import (
    CLOUD,
    CLOUD_MBPS,
    GIB,
    IMPLIED_SLOPE,
    KINDS,
    MODELS,
    OUTPUT,
    PUBLISHED,
    PUBLISHED_NO_BUBBLE_GAIN,
    SEQUENCES,
    STRATEGIES,
    SourceKind,
    scenario,
)
from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import stage_bytes
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.simulator.simulation import simulate
from peerllm.planner.strategies.strategy_plan import plan
from peerllm.types import Objective, Plan, ScheduleName

PAGE = Path(__file__).parents[1] / "docs" / "edgeshard.md"
OURS = (*STRATEGIES, "edgeshard-even", "edgeshard-paper")
SWEEP_MBPS = (1, 2, 5, 10, 20, 30, 40, 50)
SWEPT = ("Llama2-7B", "Llama2-13B")
SMALL, MIDDLE, LARGE = MODELS
SIMULATED_STEPS = 400
EQUAL = 0.02  # relative: figures closer than this count as the same
LITTLE = 0.10  # a gain below this is little


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy's two plans; None where nothing fits, and then `reason` says why."""

    ms_per_token: float | None = None
    step_ms: float | None = None  # of it, one lap after the prompt
    latency_plan: str = ""
    tokens_per_second: float | None = None
    sequences: int = 0  # in flight, at most SEQUENCES and as memory allows
    micro_batch: int = 0
    micro_batches: int = 0
    bottleneck: str = ""
    throughput_plan: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Schedules:
    """One plan in the simulator: tokens per second with and without waiting for the round."""

    micro_batch: int
    micro_batches: int
    bubble: float
    no_bubble: float
    best_bubble: float  # with the micro-batches that suit bubbles best
    best_micro_batch: int
    best_micro_batches: int

    @property
    def gain(self) -> float:
        return self.no_bubble - self.bubble


@dataclass(frozen=True, slots=True)
class Finding:
    """What the paper says, and what came out here."""

    text: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Results:
    """All that the page shows, by model and strategy."""

    main: Mapping[str, Mapping[str, Cell]]
    batches: Mapping[str, Mapping[str, Cell]]  # each further sequence costing IMPLIED_SLOPE
    nx: Mapping[str, Mapping[str, Cell]]
    sweep: Mapping[str, Mapping[int, Mapping[str, Cell]]]  # model, Mbps, strategy
    bubbles: Mapping[str, Mapping[str, Schedules]]  # model, strategy
    findings: Sequence[Finding]


def words(found: Plan) -> str:
    """A plan in one line."""
    return ", ".join(f"{stage.device} {stage.first_layer}–{stage.last_layer}" for stage in found.stages)


@cache
def planned(
    name: str,
    strategy: str,
    objective: Objective,
    source: SourceKind = "agx",
    mbps: float = CLOUD_MBPS,
    slope: float = 0.0,
) -> tuple[Scenario, Plan]:
    """The strategy's plan: one sequence for latency, the best number of them for throughput."""
    best: tuple[Scenario, Plan] | None = None
    trouble: InfeasibleError | None = None
    for sequences in (1,) if objective == "latency" else range(1, SEQUENCES + 1):
        problem = scenario(name, source=source, mbps=mbps, sequences=sequences, slope=slope)
        try:
            found = plan(problem, strategy, objective)
        except InfeasibleError as error:
            trouble = trouble or error
            break  # more sequences need more memory
        if best is None or found.predicted.tokens_per_second > best[1].predicted.tokens_per_second:
            best = problem, found
    if best is None:
        assert trouble is not None
        raise trouble
    return best


def cell(name: str, strategy: str, *, source: SourceKind = "agx", mbps: float = CLOUD_MBPS, slope: float = 0.0) -> Cell:
    """Both objectives of one strategy."""
    try:
        _, quick = planned(name, strategy, "latency", source, mbps)
        problem, busy = planned(name, strategy, "throughput", source, mbps, slope)
    except InfeasibleError as error:
        return Cell(reason=str(error))
    return Cell(
        quick.predicted.request_ms / OUTPUT,
        quick.predicted.step_ms,
        words(quick),
        busy.predicted.tokens_per_second,
        problem.workload.sequences,
        busy.predicted.micro_batch,
        busy.predicted.micro_batches,
        busy.predicted.bottleneck,
        words(busy),
    )


def schedules(name: str, strategy: str, mbps: float = CLOUD_MBPS) -> Schedules:
    """The throughput plan run as events, its own micro-batches, decoding only."""
    problem, found = planned(name, strategy, "throughput", "agx", mbps)
    b, m = found.predicted.micro_batch, found.predicted.micro_batches

    def rate(schedule: ScheduleName, size: int, many: int) -> float:
        run = simulate(
            problem.model, problem.devices, problem.links, found.stages, problem.workload, schedule=schedule,
            micro_batch=size, micro_batches=many, steps=SIMULATED_STEPS, prefill=False,
        )  # fmt: skip
        return run.tokens_per_second

    flight = problem.workload.sequences
    tried = [(rate("bubble", size, many), size, many) for size in range(1, flight + 1) for many in {1, flight // size}]
    return Schedules(b, m, rate("bubble", b, m), rate("no-bubble", b, m), *max(tried))


def results() -> Results:
    """Plan and simulate everything: some minutes on one core."""
    main = {name: {strategy: cell(name, strategy) for strategy in OURS} for name in MODELS}
    batches = {name: {strategy: cell(name, strategy, slope=IMPLIED_SLOPE) for strategy in OURS} for name in MODELS}
    nx = {name: {strategy: cell(name, strategy, source="nx") for strategy in STRATEGIES} for name in MODELS}
    sweep = {
        name: {mbps: {strategy: cell(name, strategy, mbps=mbps) for strategy in STRATEGIES} for mbps in SWEEP_MBPS}
        for name in SWEPT
    }
    bubbles = {name: {s: schedules(name, s) for s in STRATEGIES if main[name][s].tokens_per_second} for name in MODELS}
    findings = [
        *saturation(sweep), *thirteen(sweep), *seventy(main), *nx_source(main, nx), *no_bubbles(bubbles),
    ]  # fmt: skip
    return Results(main, batches, nx, sweep, bubbles, findings)


def ms(found: Cell) -> float:
    return float("inf") if found.ms_per_token is None else found.ms_per_token


def rate(found: Cell) -> float:
    return found.tokens_per_second or 0.0


def saturation(sweep: Mapping[str, Mapping[int, Mapping[str, Cell]]]) -> list[Finding]:
    """Over the bandwidth between source and cloud."""
    still = {
        (name, strategy): 1 - ms(by[50][strategy]) / ms(by[10][strategy])
        for name, by in sweep.items()
        for strategy in STRATEGIES
        if by[10][strategy].ms_per_token
    }
    early = "; ".join(f"{name} {', '.join(f'{ms(by[m][OURS[3]]):.1f} at {m}' for m in (1, 10, 50))}"
                      for name, by in sweep.items())  # fmt: skip
    late = ", ".join(f"{strategy} on {name} ({gain:.0%})" for (name, strategy), gain in still.items() if gain > LITTLE)
    apart = {
        name: {mbps: ms(at["cloud-edge-opt"]) / ms(at["edgeshard"]) - 1 for mbps, at in by.items()}
        for name, by in sweep.items()
    }
    equal = {name: next((m for m, gap in by.items() if gap <= EQUAL), None) for name, by in apart.items()}
    more = "; ".join(
        f"{name} {by[10]:.0%} at 10 Mbps, {by[50]:.1%} at 50"
        + (f" (within {EQUAL:.0%} from {equal[name]} Mbps)" if equal[name] else "")
        for name, by in apart.items()
    )
    return [
        Finding("EdgeShard's latency is saturated at 10 Mbps",
                all(gain <= LITTLE for (_, strategy), gain in still.items() if strategy == "edgeshard"),
                f"ms/token by Mbps: {early}: it goes round the slow link from the start"),
        Finding("So is that of the other strategies", not late, f"more than {LITTLE:.0%} less at 50 Mbps than at 10: "
                + (late or "none")),
        Finding("From 10 Mbps on, Cloud-Edge-Opt is as quick as EdgeShard",
                all(by[m] <= EQUAL for by in apart.values() for m in by if m >= 10),
                f"Cloud-Edge-Opt takes more: {more}"),
    ]  # fmt: skip


def shares(problem: Scenario, found: Plan) -> dict[str, float]:
    """Weights and KV of a plan, as a share of each device's memory."""
    used: dict[str, int] = {}
    for stage, nbytes in zip(found.stages, stage_bytes(problem.model, found.stages, problem.workload), strict=True):
        used[stage.device] = used.get(stage.device, 0) + nbytes
    return {device: nbytes / problem.devices[device].memory_bytes for device, nbytes in used.items()}


def most_sequences(name: str, strategy: str, mbps: float, working_gib: float = 0.0) -> int:
    """How many fit at once, whatever their rate, with some of each device's memory set aside."""
    for sequences in count(1):
        problem = scenario(name, mbps=mbps, sequences=sequences)
        aside = int(working_gib * GIB)
        less = {d: replace(one, memory_bytes=one.memory_bytes - aside) for d, one in problem.devices.items()}
        try:
            plan(replace(problem, devices=less), strategy, "latency")
        except InfeasibleError:
            return sequences - 1
    raise AssertionError("unreachable")


def thirteen(sweep: Mapping[str, Mapping[int, Mapping[str, Cell]]]) -> list[Finding]:
    """13B at 10 Mbps."""
    pair, all_ = sweep[MIDDLE][10]["cloud-edge-opt"], sweep[MIDDLE][10]["edgeshard"]
    full = shares(*planned(MIDDLE, "cloud-edge-opt", "throughput", "agx", 10))
    most = most_sequences(MIDDLE, "cloud-edge-opt", 10)
    aside = next(tenth / 10 for tenth in count(1) if most_sequences(MIDDLE, "cloud-edge-opt", 10, tenth / 10) <= 4)
    memory = " and ".join(f"{share:.0%} of {device}" for device, share in full.items())
    return [
        Finding("13B at 10 Mbps: throughput still favours EdgeShard", rate(all_) > rate(pair),
                f"{rate(all_):.1f} against {rate(pair):.1f} tokens/s"),
        Finding("That is because two nearly full devices (95 and 98 %) allow a batch of 4 at most", most <= 4,
                f"weights and KV take {memory} with {pair.sequences} sequences, and {most} would fit; "
                f"4 at most if {aside:.1f} GiB of each device were working space"),
    ]  # fmt: skip


def seventy(main: Mapping[str, Mapping[str, Cell]]) -> list[Finding]:
    """What 70B takes."""
    problem, quick = planned(LARGE, "edgeshard", "latency")
    boards = [device for device in quick.devices if device.startswith("agx")]
    each = (KINDS["agx"].usable_gib * GIB) // problem.model.layers[1].memory_bytes
    needed = 7 * problem.model.layers[1].memory_bytes / GIB, 8 * problem.model.layers[1].memory_bytes / GIB
    others = ", ".join(device for device in quick.devices if device not in boards)
    takes = f"{len(boards)} AGX and the {others}: {each} blocks fit on an AGX"
    published = [*sorted(device for device in problem.devices if device.startswith("agx"))[:11], CLOUD]
    gains = {}
    for objective in ("latency", "throughput"):
        ours, whole = planned(LARGE, "edgeshard", objective)[1].predicted, planned(LARGE, "edgeshard", objective)[0]
        few = Scenario(whole.model, {d: whole.devices[d] for d in published}, whole.links, whole.source, CLOUD,
                       whole.workload)  # fmt: skip
        even = plan(few, "even", objective).predicted
        gains[objective] = (even.request_ms / ours.request_ms if objective == "latency"
                            else ours.tokens_per_second / even.tokens_per_second) - 1  # fmt: skip
    return [
        Finding("70B takes 11 AGX and the 3090", len(boards) == 11 and CLOUD in quick.devices,
                f"the quickest plan takes {takes}; 11 are needed if an AGX has {needed[0]:.1f} to {needed[1]:.1f} GiB"),
        Finding("70B gains little over EdgeShard-Even", max(gains.values()) <= LITTLE,
                f"over an even split among 11 AGX and the 3090: {gains['latency']:.1%} in latency, "
                f"{gains['throughput']:.1%} in throughput"),
    ]  # fmt: skip


def nx_source(main: Mapping[str, Mapping[str, Cell]], nx: Mapping[str, Mapping[str, Cell]]) -> list[Finding]:
    """An Orin NX instead of an AGX as the source, at the main table's 1 Mbps."""

    def fate(strategy: str) -> tuple[bool, str]:
        out = {name: by[strategy].ms_per_token is None for name, by in nx.items()}
        fits = [f"{name} fits ({_memory(name, strategy)})" for name, gone in out.items() if not gone]
        return all(out.values()), "; ".join(fits) or "nothing fits: " + nx[SMALL][strategy].reason

    def hurt(strategy: str) -> tuple[float, float]:
        here, there = nx[SMALL][strategy], main[SMALL][strategy]
        return ms(here) / ms(there), rate(there) / rate(here)

    (opt_ms, opt_rate), (our_ms, our_rate) = hurt("cloud-edge-opt"), hurt("edgeshard")
    gone = " and ".join(name for name in MODELS if main[name]["cloud-edge-opt"].ms_per_token
                        and not nx[name]["cloud-edge-opt"].ms_per_token)  # fmt: skip
    return [
        Finding(f"With an Orin NX as source {strategy} is out of memory", *fate(strategy))
        for strategy in ("edge-solo", "cloud-edge-even")
    ] + [
        Finding("An Orin NX as source hurts Cloud-Edge-Opt far more than EdgeShard",
                opt_ms - 1 >= 2 * (our_ms - 1) and opt_rate >= our_rate,
                f"{SMALL}: Cloud-Edge-Opt takes {opt_ms:.2f} times as long and serves 1/{opt_rate:.2f} of the tokens, "
                f"EdgeShard {our_ms:.2f} times and 1/{our_rate:.2f}"
                + (f"; {gone} no longer fits Cloud-Edge-Opt" if gone else "")),
    ]  # fmt: skip


def _memory(name: str, strategy: str) -> str:
    full = shares(*planned(name, strategy, "throughput", "nx"))
    return ", ".join(f"{share:.0%} of {device}" for device, share in full.items())


def no_bubbles(bubbles: Mapping[str, Mapping[str, Schedules]]) -> list[Finding]:
    """The paper's two gains, tokens per second."""
    found = {strategy: bubbles[SMALL][strategy] for strategy in PUBLISHED_NO_BUBBLE_GAIN}
    told = "; ".join(
        f"{strategy} {run.gain:+.2f} ({run.gain / run.bubble:.0%}), published {PUBLISHED_NO_BUBBLE_GAIN[strategy]:+.2f}"
        for strategy, run in found.items()
    )
    gains = [found[strategy].gain for strategy in ("cloud-edge-even", "edgeshard")]
    return [Finding("No bubbles: some tokens/s more for Cloud-Edge-Even, many more for EdgeShard",
                    0 < gains[0] < gains[1], f"{SMALL}: {told}")]  # fmt: skip


def show(value: float | None, digits: int = 1) -> str:
    return "OOM" if value is None else f"{value:.{digits}f}"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(one) for one in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def main_table(found: Results) -> str:
    lines = head("model", "strategy", "ms/token, published", "ours", "one step", "tokens/s, published", "ours",
                 "sequences in flight (b × m)", "bottleneck")  # fmt: skip
    for name, by in found.main.items():
        for strategy, ours in by.items():
            told = PUBLISHED[name].get(strategy)
            known = strategy in PUBLISHED[name]
            theirs = [f"{value:.2f} [{told.mark}]" if told else "OOM" if known else "" for value in
                      ((told.ms_per_token, told.tokens_per_second) if told else (0.0, 0.0))]  # fmt: skip
            flight = f"{ours.micro_batch * ours.micro_batches} ({ours.micro_batch} × {ours.micro_batches})"
            lines.append(row(name, strategy, theirs[0], show(ours.ms_per_token), "" if ours.reason else
                             show(ours.step_ms), theirs[1], show(ours.tokens_per_second),
                             "" if ours.reason else flight, ours.bottleneck))  # fmt: skip
    return "\n".join(lines)


def plans_table(found: Results) -> str:
    lines = head("model", "strategy", "for latency", "for throughput")
    for name, by in found.main.items():
        for strategy, ours in by.items():
            lines.append(row(name, strategy, ours.latency_plan or ours.reason, ours.throughput_plan))
    return "\n".join(lines)


def batches_table(found: Results) -> str:
    lines = head("model", "strategy", "published", "a batch costs as much as one", "each further sequence costs "
                 f"{IMPLIED_SLOPE:.0%}")  # fmt: skip
    for name, by in found.batches.items():
        for strategy in STRATEGIES:
            told = PUBLISHED[name][strategy]
            if told or by[strategy].tokens_per_second:
                lines.append(row(name, strategy, f"{told.tokens_per_second:.2f} [{told.mark}]" if told else "OOM",
                                 show(found.main[name][strategy].tokens_per_second),
                                 show(by[strategy].tokens_per_second)))  # fmt: skip
    return "\n".join(lines)


def sweep_table(found: Results) -> str:
    lines = head("model", "Mbps", *(f"{s}, ms/token" for s in STRATEGIES), *(f"{s}, tokens/s" for s in STRATEGIES))
    for name, by in found.sweep.items():
        for mbps, at in by.items():
            lines.append(row(name, mbps, *(show(at[s].ms_per_token) for s in STRATEGIES),
                             *(show(at[s].tokens_per_second) for s in STRATEGIES)))  # fmt: skip
    return "\n".join(lines)


def nx_table(found: Results) -> str:
    lines = head("model", "strategy", "AGX: ms/token", "NX: ms/token", "AGX: tokens/s", "NX: tokens/s")
    for name, by in found.nx.items():
        for strategy, ours in by.items():
            agx = found.main[name][strategy]
            if agx.ms_per_token or ours.ms_per_token:
                lines.append(row(name, strategy, show(agx.ms_per_token), show(ours.ms_per_token),
                                 show(agx.tokens_per_second), show(ours.tokens_per_second)))  # fmt: skip
    return "\n".join(lines)


def bubbles_table(found: Results) -> str:
    lines = head("model", "strategy", "b × m", "bubble, tokens/s", "no bubble", "gain", "published gain",
                 "best bubble, its own b × m")  # fmt: skip
    for name, by in found.bubbles.items():
        for strategy, run in by.items():
            told = PUBLISHED_NO_BUBBLE_GAIN.get(strategy) if name == SMALL else None
            lines.append(row(name, strategy, f"{run.micro_batch} × {run.micro_batches}", f"{run.bubble:.2f}",
                             f"{run.no_bubble:.2f}", f"{run.gain:+.2f}", f"{told:+.2f}" if told else "",
                             f"{run.best_bubble:.2f} ({run.best_micro_batch} × {run.best_micro_batches})"))  # fmt: skip
    return "\n".join(lines)


def findings_table(found: Results) -> str:
    lines = head("the paper's finding", "here", "what came out")
    return "\n".join([*lines, *(row(f.text, "holds" if f.holds else "**does not hold**", f.evidence)
                                for f in found.findings)])  # fmt: skip


TABLES: Mapping[str, Callable[[Results], str]] = {
    "findings": findings_table,
    "main": main_table,
    "plans": plans_table,
    "batches": batches_table,
    "sweep": sweep_table,
    "nx": nx_table,
    "bubbles": bubbles_table,
}


def write(found: Results, page: Path = PAGE) -> None:
    """Put each table between its two marks on the page, and draw the plots beside it."""
    from benchmarks.edgeshard_plots import draw

    text = page.read_text()
    for name, table in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marks.search(text):
            raise RuntimeError(f"{page} has no place for the table {name!r}")
        printed = table(found)
        text = marks.sub(lambda mark: f"{mark[1]}{printed}\n{mark[2]}", text)  # noqa: B023
    page.write_text(text)
    draw(found, page.parent)


def main(argv: Sequence[str] | None = None) -> None:
    """Print every table; `--json` the data instead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put tables and plots into docs/edgeshard.md")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    found = results()
    if options.write:
        write(found)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        print("\n\n".join(f"## {name}\n\n{table(found)}" for name, table in TABLES.items()))


if __name__ == "__main__":
    main()
