"""Rounded weights, and products with them, against the weights they stand for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerllm.engine.graph.nodes import make_pool
from peerllm.engine.kernels.products import NBits
from peerllm.engine.weights import rounding
from peerllm.engine.weights.rounding import block_of, nibbles, rounded

shapes = st.tuples(st.integers(1, 70), st.sampled_from([32, 64, 96, 128, 160, 256, 384]))


def apart(codes):
    """What `nibbles` put together: [rows, columns]."""
    return np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)


def random(shape: tuple[int, ...], seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def restored(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The weights that the codes stand for."""
    codes = apart(codes) if bits == 4 else codes
    blocks = codes.astype(np.float32).reshape(*scales.shape, -1) - (1 << (bits - 1))
    with np.errstate(invalid="ignore"):
        return (blocks * scales[:, :, None]).reshape(len(codes), -1)


@given(shapes, st.sampled_from([4, 8]), st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 300.0]))
def test_rounding_moves_a_weight_by_no_more_than_a_step(shape, bits, seed, size):
    rows = random(shape, seed, size)
    rows[:, : shape[1] // 2] *= np.abs(rows[:, : shape[1] // 2]) > size  # some blocks of zeros
    block = block_of(shape[1])
    codes, scales = rounded(rows, bits, block)
    got = restored(codes, scales, bits)
    step = np.abs(scales).repeat(block, 1)
    away = np.abs(got - rows)
    assert (away <= step * 1.001).all(), "a step only where the range has no code for the largest of the other sign"
    most = (apart(codes) if bits == 4 else codes) == (1 << bits) - 1
    assert ((away <= 0.501 * step) | most).all()
    largest = [np.abs(some).reshape(shape[0], -1, block).max(2) for some in (got, rows)]
    assert np.allclose(*largest, rtol=1e-5)


def test_of_two_largest_the_first_gives_the_scale_its_sign():
    rows = np.zeros((2, 32), np.float32)
    rows[0, 3], rows[0, 9] = 2, -2
    rows[1, 3], rows[1, 9] = -2, 2
    _, scales = rounded(rows, 8, 32)
    assert scales.tolist() == [[-2 / 128], [2 / 128]]


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_and_types_make_no_difference(bits, monkeypatch):
    rows = random((50, 256)).astype(ml_dtypes.bfloat16)
    codes, scales = rounded(rows.astype(np.float32), bits, 128)
    monkeypatch.setattr(rounding, "PIECE_BYTES", 7 * 256 * 4)
    for same in (rows, np.asfortranarray(rows), rows.astype(np.float64)):
        again = rounded(same, bits, 128)
        assert np.array_equal(codes, again[0]) and np.array_equal(scales, again[1])
    narrow = rows[:, :32]
    codes, scales = rounded(narrow, bits, 32)
    assert np.array_equal(codes, rounded(np.asfortranarray(narrow), bits, 32)[0]), "a row of one block"


@pytest.mark.parametrize("weight", [np.inf, np.nan, 1e-40])
def test_odd_weights_spoil_no_other_block(weight):
    rows = random((3, 64))
    want = restored(*rounded(rows, 8, 32), 8)
    rows[1, 40] = weight
    if weight == 1e-40:
        rows[1, 32:] = weight
    got = restored(*rounded(rows, 8, 32), 8)
    assert np.array_equal(got[[0, 2]], want[[0, 2]]) and np.array_equal(got[1, :32], want[1, :32])
    assert np.isfinite(got[1]).all() == (weight == 1e-40)


def test_nibbles_stand_in_order():
    assert nibbles(np.array([[1, 2, 3, 15]], np.uint8)).tolist() == [[0x21, 0xF3]]
    codes = np.random.default_rng(0).integers(0, 16, (3, 8), np.uint8)
    assert np.array_equal(apart(nibbles(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 96), (130, 256)])
def test_products_with_rounded_weights(bits, dtype, shape):
    make_pool(1)
    rows = random(shape, size=0.05)
    part = NBits(*rounded(rows, bits, block_of(shape[1])), bits)
    for count in (1, 2, 7, 40):
        wide = torch.randn(count, 2 * shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
        inputs = wide[:, ::2]  # need not be contiguous
        got, want = part(inputs), inputs.float() @ torch.from_numpy(rows).T
        assert got.dtype == dtype and got.shape == (count, shape[0])
        assert (got.float() - want).norm() <= {4: 0.16, 8: 0.03}[bits] * want.norm()
