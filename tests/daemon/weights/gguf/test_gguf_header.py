"""GGUF headers: what is in them is read as the gguf library reads it, and no damage does harm."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.daemon.weights.gguf.header import MAX_HEADER_BYTES, read_gguf
from peerllm.errors import ModelError
from tests.daemon.weights.gguf.gguf_bytes import (
    ARRAY,
    BOOL,
    CODES,
    I32,
    STRING,
    U16,
    U32,
    by_library,
    entry,
    header,
    info,
    padded,
    sample,
    text,
    written,
)
from tests.sizes import FULL

HUGE = [2**64 - 1, 2**63, 2**62, 2**40, 2**32, 2**31, 10**6, 4097]
# Python's objects for what a file holds: a string of two bytes takes ten in the file and 60 in a list.
MEMORY_PER_BYTE, MEMORY_BESIDE = 12, 128 << 10


def wrong(path: Path, raw: bytes) -> str:
    """The message for a file."""
    with pytest.raises(ModelError) as caught:
        read_gguf(written(path, raw))
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    assert len(said) < 400
    return said


def test_every_kind_of_value_and_the_places_of_tensors_are_read(tmp_path: Path) -> None:
    raw = sample()
    got = read_gguf(written(tmp_path / "m.gguf", raw))
    assert got.metadata["general.architecture"] == "llama"
    for kind in CODES:
        found = got.metadata[f"a.{kind}"]
        assert (found, type(found)) == (1, {"f": float, "d": float, "?": bool}.get(CODES[kind], int))
    assert list(got.metadata["an.array"]) == [-1, 2, 3]
    assert list(got.metadata["truths"]) == [1, 0, 1]
    assert got.metadata["tokens"] == ["<s>", "é", "", "▁tok"]
    start = len(raw) - 4096
    assert [(one.name, one.dtype, one.shape, one.offset, one.nbytes) for one in got.tensors.values()] == [
        ("token_embd.weight", "F32", (8, 64), start, 2048),
        ("blk.0.attn_q.weight", "Q8_0", (2, 32), start + 2048, 68),
        ("blk.0.ffn_up_exps.weight", "Q4_K", (2, 2, 256), start + 2144, 576),
    ]
    assert {one.path for one in got.tensors.values()} == {str(tmp_path / "m.gguf")}


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    metadata = {"llama.block_count": 3, "llama.eps": 1e-5, "tokens": ["a", "bé", ""], "kinds": [1, 2, 3], "yes": True}
    tensors = {"a.weight": np.ones((3, 5), np.float32), "b.weight": np.ones((2, 4, 6), np.float16)}
    path = by_library(tmp_path / "m.gguf", metadata, tensors)
    got, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key in metadata:
        mine = got.metadata[key]
        assert (mine if isinstance(mine, str | int | float) else list(mine)) == theirs.fields[key].contents()
    assert len(got.metadata) == len(metadata) + 1  # and the architecture
    for tensor in theirs.tensors:
        mine = got.tensors[tensor.name]
        assert (mine.offset, mine.nbytes, list(mine.shape)) == (
            tensor.data_offset, tensor.n_bytes, [int(side) for side in reversed(tensor.shape)],
        )  # fmt: skip


def test_the_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    entries = [entry("general.alignment", U32, 256)]
    raw = padded(header(entries, [info("a", [4], 0, 256)], version=2), 256)
    got = read_gguf(written(tmp_path / "m.gguf", raw + bytes(512)))
    assert got.tensors["a"].offset == len(raw) + 256


DAMAGES: list[tuple[bytes, str]] = [
    (b"", "0 bytes"),
    (b"GGML" + bytes(40), "does not start with GGUF"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "claims 9223372036854775808 values"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + bytes(99), "claims 1099511627776 tensors"),
    (header([text(b"k" * 70_000) + struct.pack("<IB", 0, 1)], []), "70000 bytes"),
    (header([entry(b"\xff\xfe", U32, 1)], []), "no UTF-8"),
    (header([entry("k", STRING, b"\xff\xfe")], []), "'k' is no UTF-8"),
    (header([entry("k", ARRAY, (STRING, ["a", b"\xff\xfe"]))], []), "'k' is no UTF-8"),
    (header([entry("k", U32, 1), entry("k", U32, 1)], []), "'k' twice"),
    (header([text("k") + struct.pack("<IQ", 77, 0)], []), "unknown kind 77"),
    (header([text("k") + struct.pack("<IIQ", ARRAY, 77, 1) + bytes(9)], []), "unknown kind 77"),
    (header([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) * 40], []), "'k' of arrays"),
    (header([text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**60)], []), "strings in 'k'"),
    (header([text("k") + struct.pack("<IIQ", ARRAY, I32, 2**62)], []), "values of 'k'"),
    (header([text("k") + struct.pack("<IIQQQ", ARRAY, STRING, 2, 0, 2**64 - 1)], []), "goes on behind"),
    (header([text("k") + struct.pack("<IQ", STRING, 2**64 - 1)], []), "goes on behind"),
    (header([entry("general.alignment", U32, 0)], []), "alignment is 0"),
    (header([entry("general.alignment", U32, 48)], []), "alignment is 48"),
    (header([entry("general.alignment", STRING, "x")], []), "alignment is x"),
    (header([], [info("a", [], 0, 0)]) + bytes(64), "0 dimensions"),
    (header([], [info("a", [1] * 5, 0, 0)]), "5 dimensions"),
    (header([], [info("a", [4, 0], 0, 0)]), "shape [0, 4]"),
    (header([], [info("a", [2**60, 2**60], 0, 0)]), "'a' has shape"),
    (header([], [info("a", [4], 4242, 0)]), "'a' as type 4242"),
    (header([], [info("a", [256], 16, 0)]), "'a' as IQ2_XXS"),
    (header([], [info("a", [33], 8, 0)]), "rows of 33"),
    (header([], [info("a" * 300, [4], 0, 0)]), "300 bytes"),
    (header([], [info(b"\xff\xfe", [4], 0, 0)]), "no UTF-8"),
    (padded(header([], [info("a", [4], 0, 0), info("a", [4], 0, 32)])) + bytes(64), "'a' twice"),
    (padded(header([], [info("a", [9], 0, 0), info("b", [4], 0, 32)])) + bytes(64), "'a' and 'b' overlap"),
    (padded(header([], [info("a", [4], 0, 64)])) + bytes(64), "cut short"),
    (padded(header([], [info("a", [4], 0, 2**64 - 8)])) + bytes(64), "cut short"),
]


@pytest.mark.parametrize(("raw", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_damage_is_named_in_one_line(raw: bytes, said: str, tmp_path: Path) -> None:
    assert said in wrong(tmp_path / "m.gguf", raw)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.gguf cannot be read"):
        read_gguf(tmp_path / "gone.gguf")


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    """A sparse file of zeros would be empty strings for hours."""
    count = MAX_HEADER_BYTES // 8
    path = written(tmp_path / "m.gguf", header([text("k") + struct.pack("<IIQ", ARRAY, STRING, count)], []))
    with path.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="in 1099511627776 bytes"):
        read_gguf(path)
    path.write_bytes(header([text("k") + struct.pack("<IQ", STRING, MAX_HEADER_BYTES)], []))
    with path.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="header of more than 100 MB"):
        read_gguf(path)


def test_a_file_cut_at_any_byte_is_named(tmp_path: Path) -> None:
    raw = sample(2144 + 576)
    read_gguf(written(tmp_path / "m.gguf", raw))
    for end in range(len(raw) - 2720):
        assert any(one in wrong(tmp_path / "m.gguf", raw[:end]) for one in ("cut short", "is no GGUF file")), end
    for end in range(len(raw) - 2720, len(raw), 97):
        assert "cut short" in wrong(tmp_path / "m.gguf", raw[:end])


def harmless(path: Path, raw: bytes) -> None:
    """The file is read as one whose tensors lie in it, or one line says why not; memory is as the file's size."""
    written(path, raw)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    said, got = "", None
    try:
        got = read_gguf(path)
    except ModelError as error:
        said = str(error)
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before <= MEMORY_BESIDE + MEMORY_PER_BYTE * len(raw)
    assert "\n" not in said
    assert len(said) < 400
    for tensor in got.tensors.values() if got else ():
        assert 0 < tensor.offset < tensor.offset + tensor.nbytes <= len(raw)


SAMPLES = [sample(4096), sample(2720), sample(1 << 16)]


def damaged(draw: random.Random) -> bytes:
    """A sample with flipped bytes, huge numbers, a piece cut out or doubled, or anything behind the magic."""
    raw, end = bytearray(draw.choice(SAMPLES)), len(sample(0))
    start, length = draw.randrange(4, end), draw.randint(1, 40)
    match draw.randrange(6):
        case 0:
            del raw[start : start + length]
        case 1:
            raw[start:start] = raw[start : start + length]
        case 2:
            raw[8:] = draw.randbytes(draw.randrange(400))
        case _:
            for _ in range(draw.randint(1, 4)):
                some = struct.pack("<Q", draw.choice(HUGE)) if draw.random() < 0.4 else draw.randbytes(1)
                place = draw.randrange(4, end)
                raw[place : place + len(some)] = some
    return bytes(raw)


def test_no_damage_does_harm(tmp_path: Path) -> None:
    tracemalloc.start()
    try:

        @settings(max_examples=600 if FULL else 40, database=None)
        @given(seed=st.integers(0, 2**64))
        def ten(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(10):
                harmless(tmp_path / "m.gguf", damaged(draw))

        ten()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "filling",
    [
        (STRING, [f"{number:02}" for number in range(100)] * 300),
        (STRING, [""] * 40_000),
        (U16, list(range(50_000))),
        (BOOL, [True] * 50_000),
    ],
    ids=["short strings", "empty strings", "numbers", "booleans"],
)
def test_memory_is_as_the_header_is_large(filling: tuple[int, list[object]], tmp_path: Path) -> None:
    raw = header([entry("k", ARRAY, filling)], [])
    tracemalloc.start()
    try:
        harmless(tmp_path / "m.gguf", raw)
    finally:
        tracemalloc.stop()
    assert len(read_gguf(tmp_path / "m.gguf").metadata["k"]) == len(filling[1])


def test_more_tensors_than_one_assignment_may_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "m.gguf", sample())
    assert len(read_gguf(file).tensors) == 3
    monkeypatch.setattr("peerllm.daemon.weights.gguf.header.MAX_TENSORS", 2)
    with pytest.raises(ModelError, match="has 3 tensors; at most 2 are taken"):
        read_gguf(file)
