"""Quantised matrices on an accelerator: kept rounded, unfolded some rows at a time as they are multiplied with.

That runs wherever torch does and saves memory, not time: each weight is written and read again several times. Where
torch has a product of rounded weights itself (`Tiled`), one is tried before it is relied on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch.nn.functional import linear

from peerllm.engine.kernels.forms import Part, block_of
from peerllm.engine.kernels.packing import TILE_ROWS
from peerllm.engine.kernels.rounding import apart, rounded

ROWS_BYTES = 16 << 20  # of rows in the inputs' dtype that are unfolded at once
TILES = 8, 4, 2  # layouts of torch's: so many times 16 columns of a row lie together
TILE_COLUMNS = 16
TRIED_ROWS, TRIED_COLUMNS = 64, 1024
CLOSE = 0.02  # how far a product tried may be off, of its largest number: bfloat16's rounding and more

log = logging.getLogger(__name__)


def maker(bits: int, device: torch.device) -> Callable[[Sequence[torch.Tensor]], Part]:
    """Packs rows into the device's memory."""
    tiled = bits == 4 and _has_tiled(device)

    def make(rows: Sequence[torch.Tensor]) -> Part:
        block = block_of(rows[0].shape[1])
        assert block is not None
        codes, scales = rounded(rows, bits, block)
        if tiled and len(codes) % TILE_ROWS == 0 and _tiles(rows[0].shape[1]):
            return Tiled(codes, scales, block, device)
        return Unfolded(codes, scales, bits, device)

    return make


class Unfolded:
    """Some rows of a matrix, with a scale per block."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: int, device: torch.device) -> None:
        self.rows = len(codes)
        self._codes, self._scales, self._bits = codes.to(device), scales.to(device), bits
        self.nbytes = codes.nbytes + scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        step = max(1, ROWS_BYTES // (inputs.shape[1] * inputs.itemsize))
        outs = [
            linear(inputs, self._rows(codes, scales, inputs.dtype))
            for codes, scales in zip(torch.split(self._codes, step), torch.split(self._scales, step), strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _rows(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Floats [rows, columns]."""
        whole = apart(codes) if self._bits == 4 else codes
        blocks = (
            whole.view(*scales.shape, -1).to(dtype).sub_(1 << (self._bits - 1))
        )  # whole numbers, exact in any dtype
        return blocks.mul_(scales.to(dtype).unsqueeze(2)).flatten(1)


class Tiled:
    """Some rows of a matrix in 4 bits, in the layout of torch's own product for CUDA."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, block: int, device: torch.device) -> None:
        self.rows = len(codes)
        self._block, tiles = block, _tiles(codes.shape[1] * 2)
        turned = (codes >> 4) | (codes << 4)  # torch has the first of two in the upper half
        self._packed = torch.ops.aten._convert_weight_to_int4pack(turned.to(device), tiles)
        halves = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=2)
        self._scales = halves.to(torch.bfloat16).contiguous().to(device)
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        given = inputs.to(torch.bfloat16).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(given, self._packed, self._block, self._scales)
        return out.to(inputs.dtype)


def _tiles(columns: int) -> int:
    """The largest layout for rows of so many columns; 0: none."""
    return next((tiles for tiles in TILES if columns % (tiles * TILE_COLUMNS) == 0), 0)


@lru_cache(maxsize=8)
def _has_tiled(device: torch.device) -> bool:
    """Whether torch's product runs on this device and says what ours says."""
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(TRIED_ROWS, TRIED_COLUMNS, generator=generator)
    inputs = torch.randn(3, TRIED_COLUMNS, generator=generator).to(device, torch.bfloat16)
    block = block_of(TRIED_COLUMNS)
    assert block is not None
    codes, scales = rounded([weights], 4, block)
    try:
        ours = Unfolded(codes, scales, 4, device)(inputs).float()
        theirs = Tiled(codes, scales, block, device)(inputs).float()
        good = bool((ours - theirs).abs().max() <= CLOSE * ours.abs().max())
    except RuntimeError as error:  # too old a device, or torch was built without it
        log.info("weights of 4 bits are unfolded on %s: %s", device, error)
        return False
    if not good:
        log.warning("torch's product of 4-bit weights is wrong on %s; they are unfolded instead", device)
    return good
