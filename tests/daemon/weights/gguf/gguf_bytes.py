"""GGUF headers byte by byte, so that tests can write what no writer would."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Kinds of metadata by their numbers in the format.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip
ALIGNMENT = 32


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, given: Any) -> bytes:
    return text(given) if kind == STRING else struct.pack(f"<{CODES[kind]}", given)


def entry(key: str | bytes, kind: int, given: Any) -> bytes:
    """A key and its value; an array's is (kind, values)."""
    if kind != ARRAY:
        return text(key) + struct.pack("<I", kind) + value(kind, given)
    inner, values = given
    return text(key) + struct.pack("<IIQ", ARRAY, inner, len(values)) + b"".join(value(inner, one) for one in values)


def info(name: str | bytes, sides: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor; `sides` as in the file: columns first."""
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def header(entries: Sequence[bytes], infos: Sequence[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries)) + b"".join([*entries, *infos])


def padded(raw: bytes, alignment: int = ALIGNMENT) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def sample(data: int = 4096) -> bytes:
    """A small file with every kind of value, and tensors of three types."""
    entries = [
        entry("general.architecture", STRING, "llama"),
        *(entry(f"a.{kind}", kind, 1) for kind in CODES),
        entry("llama.rope.freq_base", F32, 5e5),
        entry("an.array", ARRAY, (I32, [-1, 2, 3])),
        entry("truths", ARRAY, (BOOL, [True, False, True])),
        entry("tokens", ARRAY, (STRING, ["<s>", "é", "", "▁tok"])),
    ]
    infos = [
        info("token_embd.weight", [64, 8], 0, 0),  # F32, 2048 bytes
        info("blk.0.attn_q.weight", [32, 2], 8, 2048),  # Q8_0, 68 bytes
        info("blk.0.ffn_up_exps.weight", [256, 2, 2], 12, 2144),  # Q4_K, 576 bytes
    ]
    return padded(header(entries, infos)) + bytes(data)


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def by_library(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A file as the gguf library writes it."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, given in metadata.items():
        kind = gguf.GGUFValueType.get_type(given)
        writer.add_key_value(key, given, kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
