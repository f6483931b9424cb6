"""How GGML's block types lie in a file, and their unpacking to whole numbers with scales; facts of the file format.

Each function takes blocks uint8 [n, bytes of a block] and gives codes uint8 [n, bytes of codes], scales float32
[n, scales of a block], and minima [n, scales of a block] where the type has them. Codes and scales are in the order of
the weights; of 4 bits two codes are in a byte, the first in the lower half (see CodedRows).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Unpacked = tuple[Bytes, Floats, Floats | None]

LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
PAIRS = np.uint64(0x0303030303030303)
ONES = np.uint64(0x0101010101010101)
FOUR = np.uint64(4)
SIGNS = np.uint64(0x8080808080808080)  # turns a signed byte into a code whose zero is 128
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # of IQ4_*
MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the numbers


@dataclass(frozen=True, slots=True)
class BlockType:
    """The whole numbers of one GGML type: their bits, how many share a scale, and whether there are zeros and minima.

    Codes without zeros have 2^(bits - 1) for zero, so that the type's own offset is part of the codes.
    """

    bits: int
    block: int
    unpack: Callable[[Bytes], Unpacked]
    zeros: bool = False  # the zero is 0
    minima: bool = False


def _words(blocks: Bytes, start: int, stop: int) -> Words:
    """Bytes start..stop of each block as 64-bit words [n, words]."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.uint64)


def _floats(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _bytes(words: Words) -> Bytes:
    """Words [n, …] as bytes [n, …]."""
    return words.reshape(len(words), -1).view(np.uint8)


def _interleaved(words: Words, run: int) -> Words:
    """Words of bytes with two 4-bit numbers: [n, runs, 2, run], first the lower halves of a run of words, then the
    upper ones.
    """
    out = np.empty((len(words), words.shape[1] // run, 2, run), np.uint64)
    apart = words.reshape(len(words), -1, run)
    np.bitwise_and(apart, LOW, out=out[:, :, 0])
    np.bitwise_and(apart >> FOUR, LOW, out=out[:, :, 1])
    return out


def _nibbles(words: Words) -> Bytes:
    """Words of 4-bit numbers, one in a byte: two in a byte, [n, …]."""
    joined = (words | (words >> FOUR)).reshape(len(words), -1).view("<u2")
    return joined.astype(np.uint8)  # keeps the lower byte of each pair


def _levels(words: Words, levels: npt.NDArray[np.int8]) -> Bytes:
    """Words of 4-bit numbers, one in a byte, looked up among 16 levels: codes [n, …]."""
    return np.take(levels.view(np.uint8) ^ np.uint8(128), _bytes(words))


def _six_bits(blocks: Bytes, start: int) -> tuple[Floats, Floats]:
    """The eight scales and minima of Q4_K and Q5_K, 6 bits each in 12 bytes, multiplied by the block's: [n, 8]."""
    packed = blocks[:, start : start + 12]
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales, minima = (np.empty((len(blocks), 8), np.uint8) for _ in range(2))
    scales[:, :4], minima[:, :4] = first & 63, second & 63
    scales[:, 4:] = (rest & 15) | ((first >> 2) & 48)
    minima[:, 4:] = (rest >> 4) | ((second >> 2) & 48)
    return _floats(blocks, 0) * scales, _floats(blocks, 2) * minima


def _q4_0(blocks: Bytes) -> Unpacked:
    return _nibbles(_interleaved(_words(blocks, 2, 18), 2)), _floats(blocks, 0), None


def _q4_1(blocks: Bytes) -> Unpacked:
    return _nibbles(_interleaved(_words(blocks, 4, 20), 2)), _floats(blocks, 0), -_floats(blocks, 2)


def _fifth_bits(blocks: Bytes, start: int) -> Words:
    """The 32 bits from byte `start` on, each as 16 in a byte of its own: [n, 4]."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=1, bitorder="little")
    return bits.view(np.uint64) << FOUR


def _q5_0(blocks: Bytes) -> Unpacked:
    codes = _interleaved(_words(blocks, 6, 22), 2).reshape(-1, 4) | _fifth_bits(blocks, 2)
    return _bytes(codes + ONES * np.uint64(112)), _floats(blocks, 0), None


def _q5_1(blocks: Bytes) -> Unpacked:
    codes = _interleaved(_words(blocks, 8, 24), 2).reshape(-1, 4) | _fifth_bits(blocks, 4)
    return _bytes(codes ^ SIGNS), _floats(blocks, 0), -_floats(blocks, 2)


def _q8_0(blocks: Bytes) -> Unpacked:
    return _bytes(_words(blocks, 2, 34) ^ SIGNS), _floats(blocks, 0), None


def _two_bits(words: Words) -> Words:
    """Words with four 2-bit numbers in each byte, in runs of four words: [n, runs, 4, 4], by their place in a byte."""
    apart = words.reshape(len(words), -1, 4)
    out = np.empty((len(words), apart.shape[1], 4, 4), np.uint64)
    for place in range(4):
        np.bitwise_and(apart >> np.uint64(2 * place), PAIRS, out=out[:, :, place])
    return out


def _q2_k(blocks: Bytes) -> Unpacked:
    codes = _two_bits(_words(blocks, 16, 80)) + ONES * np.uint64(8)
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return _nibbles(codes), _floats(blocks, 80) * scales, _floats(blocks, 82) * minima


def _q3_k(blocks: Bytes) -> Unpacked:
    codes = _two_bits(_words(blocks, 32, 96)).reshape(-1, 8, 4)
    third = _words(blocks, 0, 32)
    for place in range(8):
        codes[:, place] |= ((third >> np.uint64(place)) & ONES) << np.uint64(2)
    codes += ONES * np.uint64(4)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate((low & 15, low >> 4), axis=1)
    for place in range(4):
        scales[:, 4 * place : 4 * place + 4] |= ((high >> (2 * place)) & 3) << 4
    return _nibbles(codes), _floats(blocks, 108) * (scales.view(np.int8) - np.int8(32)), None


def _q4_k(blocks: Bytes) -> Unpacked:
    return _nibbles(_interleaved(_words(blocks, 16, 144), 4)), *_six_bits(blocks, 4)


def _q5_k(blocks: Bytes) -> Unpacked:
    codes = _interleaved(_words(blocks, 48, 176), 4).reshape(-1, 8, 4)
    fifth = _words(blocks, 16, 48)
    for place in range(8):
        codes[:, place] |= ((fifth >> np.uint64(place)) & ONES) << FOUR
    codes ^= SIGNS
    return _bytes(codes), *_six_bits(blocks, 4)


def _q6_k(blocks: Bytes) -> Unpacked:
    low = _interleaved(_words(blocks, 0, 128), 8).reshape(-1, 8, 4)
    high = _two_bits(_words(blocks, 128, 192)).reshape(-1, 8, 4)
    codes = (low | (high << FOUR)) + ONES * np.uint64(96)
    return _bytes(codes), _floats(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _iq4_nl(blocks: Bytes) -> Unpacked:
    return _levels(_interleaved(_words(blocks, 2, 18), 2), LEVELS), _floats(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Unpacked:
    codes = _levels(_interleaved(_words(blocks, 8, 136), 2), LEVELS)
    low, high = blocks[:, 4:8], np.ascontiguousarray(blocks[:, 2:4]).view("<u2")  # [n, 4], [n, 1]
    scales = np.stack((low & 15, low >> 4), axis=2).reshape(-1, 8)
    scales |= (((high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3) << 4).astype(np.uint8)
    return codes, _floats(blocks, 0) * (scales.view(np.int8) - np.int8(32)), None


def _mxfp4(blocks: Bytes) -> Unpacked:
    power = blocks[:, :1].astype(np.int32) - 128  # levels are twice the numbers
    return _levels(_interleaved(_words(blocks, 1, 17), 2), MXFP4), np.ldexp(np.float32(1), power), None


BLOCK_TYPES = {
    "Q4_0": BlockType(4, 32, _q4_0), "Q4_1": BlockType(4, 32, _q4_1, zeros=True, minima=True),
    "Q5_0": BlockType(8, 32, _q5_0), "Q5_1": BlockType(8, 32, _q5_1, minima=True), "Q8_0": BlockType(8, 32, _q8_0),
    "Q2_K": BlockType(4, 16, _q2_k, minima=True), "Q3_K": BlockType(4, 16, _q3_k),
    "Q4_K": BlockType(4, 32, _q4_k, zeros=True, minima=True), "Q5_K": BlockType(8, 32, _q5_k, minima=True),
    "Q6_K": BlockType(8, 16, _q6_k), "IQ4_NL": BlockType(8, 32, _iq4_nl), "IQ4_XS": BlockType(8, 32, _iq4_xs),
    "MXFP4": BlockType(8, 32, _mxfp4),
}  # fmt: skip
