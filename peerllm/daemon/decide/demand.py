"""How much a deployment asks for, and the plan that fits it. Pure: from candidates to a plan, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peerllm.daemon.decide.device_profiles import (
    ITEMSIZE,
    Candidate,
    able,
    device_profile,
    link_profiles,
    machine_contention,
    slower_than_estimated,
)
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Inspected
from peerllm.errors import BadInputError, InfeasibleError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.layer_costs import layer_bytes, stage_bytes
from peerllm.planner.cost.working_space import chunk_tokens, working_bytes
from peerllm.planner.latency.latency_plan import plan_latency
from peerllm.planner.replan.migration import DISK_MBPS, Holdings, LoadRates
from peerllm.planner.replan.net_value import ReplanHorizon
from peerllm.planner.replan.replan_decision import ReplanDecision, replan
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.planner.transfers.activation_forms import plan_with_forms
from peerllm.planner.transfers.prompt_chunks import Pipeline, in_chunks
from peerllm.reused_layers import reused
from peerllm.types import (
    ACTIVATIONS,
    SCHEDULE_NAMES,
    ActivationForm,
    Activations,
    Cuts,
    DeviceId,
    ModelProfile,
    Plan,
    ScheduleName,
    Stage,
    Workload,
)

DEFAULT_SLOTS = 4
DEFAULT_CONTEXT = 2048  # tokens
LEAST_CONTEXT = 512  # what a short household still gets before it is told that the model is too large
MAX_SLOTS = 256
LEAST_GAIN = 0.1  # of the time that requests take: links that are timed anew differ by less, and plans would flap
USE = ReplanHorizon(ms=600_000.0, requests=20.0)  # what a move must pay for itself in
REPAIR = ReplanHorizon(ms=30_000.0, requests=1.0)  # the same where answers wait: the pause counts most
EXPECTED_PROMPT = 128  # tokens of the request that plans are made for
EXPECTED_ANSWER = 128
CONTEXTS_A_PROMPT = 16  # where that is longer, a prompt takes this part of the context: who asks for room uses it


@dataclass(frozen=True, slots=True)
class Moving:
    """What a plan starts from that follows another one."""

    current: Plan | None  # the plan that serves, or did
    size: tuple[int, int]  # slots and context of what is loaded; (0, 0): nothing is
    loaded: Mapping[DeviceId, frozenset[int]]  # layers in memory, of that size
    cached: Mapping[DeviceId, frozenset[int]]  # layers on each device's own disk
    in_flight: tuple[int, ...]  # tokens so far of each running sequence
    compare: bool  # the current plan serves: leave it only for a better one
    load_mbps: float = DISK_MBPS  # as fast as devices loaded of late

    @property
    def horizon(self) -> ReplanHorizon:
        return USE if self.compare else REPAIR


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plan and all that its shards need to know. `promises` is what each device must reserve, in bytes."""

    plan: Plan
    workload: Workload
    chunk: int  # the largest, in tokens: working space is promised for it
    cuts: Cuts
    micro_batch: int
    micro_batches: int
    schedule: ScheduleName
    stage_memory_bytes: tuple[int, ...]
    promises: Mapping[DeviceId, int]
    scenario: Scenario  # what there was to plan with, memory less the working space of a pass
    activations: tuple[ActivationForm, ...]  # from each stage to the next

    @property
    def rounded_layers(self) -> tuple[int, ...]:
        """Layers whose outputs travel as int8."""
        hops = zip(self.plan.stages[:-1], self.activations, strict=True)
        return tuple(stage.last_layer for stage, form in hops if form == "int8")


def check_options(options: RunOptions, inspected: Inspected) -> None:
    """BadInputError for what no household could serve."""
    if options.schedule not in SCHEDULE_NAMES:
        raise BadInputError(f"--schedule is one of {', '.join(SCHEDULE_NAMES)}, not {options.schedule}")
    if options.activations not in ACTIVATIONS:
        raise BadInputError(f"--activations is one of {', '.join(ACTIVATIONS)}, not {options.activations}")
    if options.activations == "int8" and inspected.exact:
        raise BadInputError(f"{options.model} is computed in float32, which stays exact: no --activations int8 for it")
    if options.activations == "int8" and inspected.exact_rows:
        raise BadInputError(
            f"{options.model} sends more than hidden states between devices, which stays exact: no --activations int8"
        )
    if options.slots is not None and not 1 <= options.slots <= MAX_SLOTS:
        raise BadInputError(f"--slots must lie in 1..{MAX_SLOTS}, not {options.slots}")
    if options.context is not None and not 1 <= options.context <= inspected.max_context:
        raise BadInputError(
            f"--context must lie in 1..{inspected.max_context} for {options.model}, not {options.context}"
        )


def sizes(options: RunOptions, max_context: int, least_context: int = 0) -> Iterator[tuple[int, int]]:
    """(slots, context) to try, the best first: what was asked for stays, the rest gives way, context before slots.

    `least_context` stays, too: what a running deployment has.
    """
    context = options.context or min(max_context, DEFAULT_CONTEXT)
    slots = options.slots or DEFAULT_SLOTS
    yield slots, context
    least = context if options.context else min(context, max(LEAST_CONTEXT, least_context))
    while context > least:
        context = max(least, context // 2)
        yield slots, context
    while options.slots is None and slots > 1:
        slots //= 2
        yield slots, context


def sizes_from(options: RunOptions, max_context: int, least_context: int, moving: Moving) -> Iterator[tuple[int, int]]:
    """(slots, context) to try after another plan: as it had, so that what is loaded can be used, else the next smaller.

    Where it serves, what was asked for comes first: it may have become possible.
    """
    slots, context = had = moving.size
    others = [one for one in sizes(options, max_context, least_context) if one != had]
    larger = [one for one in others if one[0] >= slots and one[1] >= context]
    if moving.compare:
        yield from larger
    yield had
    yield from (one for one in others if one not in larger)


def draw_up(
    options: RunOptions,
    inspected: Inspected,
    candidates: Mapping[DeviceId, Candidate],
    source: DeviceId,
    least_context: int = 0,
) -> Blueprint:
    """The plan for the largest demand that fits what is free; InfeasibleError says what is missing."""
    each = sizes(options, inspected.max_context, least_context)
    return _largest(options, inspected, candidates, source, each, None)[0]


def redraw(
    options: RunOptions,
    inspected: Inspected,
    candidates: Mapping[DeviceId, Candidate],
    source: DeviceId,
    least_context: int,
    moving: Moving,
) -> tuple[Blueprint, ReplanDecision | None]:
    """The plan to move to, or the current one, with what moving costs counted; as `draw_up` otherwise.

    The candidates' free memory includes what they hold for this deployment. None: of another size than before.
    """
    each = sizes_from(options, inspected.max_context, least_context, moving)
    return _largest(options, inspected, candidates, source, each, moving)


def _largest(
    options: RunOptions,
    inspected: Inspected,
    candidates: Mapping[DeviceId, Candidate],
    source: DeviceId,
    each: Iterator[tuple[int, int]],
    moving: Moving | None,
) -> tuple[Blueprint, ReplanDecision | None]:
    check_options(options, inspected)
    fit = {d: c for d, c in candidates.items() if d == source or able(c, inspected.architecture, inspected.dtype)}
    if not able(candidates[source], inspected.architecture, inspected.dtype):
        raise BadInputError(
            f"{options.model} is a {inspected.architecture} model in {inspected.dtype}: this device cannot compute it"
        )
    failure: InfeasibleError | None = None
    for size in each:
        try:
            return _draw_up(options, inspected, fit, source, size, moving)
        except InfeasibleError as error:
            failure = error
    assert failure is not None
    taken = sum(c.hello.lent_bytes - c.free_bytes for c in fit.values())
    if taken > 0:
        text = f"{failure}; {human_bytes(taken)} of what the household lends are promised to other models"
        raise InfeasibleError(text, failure.missing_bytes) from failure
    raise failure


def _draw_up(
    options: RunOptions,
    inspected: Inspected,
    candidates: Mapping[DeviceId, Candidate],
    source: DeviceId,
    size: tuple[int, int],
    moving: Moving | None,
) -> tuple[Blueprint, ReplanDecision | None]:
    slots, context = size
    model, space = inspected.profile, inspected.working
    work = Workload(
        min(max(EXPECTED_PROMPT, context // CONTEXTS_A_PROMPT), max(1, context // 2)),
        min(EXPECTED_ANSWER, max(1, context // 2)),
        slots,
        context,
        options.objective,
    )
    chunk = most_chunk(options, inspected, context)
    working = working_bytes(space, context, slots, chunk)
    _check_sum(options, inspected, candidates, work, working)
    slower = slower_than_estimated(candidates.values(), model, inspected.dtype)
    profiles = {
        d: device_profile(c, model, work, inspected.dtype, len(candidates), slower) for d, c in candidates.items()
    }
    links = link_profiles(candidates, source)
    planned = plan_throughput if options.objective == "throughput" else plan_latency
    rooms = {d: replace(one, memory_bytes=max(0, one.memory_bytes - working)) for d, one in profiles.items()}

    decisions: dict[tuple[Stage, ...], ReplanDecision] = {}

    def solve(one: ModelProfile) -> Plan:
        if moving is not None and moving.size == size:
            decision = replan(
                one, profiles, links, source, work,
                current=moving.current, held=Holdings(moving.loaded, moving.cached), horizon=moving.horizon,
                in_flight=moving.in_flight, working_bytes=working, head_on_source=options.private,
                rates=LoadRates(moving.load_mbps), least_gain=LEAST_GAIN,
            )  # fmt: skip
            decisions[decision.plan.stages] = decision
            return decision.plan
        return planned(one, profiles, links, source, work, working_bytes=working, head_on_source=options.private)

    wanted: Activations = "exact" if inspected.exact_rows else options.activations
    scenario = Scenario(model, rooms, links, source, None, work, ())
    found = plan_with_forms(scenario, wanted, ITEMSIZE[inspected.dtype], solve)
    plan = found.plan
    memory = stage_bytes(model, plan.stages, work)
    promises = dict.fromkeys(plan.devices, working)
    for stage, nbytes in zip(plan.stages, memory, strict=True):
        promises[stage.device] += nbytes
    scenario = found.scenario
    pipeline = Pipeline(scenario.model, scenario.devices, scenario.links, plan.stages)
    chunk, cuts = prompt_cuts(options, pipeline, work, chunk)
    if options.schedule != "sequential":
        alone = options.objective == "latency"  # else the layers' times are those of devices that all compute
        crowding = max(machine_contention([candidates[d] for d in plan.devices]).values()) if alone else 1.0
        plan = in_chunks(plan, pipeline, work.prompt_tokens, cuts, crowding)
    batch, batches = plan.predicted.micro_batch, plan.predicted.micro_batches
    if options.objective == "latency":
        # Planned for one sequence; several share the stages without one waiting for all.
        batches = min(slots, len(plan.devices))
        batch = -(-slots // batches)
    found_print = Blueprint(
        plan, work, chunk, cuts, batch, batches, options.schedule, memory, promises, scenario, found.forms
    )
    return found_print, decisions.get(plan.stages)


def shard_bytes(model: ModelProfile, size: tuple[int, int], shards: Sequence[tuple[int, int]]) -> int:
    """The weights and KV of shards of that size, without working space."""
    work = Workload(sequences=max(1, size[0]), context=max(1, size[1]))
    layers = {layer for first, last in shards for layer in range(first, last + 1)}
    return sum(layer_bytes(model, i, work, beside=model.layers[i].tied_to in layers) for i in layers)


def held_bytes(
    options: RunOptions, inspected: Inspected, size: tuple[int, int], shards: Sequence[tuple[int, int]]
) -> int:
    """What a device promised for these shards of that size: working space, weights and KV."""
    if not shards:
        return 0
    slots, context = size
    chunk = most_chunk(options, inspected, context)
    return working_bytes(inspected.working, context, slots, chunk) + shard_bytes(inspected.profile, size, shards)


def most_chunk(options: RunOptions, inspected: Inspected, context: int) -> int:
    """The most tokens of a prompt in one pass, which working space is promised for."""
    return min(options.prompt_chunk or chunk_tokens(inspected.working, context), context)


def added_bytes(blueprint: Blueprint, device: DeviceId, loaded: Sequence[tuple[int, int]]) -> int:
    """What a device needs for a plan beyond what it has promised for `loaded`, its shards of the plan's size."""
    stages = [(s.first_layer, s.last_layer) for s in blueprint.plan.stages if s.device == device]
    kept = [one for stage in stages for one in reused(stage, loaded)[0]]
    size = blueprint.workload.sequences, blueprint.workload.context
    needed = blueprint.promises.get(device, 0)
    working = needed - shard_bytes(blueprint.scenario.model, size, stages)
    return max(0, needed - shard_bytes(blueprint.scenario.model, size, kept) - (working if kept else 0))


def prompt_cuts(options: RunOptions, pipeline: Pipeline, work: Workload, most: int) -> tuple[int, Cuts]:
    """(largest chunk, cuts), within the `most` tokens that a pass has room for."""
    if options.prompt_chunk is None and work.sequences > 1:  # else nobody's steps wait
        most = pipeline.most_chunk(most)
    if options.prompt_chunk is not None or options.schedule == "sequential":  # chunks that take turns gain nothing
        return most, ((1, most),)
    return most, pipeline.cuts(work.context, most)


def _check_sum(
    options: RunOptions, inspected: Inspected, candidates: Mapping[DeviceId, Candidate], work: Workload, working: int
) -> None:
    """InfeasibleError with the missing bytes if a model is too large for all devices together, whatever the plan."""
    needed = working + sum(
        layer_bytes(inspected.profile, i, work, layer.tied_to is not None)
        for i, layer in enumerate(inspected.profile.layers)
    )
    lent = sum(max(0, candidate.hello.lent_bytes) for candidate in candidates.values())
    free = sum(max(0, candidate.free_bytes) for candidate in candidates.values())
    if needed <= free:
        return
    room = f"{work.sequences} slot{'s' * (work.sequences > 1)} of {work.context} tokens"
    raise InfeasibleError(
        f"{options.model} needs {human_bytes(needed)} for {room}; the household lends {human_bytes(lent)}: "
        f"{human_bytes(needed - free)} are missing",
        needed - free,
    )


def same_demand(a: RunOptions, b: RunOptions) -> bool:
    """Whether a deployment that runs with `a` satisfies `b`; any value satisfies an option that `b` leaves open."""
    return (
        a.objective == b.objective
        and a.private == b.private
        and b.dtype in ("auto", a.dtype)
        and b.quantize in ("auto", a.quantize)
        and a.schedule == b.schedule
        and b.activations in ("auto", a.activations)
        and b.context in (None, a.context)
        and b.slots in (None, a.slots)
        and b.prompt_chunk in (None, a.prompt_chunk)
        and b.name in ("", a.name)
    )


def refuse_other(a: RunOptions, b: RunOptions) -> None:
    """BadInputError where a model already runs with other options."""
    if not same_demand(a, b):
        raise BadInputError(f"{a.model} already runs as {a.name} with other options; `peerllm stop {a.name}` first")
