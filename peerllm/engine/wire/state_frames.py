"""Parts of a slot's state as KEY_VALUE frames and back (docs/wire.md §6), and what a link that carries them may carry.

A frame has one run, the tokens whose rows it carries, and a tensor [tokens, numbers] for each array of one block, which
is called FORM.BLOCK.ARRAY, such as "graph.3.keys": shards of another form lay their rows out in another way. What a
block keeps once for a sequence is a row, of the last token that it has taken in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from peerllm.engine.base import StateForms, StatePart
from peerllm.engine.messages import LoadStage
from peerllm.engine.wire.frame_arrays import DTYPE_NAMES, to_array, to_tensor
from peerllm.errors import FrameError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun

PART_BYTES = 128 << 10  # of one part, unless a token alone has more: a step on another link waits for no more than that


@dataclass(frozen=True, slots=True, eq=False)
class CarriedPart:
    """A part of the state that `sequence` has in `slot`."""

    sequence: int
    slot: int
    part: StatePart


def part_tokens(forms: StateForms) -> int:
    """The most tokens in one part of these blocks."""
    rows = forms.tokens.values()
    sizes = (sum(count * np.dtype(dtype).itemsize for count, dtype in arrays.values()) for arrays in rows)
    return max(1, PART_BYTES // max(sizes, default=PART_BYTES))


def state_limits(spec: LoadStage, form: str, forms: StateForms) -> FrameLimits:
    """What a link may carry that brings these blocks' state to `spec`'s stage; there is at least one."""
    most = min(spec.context, part_tokens(forms))
    kinds, bounds = (FrameKind.KEY_VALUE,), (1, spec.slots, spec.context)
    each = [
        FrameLimits(spec.deployment, spec.epoch, spec.stage, kinds, *bounds, tokens, _limits(form, block, arrays))
        for tokens, of in ((most, forms.tokens), (1, forms.fixed))
        for block, arrays in of.items()
    ]
    every = {name: limit for one in each for name, limit in one.tensors.items()}
    return replace(each[0], max_tokens=most, tensors=every, max_bytes=max(one.max_bytes for one in each))


def _limits(form: str, block: int, arrays: Mapping[str, tuple[int, str]]) -> dict[str, TensorLimit]:
    return {
        f"{form}.{block}.{name}": TensorLimit((DTYPE_NAMES[np.dtype(dtype)],), 2, count, per_token=True)
        for name, (count, dtype) in arrays.items()
    }


def to_state_frame(carried: CarriedPart, form: str, deployment: str, epoch: int, stage: int) -> Frame:
    """The frame that carries a part to `stage`."""
    part = carried.part
    tensors = tuple(to_tensor(f"{form}.{part.block}.{name}", rows) for name, rows in part.rows.items())
    run = TokenRun(carried.sequence, carried.slot, part.start, part.length)
    return Frame(FrameKind.KEY_VALUE, deployment, epoch, stage, (run,), tensors)


def from_state_frame(frame: Frame) -> CarriedPart:
    """What a checked frame carries, as views of it; FrameError if that is not rows of one block."""
    (run,) = frame.runs
    names = [tensor.name.split(".") for tensor in frame.tensors]
    if len({block for _, block, _ in names}) != 1 or run != TokenRun(run.sequence, run.slot, run.position, run.length):
        raise FrameError("a KEY_VALUE frame carries rows of one block, without flags")
    rows = {name: to_array(tensor) for (_, _, name), tensor in zip(names, frame.tensors, strict=True)}
    return CarriedPart(run.sequence, run.slot, StatePart(int(names[0][1]), run.position, rows))
