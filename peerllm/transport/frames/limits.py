"""What a plan allows a frame to be, and the rules by which one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod

from peerllm.errors import FrameError
from peerllm.transport.frames.frame import ITEM_BYTES, MAX_RANK, FrameKind, check_name
from peerllm.transport.frames.layout import HEADER, RUN, SIZE, TENSOR, padding
from peerllm.types import DeploymentId

HEX_DIGITS = frozenset("0123456789abcdef")


class Rule(StrEnum):
    """Why a frame was refused; one for each branch of the decoder."""

    TOO_LARGE = "larger than the plan's largest frame"
    TRUNCATED = "shorter than its header"
    MAGIC = "not a frame"
    VERSION = "of another version of the format"
    RESERVED = "has a reserved field set"
    KIND = "of a kind not allowed here"
    DEPLOYMENT = "of another deployment"
    EPOCH = "of another epoch"
    STAGE = "for another stage"
    NO_RUNS = "without a run of tokens"
    RUNS = "of more runs than the plan's"
    TENSORS = "of more tensors than the plan's"
    HEADER_BYTES = "misstates its header's length"
    SLOT = "names a slot the plan does not have"
    SLOT_TWICE = "names a slot twice"
    EMPTY_RUN = "has an activation of no tokens"
    CONTEXT = "reaches beyond the context"
    FLAGS = "has flags that are not known"
    TOKENS = "of more tokens than the plan's"
    NAME = "holds a tensor the plan does not have"
    NAME_TWICE = "holds a tensor twice"
    DTYPE = "holds a tensor of a dtype not allowed"
    RANK = "holds a tensor of another rank"
    SHAPE = "holds a tensor of a shape not allowed"
    ELEMENTS = "holds a tensor of too many elements"
    ROWS = "holds a tensor whose rows do not match the runs"
    MISSING = "lacks a tensor"
    LENGTH = "is not as long as its tensors"
    PADDING = "has padding that is not zero"
    BOOL = "holds a truth value that is neither 0 nor 1"


class FrameRefused(FrameError):
    """A frame that breaks `rule`."""

    def __init__(self, rule: Rule, detail: str = "") -> None:
        super().__init__(f"frame {rule.value}: {detail}" if detail else f"frame {rule.value}")
        self.rule = rule


@dataclass(frozen=True, slots=True)
class TensorLimit:
    """What one named tensor may be. `last_dim` is exact; per token or run, the first dimension is their number.

    `max_elements` bounds everything that those do not. `kinds` empty: any kind of frame may hold it.
    """

    dtypes: tuple[str, ...]
    rank: int
    last_dim: int | None = None
    per_token: bool = False
    per_run: bool = False
    max_elements: int | None = None
    required: bool = False
    kinds: tuple[FrameKind, ...] = ()

    def __post_init__(self) -> None:
        if not self.dtypes or not ITEM_BYTES.keys() >= set(self.dtypes):
            raise ValueError(f"a tensor needs known dtypes, not {self.dtypes}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank {self.rank} is not 0 to {MAX_RANK}")
        if self.per_token and self.per_run:
            raise ValueError("rows go with the tokens or with the runs, not with both")
        rows = self.per_token or self.per_run
        if self.rank < rows + (self.last_dim is not None and not (rows and self.rank == 1)):
            raise ValueError(f"rank {self.rank} has no room for the dimensions that are fixed")
        if self.max_elements is None and self.rank > rows + (self.last_dim is not None):
            raise ValueError("a tensor that neither rows nor last_dim bound needs max_elements")

    def applies(self, kind: FrameKind) -> bool:
        return not self.kinds or kind in self.kinds

    def largest_bytes(self, max_tokens: int, max_runs: int) -> int:
        """Most bytes its payload can have."""
        known = [max_tokens] if self.per_token else [max_runs] if self.per_run else []
        if self.last_dim is not None and self.rank > len(known):
            known.append(self.last_dim)
        if len(known) == self.rank:
            elements = prod(known) if self.max_elements is None else min(prod(known), self.max_elements)
        else:
            assert self.max_elements is not None  # see __post_init__
            elements = self.max_elements
        return elements * max(ITEM_BYTES[dtype] for dtype in self.dtypes)


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """All that one link may carry. Give `max_bytes` only to be stricter than `largest()`."""

    deployment: DeploymentId
    epoch: int
    stage: int
    kinds: tuple[FrameKind, ...]
    max_runs: int
    slots: int
    context: int  # tokens of one slot
    max_tokens: int  # of all runs of one frame
    tensors: Mapping[str, TensorLimit] = field(default_factory=dict)
    max_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.deployment) != 32 or not HEX_DIGITS.issuperset(self.deployment):
            raise ValueError(f"deployment {self.deployment!r} is not 32 lower-case hex digits")
        for name in self.tensors:
            check_name(name)
        if min(self.max_runs, self.slots, self.context, self.max_tokens) < 1:
            raise ValueError(f"every bound of a link is at least 1: {self}")
        if not self.max_bytes:
            object.__setattr__(self, "max_bytes", self.largest())

    def largest(self) -> int:
        """Bytes of the largest frame allowed: the websocket's message limit."""
        header = HEADER.size + self.max_runs * RUN.size
        payload = 0
        for name, limit in self.tensors.items():
            header += TENSOR.size + limit.rank * SIZE.size + len(name)
            size = limit.largest_bytes(self.max_tokens, self.max_runs)
            payload += size + padding(size)
        return header + padding(header) + payload
