"""What each device of a plan is told to hold, and what a device checks of it before it takes any memory. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod

from peerllm.daemon.control_messages import Assign, Carry, StageWork, TensorDigest
from peerllm.daemon.decide.demand import MAX_SLOTS, Blueprint
from peerllm.daemon.decide.device_profiles import ITEMSIZE
from peerllm.daemon.decide.hub_places import SHA256, HubPlaces, check_hub, check_place
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.errors import BadInputError, RefusedError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.working_space import MOST_CHUNK
from peerllm.stored_types import FLOATS, STORED_TYPES, stored_bytes
from peerllm.types import MATRIX_BITS, MAX_CUTS, MAX_STAGES, SCHEDULE_NAMES, Cuts, DeploymentId, DeviceId, Stage

MAX_CONTEXT = 1 << 20  # tokens
MAX_TENSORS = 65536  # of one assignment
MAX_DIMENSIONS = 8  # of one tensor
MAX_LINKS = 256  # that a device expects for all that one coordinator has it load
MAX_EPOCH = 2**32 - 1  # a frame has no room for more
DEPLOYMENT = re.compile(r"[0-9a-f]{32}")
Address = tuple[tuple[str, ...], int]  # hosts, the best first, and the data plane's port
HERE = ""  # stands for the hash of a tensor that the source itself loads: it never travels


def tensors_of(inspected: Inspected, first_layer: int, last_layer: int) -> tuple[TensorAt, ...]:
    """Every tensor that layers first..last need, once."""
    layers = inspected.tensors[first_layer : last_layer + 1]
    return tuple({tensor.name: tensor for layer in layers for tensor in layer}.values())


def travelling(blueprint: Blueprint, inspected: Inspected, source: DeviceId) -> tuple[TensorAt, ...]:
    """The tensors that other devices than the source will fetch."""
    away = [stage for stage in blueprint.plan.stages if stage.device != source]
    return tuple({t.name: t for s in away for t in tensors_of(inspected, s.first_layer, s.last_layer)}.values())


def assignments(
    deployment: DeploymentId,
    epoch: int,
    blueprint: Blueprint,
    inspected: Inspected,
    *,
    hashes: Mapping[str, str],
    address: Callable[[DeviceId], Address],
    hub: HubPlaces | None = None,
    before: Sequence[Stage] = (),
) -> dict[DeviceId, Assign]:
    """One Assign per device of the plan; `hashes` by tensor name, for the tensors that travel.

    `before`: the stages in which sequences run now. With `hub` no device need have the tensors: "" is the hash of one
    that nobody has fetched yet.
    """
    stages = blueprint.plan.stages
    source = stages[0].device
    fetchers = _fetchers(blueprint, inspected, None if hub is not None else source)

    def digest(tensor: TensorAt, device: DeviceId) -> TensorDigest:
        sha256 = hashes.get(tensor.name, HERE) if hub is not None or device == source else hashes[tensor.name]
        place = (hub.files[tensor.path], tensor.offset) if hub is not None else (-1, 0)
        fetcher = fetchers.get(tensor.name, "")
        return TensorDigest(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, sha256, *place, fetcher=fetcher)

    forms = (*blueprint.activations, "exact")  # of the way back to the source, too: it carries tokens
    work: dict[DeviceId, list[StageWork]] = {}
    for number, stage in enumerate(stages):
        after = stages[(number + 1) % len(stages)].device
        here = tensors_of(inspected, stage.first_layer, stage.last_layer)
        digests = tuple(digest(tensor, stage.device) for tensor in here)
        hosts, port = address(after) if after not in (source, stage.device) else ((), 0)
        hosts = tuple(host for host in hosts if "%" not in host)  # it would name an interface of the source's
        work.setdefault(stage.device, []).append(
            StageWork(
                stage=number,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                tensors=digests,
                upstream=stages[number - 1].device if number else None,
                downstream=after if after != stage.device else None,
                downstream_stage=number + 1,
                downstream_hosts=hosts,
                downstream_port=port,
                upstream_activations=forms[number - 1] if number else "exact",
                downstream_activations=forms[number],
                state_from=tuple(sorted({old.device for old, _, _ in _moved(before, stage)})),
            )
        )
    return {
        device: Assign(
            deployment=deployment,
            epoch=epoch,
            model=inspected.profile.name,
            config=inspected.config,
            dtype=inspected.dtype,
            slots=blueprint.workload.sequences,
            context=blueprint.workload.context,
            chunk=blueprint.chunk,
            micro_batch=blueprint.micro_batch,
            micro_batches=blueprint.micro_batches,
            schedule=blueprint.schedule,
            stages=len(stages),
            work=tuple(mine),
            head_device=stages[-1].device,
            quantize=inspected.quantize,
            cuts=blueprint.cuts,
            hub=hub.origin if hub is not None else None,
        )
        for device, mine in work.items()
    }


def carried(
    deployment: DeploymentId,
    before: tuple[int, Sequence[Stage]],
    after: tuple[int, Sequence[Stage]],
    address: Callable[[DeviceId], Address],
) -> list[tuple[DeviceId, Carry]]:
    """Who copies what to whom between two (epoch, stages): each run of layers that changes its device."""
    result = []
    for number, new in enumerate(after[1]):
        for old, first, last in _moved(before[1], new):
            hosts, port = address(new.device)
            hosts = tuple(host for host in hosts if "%" not in host)
            carry = Carry(deployment, before[0], first, last, after[0], number, new.device, hosts, port)
            result.append((old.device, carry))
    return result


def _moved(before: Sequence[Stage], new: Stage) -> Iterator[tuple[Stage, int, int]]:
    """(Stage of another device, first, last) of each run of layers that `new` takes over from one."""
    for old in before:
        first, last = max(old.first_layer, new.first_layer), min(old.last_layer, new.last_layer)
        if first <= last and old.device != new.device:
            yield old, first, last


def _fetchers(blueprint: Blueprint, inspected: Inspected, source: DeviceId | None) -> dict[str, DeviceId]:
    """For each tensor that several devices need the first of them, which gets it for all; `source` has all already."""
    needed: dict[str, dict[DeviceId, None]] = {}
    for stage in blueprint.plan.stages:
        if stage.device != source:
            for tensor in tensors_of(inspected, stage.first_layer, stage.last_layer):
                needed.setdefault(tensor.name, {})[stage.device] = None
    return {name: next(iter(devices)) for name, devices in needed.items() if len(devices) > 1}


def weight_bytes(tensors: Sequence[TensorDigest], dtype: str, quantize: str) -> int:
    """The least memory that `tensors` take once loaded for computing in `dtype`, as far as that is told by them alone.

    Where tables stay in their files or matrices are rounded the engine knows, and checks it before it loads any.
    """
    if quantize or dtype == "bfloat16":
        return 0
    sizes = {t.name: prod(t.shape) * ITEMSIZE[dtype] if t.dtype in FLOATS else t.nbytes for t in tensors}
    return sum(sizes.values())


def links_of(assign: Assign) -> int:
    """How many links of other devices the stages of an assignment may expect at most."""
    return sum(1 + len(work.state_from) for work in assign.work)


def check(assign: Assign, reserved_bytes: int, own: bool) -> None:
    """RefusedError or BadInputError unless the assignment makes sense and stays within its reservation."""
    if not DEPLOYMENT.fullmatch(assign.deployment) or not 0 <= assign.epoch <= MAX_EPOCH:
        raise BadInputError("no deployment's id and epoch")
    if assign.dtype not in ITEMSIZE:
        raise BadInputError(f"unknown dtype {assign.dtype!r}")
    if assign.schedule not in SCHEDULE_NAMES:
        raise BadInputError(f"unknown schedule {assign.schedule!r}")
    limits = (
        ("slots", assign.slots, MAX_SLOTS),
        ("context", assign.context, MAX_CONTEXT),
        ("chunk", assign.chunk, MOST_CHUNK),
        ("micro_batch", assign.micro_batch, assign.slots),
        ("micro_batches", assign.micro_batches, assign.slots),
        ("stages", assign.stages, MAX_STAGES),
        ("work", len(assign.work), assign.stages),
        ("tensors", sum(len(work.tensors) for work in assign.work), MAX_TENSORS),
        ("links", links_of(assign), MAX_LINKS),
    )
    for name, value, most in limits:
        if not 1 <= value <= most:
            raise BadInputError(f"an assignment's {name} must lie in 1..{most}, not {value}")
    _check_cuts(assign.cuts, assign.chunk)
    check_hub(assign.hub)
    if len({work.stage for work in assign.work}) != len(assign.work):
        raise BadInputError("a stage is assigned twice")
    for work in assign.work:
        if not 0 <= work.stage < assign.stages or not 0 <= work.first_layer <= work.last_layer:
            raise BadInputError(f"stage {work.stage} with layers {work.first_layer}..{work.last_layer} makes no sense")
        exact = assign.dtype == "float32" and not assign.quantize
        if exact and "int8" in (work.upstream_activations, work.downstream_activations):
            raise BadInputError("what is computed in float32 stays exact: its activations are not rounded")
        for tensor in work.tensors:
            check_tensor(tensor, own)
            check_place(assign.hub, tensor)
    if assign.quantize not in MATRIX_BITS:
        raise BadInputError(f"unknown quantisation {assign.quantize!r}")
    tensors = [tensor for work in assign.work for tensor in work.tensors]
    sizes = [weight_bytes([tensor], assign.dtype, assign.quantize) for tensor in {t.name: t for t in tensors}.values()]
    needed = sum(sizes) - max(sizes, default=0)  # the largest may be an embedding, which stays in its file
    if needed > reserved_bytes:
        raise RefusedError(
            f"{human_bytes(needed)} of weights are assigned, {human_bytes(reserved_bytes)} were reserved for them"
        )


def _check_cuts(cuts: Cuts, most: int) -> None:
    starts = [least for least, _ in cuts]
    rising = not starts or (starts[0] == 1 and all(a < b for a, b in pairwise(starts)))
    if len(cuts) > MAX_CUTS or not rising or any(not 1 <= chunk <= most for _, chunk in cuts):
        raise BadInputError(f"an assignment's cuts make no sense with chunks of at most {most} tokens")


def check_tensor(tensor: TensorDigest, own: bool) -> None:
    """BadInputError unless a tensor that another device names can be one; `own`: it may have no hash."""
    if len(tensor.shape) > MAX_DIMENSIONS:  # the product of thousands would take minutes
        raise BadInputError(f"tensor {tensor.name} has {len(tensor.shape)} dimensions, at most {MAX_DIMENSIONS}")
    if any(side < 0 for side in tensor.shape) or tensor.nbytes < 0:
        raise BadInputError(f"tensor {tensor.name} has a negative size")
    if tensor.dtype not in STORED_TYPES:
        raise BadInputError(f"tensor {tensor.name} has the unknown dtype {tensor.dtype!r}")
    if stored_bytes(tensor.dtype, tensor.shape) != tensor.nbytes:
        raise BadInputError(
            f"tensor {tensor.name} of shape {tensor.shape} in {tensor.dtype} is not {tensor.nbytes} bytes"
        )
    known = SHA256.fullmatch(tensor.sha256) or (tensor.sha256 == HERE and (own or tensor.file >= 0))
    if not known:
        raise BadInputError(f"tensor {tensor.name} has no SHA-256")
