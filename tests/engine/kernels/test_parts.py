"""Packed matrices against plain products of the same rounded weights, and what rounding may change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine.kernels import matmul_nbits, reordered, torch_packed
from peerllm.engine.kernels.forms import block_of, choose, packed_bytes
from peerllm.engine.kernels.packed import Packed, Share, Siblings
from peerllm.engine.kernels.rounding import apart, nibbles, rounded

shapes = st.tuples(st.integers(1, 70), st.sampled_from([32, 64, 96, 128, 160, 256, 384]))


def restored(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that the codes stand for."""
    block = block_of(rows.shape[1])
    codes, scales = rounded([rows], bits, block)
    codes = apart(codes) if bits == 4 else codes
    return ((codes.float() - (1 << (bits - 1))).view(len(rows), -1, block) * scales.unsqueeze(2)).view(rows.shape)


@given(shapes, st.sampled_from([4, 8]), st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 300.0]))
@settings(deadline=None)
def test_rounding_moves_a_weight_by_no_more_than_a_step(shape, bits, seed, size):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    rows[:, : shape[1] // 2] *= rows[:, : shape[1] // 2].abs() > size  # some blocks of zeros
    block = block_of(shape[1])
    codes, scales = rounded([rows], bits, block)
    codes = apart(codes) if bits == 4 else codes
    step = scales.abs().repeat_interleave(block, 1)
    away = (restored(rows, bits) - rows).abs()
    assert (away <= step * 1.001).all(), "a step only where the range has no code for the largest of the other sign"
    assert ((away <= 0.501 * step) | (codes == (1 << bits) - 1)).all()
    largest = rows.view(shape[0], -1, block).abs().amax(2)
    assert torch.allclose(restored(rows, bits).view(shape[0], -1, block).abs().amax(2), largest, rtol=1e-5)


def test_nibbles_stand_in_order():
    assert nibbles(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0xF3]]
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    assert torch.equal(apart(nibbles(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 96), (130, 256)])
def test_products_with_rounded_weights(bits, dtype, shape):
    torch.manual_seed(0)
    rows = torch.randn(shape) * 0.05
    for maker in (matmul_nbits.maker(bits, 1), torch_packed.maker(bits)):
        part = maker([rows[:5].to(dtype), rows[5:].to(dtype)])
        for count in (1, 2, 7, 40):
            inputs = torch.randn(count, shape[1]).to(dtype)
            got, want = part(inputs), inputs.float() @ rows.T
            assert got.dtype == dtype and got.shape == (count, shape[0])
            allowed = {4: 0.16, 8: 0.03}[bits]
            assert (got.float() - want).norm() <= allowed * want.norm()


def test_inputs_need_not_be_contiguous():
    rows = torch.randn(32, 64)
    part = matmul_nbits.maker(8, 1)([rows])
    wide = torch.randn(6, 128)
    assert torch.equal(part(wide[::2, ::2]), part(wide[::2, ::2].contiguous()))


@pytest.mark.skipif(choose(torch.bfloat16, "") is None, reason="this processor has no bfloat16 instructions")
def test_reordered_matrices_are_the_same_matrices():
    rows = torch.randn(200, 96).bfloat16()
    part = reordered.Reordered([rows])
    for count in (1, 3, 50):
        inputs = torch.randn(count, 96).bfloat16()
        assert torch.allclose(part(inputs).float(), inputs.float() @ rows.float().T, rtol=2e-2, atol=0.1)


def test_float32_is_never_repacked():
    assert choose(torch.float32, "") is None and choose(torch.float16, "") is None


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_memory_is_what_was_promised(quantize):
    form = choose(torch.float32, quantize)
    assert form is not None
    assert form.make([torch.randn(64, 256)]).nbytes == packed_bytes(64, 256, {"int4": 4, "int8": 8}[quantize])


def test_siblings_are_one_product_and_keep_nothing():
    first, second = torch.randn(3, 32), torch.randn(5, 32)
    calls = []

    def part(inputs: torch.Tensor) -> torch.Tensor:
        calls.append(len(inputs))
        return inputs @ torch.cat([first, second]).T

    part.rows, part.nbytes = 8, 1
    siblings = Siblings(Packed([part], None), 2)
    one, other = Share(siblings, 0, 3), Share(siblings, 3, 5)
    for shape in ((1, 4, 32), (1, 1, 32), (6, 32)):
        inputs = torch.randn(shape)
        assert torch.allclose(one(inputs), inputs @ first.T, atol=1e-5)
        assert torch.allclose(other(inputs), inputs @ second.T, atol=1e-5)
        assert siblings._input is None and siblings._output is None
    assert calls == [4, 1, 6]
    one(torch.randn(1, 32))  # a pass that broke off in between
    inputs = torch.randn(2, 32)
    assert torch.allclose(other(inputs), inputs @ second.T, atol=1e-5), "not the output of another input"
