"""The forms a matrix can take, and the choice among them.

| quantize | where | form |
|---|---|---|
| int4, int8 | wherever onnxruntime runs | its MatMulNBits: blocks of 32 or 128 weights, each with a scale |
| int4, int8 | else | torch's own packed products |
| int4, int8 | on an accelerator | torch's product for CUDA in int4 where it has one, else unfolded as they are used |
| none | bfloat16, on processors with instructions for it | reordered once for oneDNN |
| none | else, and always in float32 | as it stands in the file |

Sums are taken in another order than torch's plain product takes them: float32 is never repacked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from peerllm.engine.place import CPU
from peerllm.types import BITS

log = logging.getLogger(__name__)
BLOCKS = (128, 32)  # weights that share a scale: the first that divides a row's length
SESSION_BYTES = 160 << 10  # onnxruntime's for one matrix, however small
BLOCK_BYTES = 8  # a block's scale and, which the products need, the sum of its codes


class Part(Protocol):
    """Some rows of a matrix, packed."""

    rows: int
    nbytes: int

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] in, [n, rows] out, in the inputs' dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Form:
    """`make` packs runs of float rows [rows, columns], joined; they may be views of files.

    `single_thread`: it has threads of its own, beside which torch's would only spin. `fuses`: whole blocks can be
    computed with it (fusing.py).
    """

    name: str
    make: Callable[[Sequence[Any]], Part]
    single_thread: bool = False
    fuses: bool = False
    device: torch.device = CPU


def block_of(columns: int) -> int | None:
    """How many weights share a scale; None: such a matrix is not quantised."""
    return next((block for block in BLOCKS if columns % block == 0), None)


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Memory of a quantised matrix: its codes and scales, and the session that multiplies with it.

    Of siblings that share a session a little more than they take, of a matrix in parts a little less.
    """
    block = block_of(columns)
    assert block is not None
    return rows * columns * bits // 8 + rows * (columns // block) * BLOCK_BYTES + SESSION_BYTES


def choose(dtype: torch.dtype, quantize: str, threads: int = 1, device: torch.device = CPU) -> Form | None:
    """The best form there; None: as it stands in the file."""
    if device != CPU:
        if not quantize:
            return None
        from peerllm.engine.kernels import unfolded

        return Form(f"{device.type}-{BITS[quantize]}", unfolded.maker(BITS[quantize], device), device=device)
    if quantize:
        bits = BITS[quantize]
        if _has_onnxruntime():
            from peerllm.engine.kernels import matmul_nbits

            return Form(f"MatMulNBits-{bits}", matmul_nbits.maker(bits, threads), single_thread=True, fuses=True)
        from peerllm.engine.kernels import torch_packed

        return Form(f"torch-{bits}", torch_packed.maker(bits))
    if dtype is torch.bfloat16 and _bfloat16_instructions():
        from peerllm.engine.kernels import reordered

        return Form("reordered", reordered.Reordered)
    return None


def bring_in() -> None:
    """Load the libraries now that packing may need: they count as part of the runtime."""
    _has_onnxruntime()


@lru_cache(maxsize=1)
def _has_onnxruntime() -> bool:
    """A broken installation is as good as none."""
    try:
        import onnx.helper  # noqa: F401
        import onnxruntime  # noqa: F401
    except Exception as error:  # libraries of C may fail in any way
        log.info("weights are rounded by torch alone here: onnxruntime cannot be used: %s", error)
        return False
    return True


def _bfloat16_instructions() -> bool:
    return torch.backends.mkldnn.is_available() and bool(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
