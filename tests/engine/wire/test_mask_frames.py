"""Masks as frames: whatever they allow comes back bit for bit, and what is none is refused before it takes memory."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest

from peerllm.engine.wire.parcels import (
    MAX_MASK_BYTES,
    Masked,
    from_frame,
    head_limits,
    source_limits,
    stage_limits,
    to_frame,
)
from peerllm.errors import FrameError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame, NamedTensor
from tests.engine.fakes import DEPLOYMENT, stage
from tests.transport.frames_support import encode

HEAD = stage(1, epoch=3, stage=2, stages=3)
LIMITS = head_limits(HEAD)


def framed(mask: bytes) -> Frame:
    return to_frame(Masked(7, 1, 9, mask), DEPLOYMENT, 3, 2)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("nbytes", [1, 257, 6144, 32_768, MAX_MASK_BYTES - 100])
def test_a_mask_comes_as_it_went(share: float, nbytes: int) -> None:
    chance = random.Random(nbytes)
    bits = sum((chance.random() < share) << at for at in range(8 * min(nbytes, 300)))
    mask = bits.to_bytes(min(nbytes, 300), "little").ljust(nbytes, b"\xff")
    data = encode(framed(mask))
    assert from_frame(decode(data, LIMITS)) == [Masked(7, 1, 9, mask)]
    assert len(data) < 500 + nbytes // 100, "most of a mask is alike"


def test_a_mask_without_order_fits_too() -> None:
    mask = random.Random(1).randbytes(MAX_MASK_BYTES - 1000)
    assert from_frame(decode(encode(framed(mask)), LIMITS)) == [Masked(7, 1, 9, mask)]


@pytest.mark.parametrize(
    "data",
    [
        b"no stream",
        zlib.compress(bytes(MAX_MASK_BYTES + 1)),  # 150 bytes
        zlib.compress(bytes(1 << 27)),
        zlib.compress(bytes(99))[:-3],
        zlib.compress(bytes(99)) + b"more",
    ],
    ids=["none", "too long", "far too long", "cut off", "more behind"],
)
def test_what_cannot_be_inflated_is_refused(data: bytes) -> None:
    frame = replace(framed(b"\1"), tensors=(NamedTensor.of("mask", "U8", (len(data),), data),))
    with pytest.raises(FrameError, match="mask"):
        from_frame(decode(encode(frame), LIMITS))


def test_only_the_head_takes_masks_in() -> None:
    data = encode(framed(b"\1"))
    for limits in (stage_limits(HEAD, 8), replace(source_limits(HEAD, 8), stage=2)):
        with pytest.raises(FrameError, match="kind"):
            decode(data, limits)
    for other in (replace(framed(b"\1"), epoch=2), replace(framed(b"\1"), stage=1)):
        with pytest.raises(FrameError):
            decode(encode(other), LIMITS)
    with pytest.raises(FrameError, match="lacks a tensor"):
        decode(encode(replace(framed(b"\1"), tensors=())), LIMITS)
