"""`peerllm plan`: how a scenario's model would be divided, and what that is predicted to cost."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import orjson

from peerllm.cli.device import LocalDevice
from peerllm.cli.exactness import exactness
from peerllm.cli.progress import as_model, progress
from peerllm.cli.terminal import human_ms, human_rate, layer_bar, printable, table
from peerllm.daemon.weights.gguf_choice import SUFFIX
from peerllm.errors import BadInputError, InfeasibleError, PeerLLMError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.layer_costs import hop_ms, layer_ms, stage_bytes
from peerllm.planner.scenario.json_value import ScenarioError
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.strategies.strategy_plan import SINGLE, plan, value
from peerllm.planner.transfers.activation_forms import forms
from peerllm.planner.transfers.prompt_chunks import Pipeline, in_chunks
from peerllm.types import Objective, Plan, chunk_of

OK, INFEASIBLE, MALFORMED = 0, 1, 2
STDIN = "-"
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one scenario: a plan, the reason why there is none, or the error in the file."""

    strategy: str
    objective: Objective
    scenario: Scenario | None = None
    plan: Plan | None = None
    reason: str | None = None
    error: str | None = None
    solve_ms: float | None = None
    chunk: int | None = None  # of a live plan: in what chunks the workload's prompt will travel
    rounded_layers: tuple[int, ...] | None = None  # of a model: those whose outputs would travel as int8
    weights: str = ""  # of a model: how they would be held, in words

    @property
    def code(self) -> int:
        return MALFORMED if self.error is not None else INFEASIBLE if self.plan is None else OK

    def line(self) -> dict[str, Any]:
        """The JSON object: its keys are fixed.

        `error` is there only for a malformed file; `activations` (how each stage sends to the next), `prompt_chunk`
        (tokens; the first token is predicted of a prompt cut so) and `weights` (in words) only for a model.
        """
        found = self.plan
        stages = found.stages if found else ()
        line: dict[str, Any] = {
            "strategy": self.strategy,
            "objective": self.objective,
            "feasible": None if self.error is not None else found is not None,
            "reason": self.reason,
            "stages": [asdict(stage) for stage in stages],
            "predicted": asdict(found.predicted) if found else None,
            "optimal": found is not None and found.optimal,
            "bound": found.bound if found else None,
            "solve_ms": self.solve_ms,
        }
        if found and self.rounded_layers is not None:
            sent = list(forms(found, self.rounded_layers))
            line |= {"activations": sent, "prompt_chunk": self.chunk, "weights": self.weights}
        return line if self.error is None else {**line, "error": self.error}


def run(args: argparse.Namespace) -> int:
    """0 planned, 1 one of the scenarios is infeasible, 2 one is malformed."""
    many = len(args.scenarios) > 1
    codes = []
    for name in args.scenarios:
        found = answer(name, args.strategy, args.objective) if is_scenario(name) else live(name, args)
        codes.append(found.code)
        if args.json or many:
            line = {**found.line(), "file": name} if many else found.line()
            print(_json(line), flush=True)
        elif found.scenario and found.plan:
            print(plan_text(found.scenario, found.plan, found))
        else:
            print(f"peerllm: {printable(' '.join((found.error or found.reason or '').split()))}", file=sys.stderr)
    return max(codes)


def answer(name: str, strategy: str, objective: Objective) -> Outcome:
    """Plan for one file, or for standard input."""
    try:
        return planned(read(name), strategy, objective)
    except ScenarioError as error:
        return Outcome(strategy, objective, error=str(error))


def planned(scenario: Scenario, strategy: str, objective: Objective) -> Outcome:
    """The plan, timed, or why there is none; ScenarioError if the strategy needs what the scenario lacks."""
    started = time.perf_counter()
    try:
        found = plan(scenario, strategy, objective)
    except InfeasibleError as error:
        reason = str(error)
        if error.missing_bytes and str(error.missing_bytes) not in reason:
            reason += f" ({error.missing_bytes} bytes)"
        took = 1000 * (time.perf_counter() - started)
        return Outcome(strategy, objective, scenario, reason=reason, solve_ms=took)
    took = 1000 * (time.perf_counter() - started)
    return Outcome(strategy, objective, scenario, found, solve_ms=took)


def live(model: str, args: argparse.Namespace) -> Outcome:
    """What `run` would plan now for the household of the device that runs here."""
    body = {"model": as_model(model), "objective": args.objective, "context": args.context, "slots": args.slots,
            **exactness(args)}  # fmt: skip
    try:
        for line in progress(LocalDevice(args.data).lines("/peerllm/v1/plan", body)):
            if "scenario" in line:
                if args.save is not None:
                    args.save.write_bytes(orjson.dumps(line["scenario"], option=orjson.OPT_INDENT_2))
                found = planned(parse(line["scenario"]), args.strategy, args.objective)
                found = replace(found, rounded_layers=tuple(line["rounded_layers"]), weights=line["weights"])
                return as_cut(found, line["most_chunk"])
    except OSError as error:
        if isinstance(error, PeerLLMError):
            raise
        raise BadInputError(f"{args.save} cannot be written: {error.strerror}") from error
    raise UnavailableError("the device stopped before it had planned; see its log")


def as_cut(found: Outcome, most: int) -> Outcome:
    """The same outcome, the first token predicted of a prompt that is cut into chunks of at most `most` tokens."""
    if found.scenario is None or found.plan is None:
        return found
    scenario, stages = found.scenario, found.plan.stages
    pipeline, work = Pipeline(scenario.model, scenario.devices, scenario.links, stages), scenario.workload
    cuts = pipeline.cuts(work.context, most)
    plan = in_chunks(found.plan, pipeline, work.prompt_tokens, cuts)
    return replace(found, plan=plan, chunk=chunk_of(cuts, work.prompt_tokens))


def is_scenario(argument: str) -> bool:
    """Whether an argument means a scenario file rather than a model."""
    return argument == STDIN or argument.endswith(".json") or _is_other_file(Path(argument))


def _is_other_file(path: Path) -> bool:
    return path.exists() and not path.is_dir() and path.suffix.lower() != SUFFIX


def read(name: str) -> Scenario:
    """The scenario in a file, or on standard input; ScenarioError also where it cannot be read."""
    if not is_scenario(name):
        raise ScenarioError(f"{name} is no scenario file, and there is none of that name")
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ScenarioError(f"{name} is larger than {human_bytes(MAX_FILE_BYTES)}")
    return parse(_decoded(data))


def _decoded(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(data)  # takes NaN and the like, of which `parse` names the key
        except (ValueError, RecursionError):
            raise ScenarioError(f"the file is not JSON: {error}") from error


def _json(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line).decode()
    except TypeError:  # a file's name that is not UTF-8
        return json.dumps(line)


def plan_text(scenario: Scenario, found: Plan, how: Outcome) -> str:
    """A plan for people: its stages drawn over the model's layers, and what they are predicted to do."""
    layers, batch = scenario.model.layers, found.predicted.micro_batch
    rows = [("DEVICE", "LAYERS", f"of {len(layers)}", "NEEDS", "LENDS", "COMPUTE", "HOP")]
    sizes = stage_bytes(scenario.model, found.stages, scenario.workload)
    after = (*found.stages[1:], found.stages[0])
    sent = (*forms(found, how.rounded_layers or ()), "exact")
    for stage, nbytes, following, form in zip(found.stages, sizes, after, sent, strict=True):
        device = scenario.devices[stage.device]
        held = layers[stage.first_layer : stage.last_layer + 1]
        hop = hop_ms(scenario.links, stage.device, following.device, batch * held[-1].output_bytes_per_token)
        rows.append((
            stage.device, f"{stage.first_layer}-{stage.last_layer}",
            layer_bar(stage.first_layer, stage.last_layer, len(layers)), human_bytes(nbytes),
            human_bytes(device.memory_bytes), human_ms(sum(layer_ms(device, layer, batch) for layer in held)),
            human_ms(hop) + " as int8" * (form == "int8"),
        ))  # fmt: skip
    head = f"{scenario.model.name}: {how.strategy}, {how.objective}; {verdict(found, how)}"
    weights = f"weights: {how.weights}\n" * bool(how.weights)
    return f"{printable(head)}\n{table(rows)}\n{printable(weights)}{printable(prediction(scenario, found, how))}"


def verdict(found: Plan, how: Outcome) -> str:
    """How good the plan is known to be."""
    took = f"found in {human_ms(how.solve_ms or 0.0)}"
    if how.strategy in SINGLE:
        return f"the one plan of this strategy, {took}"
    if found.optimal:
        return f"the best there is for it, {took}"
    best = f"{human_ms(found.bound)} a request" if how.objective == "latency" else f"{human_rate(found.bound)} tokens/s"
    worth = value(found.predicted, how.objective)
    gap = abs(worth - found.bound) / worth if worth and isfinite(found.bound) else 1.0
    return f"not proven the best ({best} is not ruled out, {gap:.1%} from this), {took}"


def prediction(scenario: Scenario, found: Plan, how: Outcome) -> str:
    said, work = found.predicted, scenario.workload
    chunks = how.chunk is not None and how.chunk < work.prompt_tokens
    cut = f" (of a prompt of {work.prompt_tokens}, in chunks of {how.chunk})" if chunks else ""
    first = f"First token after {human_ms(said.time_to_first_token_ms)}{cut}"
    if how.objective == "latency":
        request = f"{work.output_tokens} tokens in {human_ms(said.request_ms)}"
        rate = f"{human_rate(said.tokens_per_second)} tokens/s"
        return f"{first}, then one every {human_ms(said.step_ms)}: {request}, {rate}. Busiest: {said.bottleneck}."
    groups = f"{said.micro_batches} × {said.micro_batch} sequences"
    return (
        f"{human_rate(said.tokens_per_second)} tokens/s with {groups} under way, {human_ms(said.step_ms)} a lap. "
        f"{first}. Busiest: {said.bottleneck}."
    )
