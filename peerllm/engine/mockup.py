"""Shards of made-up numbers: a model's layers in their true shapes, with KV room, for timing without any weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from peerllm.engine.assembly import finish, make_up, strip
from peerllm.engine.cache import kv_bytes
from peerllm.engine.config import DTYPES, max_context, parse_config, text_config
from peerllm.engine.division import Division, divide
from peerllm.engine.inspect import block_kinds
from peerllm.engine.kernels.keeping import keeping
from peerllm.engine.messages import LoadStage, TimeLayers
from peerllm.engine.place import CPU
from peerllm.engine.probing import probe
from peerllm.engine.shard import TorchShard
from peerllm.engine.states import LayerState
from peerllm.errors import BadInputError, RefusedError
from peerllm.types import LayerKind

SEQUENCES = (16, 8, 4, 2, 1)  # sequences at once, the most that has room
CHUNK = 128  # tokens of a prompt in one pass
CONTEXT = 224  # tokens of room per sequence
CACHED_BYTES = 64 << 20  # more than caches hold: of smaller blocks several are timed, so that none stays warm
MAX_BLOCKS = 6
HIDDEN_COPIES, WIDE_COPIES = 8, 3  # vectors alive at once in a block, of the hidden size and of its widest matrix
LOGITS_BYTES = 12  # per sequence and token id: in float32 and, where a token is drawn, in float64


@dataclass(frozen=True, slots=True)
class Mockup:
    """What of a model is timed at once: layers first..last, all of one kind."""

    kind: LayerKind
    first: int
    last: int
    sequences: int
    context: int

    @property
    def layers(self) -> int:
        return self.last - self.first + 1


class Outline:
    """A model's kinds of layers, from config.json's text alone."""

    def __init__(self, message: TimeLayers, device: torch.device = CPU) -> None:
        self._device = device
        if message.dtype not in DTYPES:
            raise BadInputError(f"unknown dtype {message.dtype!r}")
        self._config, self._dtype, self._limit = message.config, message.dtype, message.limit_bytes
        self._quantize = message.quantize
        division = self._divide()
        self.head = division.head
        self._states = probe(division, range(len(division.blocks)))
        kinds = block_kinds(division, self._states)
        self._longest = {"embedding": (0, 1), **_runs(kinds), "head": (self.head, 1)}
        self.kinds: tuple[LayerKind, ...] = tuple(self._longest)
        config = parse_config(self._config)
        language = text_config(config)
        self.hidden_size, self.vocabulary = language.hidden_size, language.vocab_size
        self._context = max(2, min(CONTEXT, max_context(config)))
        kept = keeping(division, (), self._quantize)
        self._bytes: dict[int, int] = {}
        self._wide: dict[int, int] = {}
        for name, tensor in division.sizes.items():
            layer = division.layer_of(name)
            self._bytes[layer] = self._bytes.get(layer, 0) + kept.nbytes(name, tensor)
            if tensor.dim() > 1:
                self._wide[layer] = max(self._wide.get(layer, 0), *tensor.shape[-2:])

    def plan(self, kind: LayerKind) -> Mockup:
        """The largest mock-up of a kind that keeps within the limit; RefusedError if one layer does not."""
        least = 0
        first = self._longest[kind][0]
        for count, sequences in self._rooms(kind):
            mockup = Mockup(kind, first, first + count - 1, sequences, self._context)
            least = self.nbytes(mockup)
            if least <= self._limit:
                return mockup
        raise RefusedError(f"{kind}: one layer takes {least} bytes to time, {max(0, self._limit)} are free here")

    def _rooms(self, kind: LayerKind) -> Iterator[tuple[int, int]]:
        """(layers, sequences), the best first: many layers before many sequences, but a few sequences before that."""
        first, length = self._longest[kind]
        most = min(length, MAX_BLOCKS, max(1, CACHED_BYTES // max(1, self._bytes[first])))
        for count in sorted({most, (most + 1) // 2, 1}, reverse=True):
            yield from ((count, sequences) for sequences in SEQUENCES if sequences >= 4 or count == 1)

    def nbytes(self, mockup: Mockup) -> int:
        """Weights, KV and working space of a mock-up; or what it takes to make it, before there is KV."""
        numbers = range(max(mockup.first, 1) - 1, min(mockup.last, self.head - 1))
        held: int = sum(self._bytes.get(layer, 0) for layer in range(mockup.first, mockup.last + 1))
        kv = kv_bytes(self._of(numbers), mockup.sequences + 1, mockup.context)
        wide: int = max((self._wide.get(number + 1, 0) for number in numbers), default=0)
        tokens = max(CHUNK, mockup.sequences)
        itemsize = torch.float32.itemsize if self._quantize else DTYPES[self._dtype].itemsize
        working = tokens * (HIDDEN_COPIES * self.hidden_size + WIDE_COPIES * wide) * itemsize
        logits = mockup.sequences * self.vocabulary * LOGITS_BYTES if mockup.last == self.head else 0
        return int(held + kv + working + logits)

    def build(self, mockup: Mockup) -> TorchShard:
        """The shard, one slot more than sequences (for a prompt)."""
        division = self._divide()
        numbers = range(max(mockup.first, 1) - 1, min(mockup.last, division.head - 1))
        whole, kept = division.owner.config, keeping(division, (), self._quantize)
        layers = mockup.first, mockup.last
        entry = strip(division, *layers, numbers)
        filled = make_up(division, *layers, kept, self._device)
        finish(division, whole, self._device)
        slots = mockup.sequences + 1
        spec = LoadStage(
            0, "", 0, 0, 1, mockup.first, mockup.last, self._config, (), self._dtype, slots, mockup.context,
            CHUNK, slots, None, None, "",
        )  # fmt: skip
        return TorchShard(division, spec, self._of(numbers), filled, entry, None, self._device)

    def _divide(self) -> Division:
        return divide(parse_config(self._config), DTYPES[self._dtype])

    def _of(self, numbers: range) -> dict[int, LayerState]:
        return {number: self._states[number] for number in numbers}


def _runs(kinds: list[LayerKind]) -> Mapping[LayerKind, tuple[int, int]]:
    """Of each kind of block the longest run of neighbours: (number of its first layer, how many)."""
    found: dict[LayerKind, tuple[int, int]] = {}
    start = 0
    for number in range(1, len(kinds) + 1):
        if number == len(kinds) or kinds[number] != kinds[start]:
            if number - start > found.get(kinds[start], (0, 0))[1]:
                found[kinds[start]] = (start + 1, number - start)
            start = number
    return found
