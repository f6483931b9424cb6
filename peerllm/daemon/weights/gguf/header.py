"""The header of a GGUF file: metadata and where each tensor lies. No weights are read.

The gguf library's GGUFReader is not used here: it makes an array object of every string (a vocabulary of 262,000 tokens
takes it seconds), and it loops as often as a count in the file says, past the file's end.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.regular_files import open_regular
from peerllm.stored_types import STORED_TYPES, stored_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32  # bytes
FIRST_BYTES = 16 << 20  # read at first: most headers are smaller
MAX_HEADER_BYTES = 100 << 20  # Python's strings take several times what they take in the file; 15 MB is the most seen
MAX_NAME_BYTES = 1 << 16  # of keys and of tensors' names, as the format says
MAX_TENSOR_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 16  # as one assignment may name
MOST_SHOWN = 60  # characters of a name in a message
# The metadata's kinds of numbers, by their number in the format: codes of struct and array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
U32, U64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from
LEAST_VALUE, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes that one entry takes at the least


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What the header says; tensors by llama.cpp's names, in the order of the file."""

    path: Path
    metadata: Mapping[str, Any]  # arrays are lists of strings and array.array of numbers (of 0 and 1 for booleans)
    tensors: Mapping[str, TensorAt]


def read_gguf(path: Path) -> GGUFHeader:
    """Read a file's header; ModelError says in one line what is wrong with it."""
    try:
        with open_regular(path) as file:  # read, not mapped: a file that shrinks meanwhile would kill the process
            size, wanted = file.seek(0, 2), FIRST_BYTES
            if size < 24:
                raise ModelError(f"{path.name} is no GGUF file ({size} bytes)")
            while True:
                file.seek(0)
                data = file.read(min(wanted, size))
                size = size if len(data) == min(wanted, size) else len(data)
                try:
                    return _Walk(path, data, size).header()
                except _MoreNeededError:
                    wanted *= 4
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error


class _MoreNeededError(Exception):
    """The header goes on behind the bytes that were read."""


class _Walk:
    """Reads one value after the other; whatever would pass the end of the file is a ModelError before it is read."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._end = min(size, MAX_HEADER_BYTES)
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._data[:4] != MAGIC:
            raise self._wrong("is no GGUF file: it does not start with GGUF")
        self._at = 4
        version = self._u32()
        if version & 0xFFFF == 0:
            raise self._wrong("is for big-endian machines; take the usual (little-endian) file of this model")
        if version not in VERSIONS:
            raise self._wrong(f"has version {version} of the format; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        tensors, values = self._u64(), self._u64()
        if MAX_TENSORS < tensors <= (self._end - self._at) // LEAST_TENSOR:  # a larger claim is told below
            raise self._wrong(f"has {tensors} tensors; at most {MAX_TENSORS} are taken")
        metadata: dict[str, Any] = {}
        for _ in self._counted(values, LEAST_VALUE, "values"):
            key = self._text("a key", MAX_NAME_BYTES)
            if key in metadata:
                raise self._wrong(f"has the key {shown(key)} twice")
            metadata[key] = self._value(key)
        infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in self._counted(tensors, LEAST_TENSOR, "tensors"):
            name, kind, shape, offset = self._tensor()
            if name in infos:
                raise self._wrong(f"has the tensor {shown(name)} twice")
            infos[name] = kind, shape, offset
        return GGUFHeader(self._path, metadata, self._placed(infos, self._start(metadata)))

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._path.name} {what}")

    def _take(self, count: int) -> int:
        """Where the next `count` bytes start; the walk goes on behind them."""
        start = self._at
        if count > self._end - start:
            if self._end < self._size:
                raise self._wrong(f"has a header of more than {MAX_HEADER_BYTES >> 20} MB, which no model needs")
            raise self._wrong(f"is cut short or damaged: its header goes on behind its {self._size} bytes")
        if start + count > len(self._data):
            raise _MoreNeededError
        self._at = start + count
        return start

    def _counted(self, count: int, least: int, what: str) -> range:
        """`count` entries of at least `least` bytes each, if that many can follow."""
        if count > (self._end - self._at) // least:
            raise self._wrong(f"is cut short or damaged: it claims {count} {what} in {self._size} bytes")
        return range(count)

    def _u32(self) -> int:
        return int(U32(self._data, self._take(4))[0])

    def _u64(self) -> int:
        return int(U64(self._data, self._take(8))[0])

    def _text(self, what: str, most: int | None = None) -> str:
        length = self._u64()
        if most is not None and length > most:
            raise self._wrong(f"is damaged: {what} has {length} bytes")
        start = self._take(length)
        try:
            return str(self._data[start : self._at], "utf-8")
        except UnicodeDecodeError:
            raise self._wrong(f"is damaged: {what} is no UTF-8 text") from None

    def _value(self, key: str) -> Any:
        kind = self._u32()
        if kind == STRING:
            return self._text(f"the value of {shown(key)}")
        if kind in NUMBERS:
            number = struct.Struct(f"<{NUMBERS[kind]}")
            return number.unpack_from(self._data, self._take(number.size))[0]
        if kind != ARRAY:
            raise self._wrong(f"has the value {shown(key)} of the unknown kind {kind}")
        kind, count = self._u32(), self._u64()
        if kind == STRING:
            return self._texts(key, count)
        if kind not in NUMBERS:  # arrays of arrays are in the format, but in no model
            raise self._wrong(f"has the array {shown(key)} of {'arrays' if kind == ARRAY else f'unknown kind {kind}'}")
        numbers: array[Any] = array(NUMBERS[kind].replace("?", "B"))
        self._counted(count, numbers.itemsize, f"values of {shown(key)}")
        start = self._take(count * numbers.itemsize)
        numbers.frombytes(self._data[start : self._at])
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _texts(self, key: str, count: int) -> list[str]:
        self._counted(count, 8, f"strings in {shown(key)}")
        data, end, at = self._data, min(self._end, len(self._data)), self._at
        texts: list[str] = []
        add: Callable[[str], None] = texts.append
        for _ in range(count):  # some hundred thousand: nothing is called that need not be
            start = at + 8
            if start > end or (at := start + U64(data, at)[0]) > end:
                if end < self._end:
                    raise _MoreNeededError
                self._at = min(start, end)
                self._take(self._size)  # says that the file ends here
            try:
                add(str(data[start:at], "utf-8"))
            except UnicodeDecodeError:
                raise self._wrong(f"is damaged: a string in {shown(key)} is no UTF-8 text") from None
        self._at = at
        return texts

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Name, type, shape ([rows, columns]) and place behind the header."""
        name = self._text("a tensor's name", MAX_TENSOR_NAME_BYTES)
        dimensions = self._u32()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._wrong(f"is damaged: tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self._u64() for _ in range(dimensions))[::-1]
        if not all(0 < side < 1 << 48 for side in shape):
            raise self._wrong(f"is damaged: tensor {shown(name)} has shape {list(shape)}")
        kind = type_name(self._u32())
        if kind not in STORED_TYPES:
            raise self._wrong(f"stores tensor {shown(name)} as {kind}, which is not read; take a file in another form")
        return name, kind, shape, self._u64()

    def _start(self, metadata: Mapping[str, Any]) -> int:
        """Where tensors start: behind the header, at a multiple of the alignment."""
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._wrong(f"is damaged: its alignment is {str(alignment)[:MOST_SHOWN]}, no power of two")
        return -(-self._at // alignment) * alignment

    def _placed(self, infos: Mapping[str, tuple[str, tuple[int, ...], int]], start: int) -> dict[str, TensorAt]:
        place = str(self._path.absolute())
        tensors: dict[str, TensorAt] = {}
        for name, (kind, shape, offset) in infos.items():
            nbytes = stored_bytes(kind, shape)
            if nbytes is None:
                raise self._wrong(f"is damaged: tensor {shown(name)} of {kind} has rows of {shape[-1]} numbers")
            if start + offset + nbytes > self._size:
                ends = f"tensor {shown(name)} ends at byte {start + offset + nbytes} of {self._size}"
                raise self._wrong(f"is cut short: {ends}; fetch it again")
            tensors[name] = TensorAt(name, kind, shape, place, start + offset, nbytes)
        last: TensorAt | None = None
        for tensor in sorted(tensors.values(), key=lambda one: one.offset):
            if last is not None and last.offset + last.nbytes > tensor.offset:
                raise self._wrong(f"is damaged: the tensors {shown(last.name)} and {shown(tensor.name)} overlap")
            last = tensor
        return tensors


def type_name(number: int) -> str:
    """GGML's name for a type of tensor."""
    from gguf import GGMLQuantizationType  # 40 ms, only where a file is read

    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        return f"type {number}"


def shown(name: str) -> str:
    """A name from the file, for a message of one line."""
    return repr(name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}…")
