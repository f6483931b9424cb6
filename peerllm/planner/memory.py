"""Bytes beyond weights and KV: the working space of a pass, and how a prompt is cut so that it stays small."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.types import PACKING_COPIES

MAX_CHUNK = 128  # tokens of a prompt in one frame, unless more are asked for
MOST_CHUNK = 4096  # ... and then at most
MIN_CHUNK = 16
MASK_BYTES = 32 << 20  # the attention mask of one chunk over a full slot; fused attention keeps no scores
HIDDEN_COPIES = 8  # vectors of the hidden size alive at once in a block: residual, norm, queries, keys, values, output
WIDE_COPIES = 3  # vectors of the feed-forward width: gate, up and their product
KERNELS = 32  # matrix products that the library keeps compiled, each for one shape and count of tokens ...
KERNEL_BYTES = 1 << 20  # ... in 16-bit numbers (oneDNN 3.12, AVX-512: 0.6 to 0.8 MB and the holes they leave); else few
FLOAT_BYTES = 4  # rounded matrices take and give float32, whatever the compute dtype
SCALE_BYTES = 8 / 128  # per rounded weight: a block's scale and sum
DRAW_BYTES = 64  # per token id, while one token is drawn: scores in float64, their order and sums
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's shape its working space depends on."""

    hidden_size: int  # or what all heads' queries take, if that is more
    vocabulary: int
    wide: int  # feed-forward width
    itemsize: int  # bytes of a number in the compute dtype
    bits: int = 0  # that matrices are rounded to; 0: they are not


def chunk_tokens(shape: Shape, context: int) -> int:
    """Tokens of a prompt that travel in one frame: fewer where a full slot's mask would take much room."""
    return max(MIN_CHUNK, min(MAX_CHUNK, context, MASK_BYTES // max(1, context * shape.itemsize)))


def working_bytes(shape: Shape, context: int, slots: int, chunk: int | None = None) -> int:
    """The most that is held beside weights and KV.

    That is a chunk's vectors and mask, every slot's logits and kernels; or what loading takes, before there is KV.
    """
    chunk = chunk or chunk_tokens(shape, context)
    tokens = max(chunk, slots)
    vectors = HIDDEN_COPIES * shape.hidden_size + WIDE_COPIES * shape.wide
    mask = chunk * context
    logits = shape.vocabulary * (slots * (shape.itemsize + 4) + DRAW_BYTES)  # as computed and in float32
    kernels = KERNELS * KERNEL_BYTES if shape.itemsize == 2 else 0
    numbers = tokens * vectors * (FLOAT_BYTES if shape.bits else shape.itemsize)
    passes = numbers + mask * shape.itemsize + logits + kernels
    return max(passes, packing_bytes(shape))


def packing_bytes(shape: Shape) -> int:
    """What packing a block's output matrix and feed-forward takes for a while (engine/kernels/fusing)."""
    weights = (3 * shape.wide + shape.hidden_size) * shape.hidden_size
    return int(PACKING_COPIES * weights * (shape.bits / 8 + SCALE_BYTES)) if shape.bits else 0


def human_bytes(nbytes: float) -> str:
    """Three significant digits and a decimal unit: what a person reads."""
    size, unit = abs(float(nbytes)), 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{'-' if nbytes < 0 else ''}{size:.{digits}f} {UNITS[unit]}"
