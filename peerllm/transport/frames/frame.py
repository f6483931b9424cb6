"""What a frame is: a kind, an address (deployment, epoch, stage), runs of sequences, named tensors."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod

from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import DeploymentId

MAX_NAME_BYTES = 32
MAX_RANK = 8
MAX_U32 = 2**32 - 1
NAME_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + "_.")


class FrameKind(IntEnum):
    ACTIVATION = 1  # hidden states for the next stage
    TOKEN = 2  # picked token ids, on the way back to the source
    RELEASE = 3  # the slots of these sequences are free
    OPEN = 4  # a sequence begins: what the head must know to sample it
    PARTIAL = 5  # one device's share of a sum over several
    KEY_VALUE = 6  # what a slot keeps, on its way to another device
    GRADIENT = 7  # of hidden states, on the way back through the stages
    ECHO = 8  # nothing but bytes, to time a link with
    MASK = 9  # which tokens the head may pick, from the source


# Element types, named as in safetensors; on the wire they are counted from 1.
ITEM_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8, "F64": 8, "BOOL": 1}
DTYPE_CODES = {dtype: code for code, dtype in enumerate(ITEM_BYTES, start=1)}
DTYPES_BY_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


def check_name(name: str) -> None:
    """ValueError unless a tensor may have this name."""
    if not 1 <= len(name) <= MAX_NAME_BYTES or not NAME_CHARACTERS.issuperset(name):
        raise ValueError(f"tensor name {name!r} is not 1 to {MAX_NAME_BYTES} of a-z 0-9 _ .")


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """`data` are the elements in row-major order, little-endian, as flat bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name} has the unknown dtype {self.dtype!r}")
        if len(self.shape) > MAX_RANK or not all(1 <= size <= MAX_U32 for size in self.shape):
            raise ValueError(f"tensor {self.name} has the shape {self.shape}")
        if self.data.nbytes != prod(self.shape) * ITEM_BYTES[self.dtype]:
            raise ValueError(f"tensor {self.name}: {self.data.nbytes} bytes are not {self.dtype} {self.shape}")

    @classmethod
    def of(cls, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview) -> NamedTensor:
        """From anything contiguous with a buffer; nothing is copied."""
        view = memoryview(data)
        return cls(name, dtype, tuple(shape), view if view.format == "B" and view.ndim == 1 else view.cast("B"))


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
    deployment: DeploymentId
    epoch: int  # u32
    stage: int  # u16: whom it is for; the number of stages stands for the way back to the source
    runs: tuple[TokenRun, ...]
    tensors: tuple[NamedTensor, ...] = ()

    def tensor(self, name: str) -> NamedTensor | None:
        """The tensor of that name, if the frame holds it."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)
