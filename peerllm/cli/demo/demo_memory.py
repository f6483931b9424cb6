"""How much memory each of the demo's devices lends: none holds the model alone, and all but one do.

Room for so many answers at once as the demo asks for have only all devices together; with one less the model is
served to fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from peerllm.builtin import BUILTIN, MODEL_DIR
from peerllm.daemon.deployment.model_files import dtype_of
from peerllm.errors import ModelError
from peerllm.planner.cost.layer_costs import layer_bytes
from peerllm.planner.cost.working_space import working_bytes
from peerllm.types import Workload

SPARE_BLOCKS = 0.75  # of a block's size
SPARE_SHARE = 8  # devices lend this part of what they could lend more: the less they lend, the evener they share


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes as the planner counts them, KV included."""

    embedding: int
    blocks: tuple[int, ...]
    head: int
    working: int  # of a pass, on every device
    context: int = 0  # tokens of a sequence that there is room for

    @property
    def total(self) -> int:
        """On one device alone."""
        return self.embedding + sum(self.blocks) + self.head + self.working


def replaceable_limit(sizes: ModelBytes, fewer: ModelBytes, devices: int) -> int:
    """What each device lends, so that all together hold `sizes`, any one less than all only `fewer`.

    `fewer` is the same model with room for fewer sequences.
    """
    if devices > len(sizes.blocks):
        raise ModelError(f"the model has {len(sizes.blocks)} blocks, too few for {devices} devices")
    if devices == 1:
        return sizes.total
    least = max(_least_limit(sizes, devices), _least_limit(fewer, devices - 1))
    return least + (_least_limit(sizes, devices - 1) - least) // SPARE_SHARE


def _least_limit(sizes: ModelBytes, devices: int) -> int:
    """The least that each of so many devices must lend to hold the model together."""
    most = least = max(*sizes.blocks, sizes.head, sizes.embedding) + sizes.working
    while not _held(sizes, most, devices):
        most *= 2
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if _held(sizes, middle, devices) else (middle + 1, most)
    return most


def _held(sizes: ModelBytes, limit: int, devices: int) -> bool:
    """Whether devices that lend `limit` each hold all layers: one after the other takes what fits, in their order."""
    free = 0
    for nbytes in (sizes.embedding + sizes.head, *sizes.blocks):
        if nbytes > free:
            devices, free = devices - 1, limit - sizes.working
        if nbytes > free or devices < 0:
            return False
        free -= nbytes
    return True


def limits(sizes: ModelBytes, devices: int) -> list[int]:
    """What each device lends so that only all together hold the model.

    The first is the source and keeps embedding and head. Blocks are dealt out evenly; a device lends what its part
    takes, what a pass works with, and SPARE_BLOCKS of a block more, which never makes room for the part of another.
    """
    if devices > len(sizes.blocks):
        raise ModelError(f"the model has {len(sizes.blocks)} blocks, too few for {devices} devices")
    spare = math.ceil(SPARE_BLOCKS * min(sizes.blocks))
    parts = even_runs(len(sizes.blocks), devices)
    found = [sum(sizes.blocks[start:end]) + sizes.working + spare for start, end in parts]
    found[0] += sizes.embedding + sizes.head
    return found


def even_runs(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in `parts` neighbouring runs that differ by one at most; the later runs are the longer ones."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def sizes_of(model_dir: Path, slots: int, context: int, dtype: str = "auto", quantize: str = "auto") -> ModelBytes:
    """In the form that `peerllm run` computes, by default or as asked; ModelError for what is no model.

    `context` is lessened to what the model can.
    """
    from peerllm.engine.backends import Backends
    from peerllm.engine.messages import Inspect

    dtype = dtype_of(BUILTIN if model_dir == MODEL_DIR else str(model_dir), dtype)
    inspected = Backends().inspect(Inspect(0, str(model_dir), dtype, quantize))
    context = min(context, inspected.max_context)
    profile, work = inspected.profile, Workload(sequences=slots, context=context)
    tied = profile.layers[-1].tied_to is not None
    sizes = [layer_bytes(profile, number, work, tied) for number in range(len(profile.layers))]
    working = working_bytes(inspected.working, context, slots)
    return ModelBytes(sizes[0], tuple(sizes[1:-1]), sizes[-1], working, context)
