"""The header of a weight file on the Hugging Face hub, without its weights: first bytes, more until it ends."""

from __future__ import annotations

import struct
from collections.abc import Callable

from peerllm.daemon.weights.gguf.header import ARRAY, MAGIC, MAX_HEADER_BYTES, NUMBERS, STRING
from peerllm.daemon.weights.gguf_choice import SUFFIX
from peerllm.errors import ModelError

FIRST_BYTES = 4 << 20  # the metadata of most files: a vocabulary of 150,000 tokens; doubled until the header ends
FIRST_SAFETENSORS_BYTES = 256 << 10  # of some thousand tensors
PARTIAL = 206  # the status of an answer with the range that was asked for
_WIDTHS = {kind: struct.calcsize(f"<{code}") for kind, code in NUMBERS.items()}  # bytes, by a value's kind


def weight_header(model: str, name: str, commit: str, token: str | None, timeout_s: float) -> bytes:
    """The beginning of a GGUF or safetensors file, to the end of its header or a little further; ModelError."""
    if name.lower().endswith(SUFFIX):
        return _beginning(model, name, commit, token, timeout_s, FIRST_BYTES, header_ends)
    data = _beginning(model, name, commit, token, timeout_s, FIRST_SAFETENSORS_BYTES, _safetensors_ends)
    return data[: 8 + int.from_bytes(data[:8], "little")]


def weight_part(
    model: str, name: str, commit: str, token: str | None, timeout_s: float, offset: int, nbytes: int
) -> bytes:
    """The bytes from an offset on, fewer where the file ends; ModelError where the hub gives no parts."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url, headers = hf_hub_url(model, name, revision=commit), build_hf_headers(token=token)
    asked = {**headers, "Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with get_session().stream("GET", url, headers=asked, timeout=timeout_s) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if offset and response.status_code != PARTIAL:
            raise ModelError(f"the hub gives no parts of {name}")
        for block in response.iter_raw():  # a server that ignores the range sends the whole file
            data += block[: nbytes - len(data)]
            if len(data) >= nbytes:
                break
    return bytes(data)


def _safetensors_ends(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    if len(data) >= 8 and length > MAX_HEADER_BYTES - 8:
        raise ModelError("the file does not begin as safetensors files do")
    return len(data) >= 8 + length


def _beginning(
    model: str, name: str, commit: str, token: str | None, timeout_s: float, first: int, ends: Callable[[bytes], bool]
) -> bytes:
    """The first bytes, and more until `ends` is content."""
    data, wanted = bytearray(), first
    while len(data) < MAX_HEADER_BYTES:
        data += weight_part(model, name, commit, token, timeout_s, len(data), wanted - len(data))
        if ends(bytes(data)):
            return bytes(data)
        if len(data) < wanted:
            break
        wanted *= 2
    raise ModelError(f"{name} of {model} has no complete header")


def header_ends(data: bytes) -> bool:
    """Whether a GGUF file's header ends within its first bytes; ModelError if it is none."""
    if data[:4] != MAGIC[: len(data)]:
        raise ModelError("the file does not begin as GGUF files do")
    walk = HeaderWalk(data)
    try:
        walk.skip(8)  # magic, version
        tensors, entries = walk.number(8), walk.number(8)
        for _ in range(entries):
            walk.string()
            walk.value(walk.number(4))
        for _ in range(tensors):
            walk.string()
            walk.skip(8 * walk.number(4) + 4 + 8)  # sides, type, offset
    except EOFError:
        return False
    return True


class HeaderWalk:
    """A place in the bytes; EOFError where they end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise EOFError

    def number(self, width: int) -> int:
        self.skip(width)
        return int.from_bytes(self._data[self._at - width : self._at], "little")

    def string(self) -> None:
        self.skip(self.number(8))

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner in _WIDTHS:
                self.skip(count * _WIDTHS[inner])
            elif inner == STRING:
                for _ in range(count):
                    self.string()
            else:  # header.py refuses arrays of arrays too
                raise ModelError(f"an array of the type {inner} stands in the GGUF header")
        elif kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        else:
            raise ModelError(f"a value of the unknown type {kind} stands in the GGUF header")
