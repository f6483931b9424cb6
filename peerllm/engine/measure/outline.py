"""Which of a model's layers are timed at once, and what memory that takes; whatever backend makes them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peerllm.engine.base import Shard
from peerllm.errors import RefusedError
from peerllm.types import LayerKind, WorkingSpace

SEQUENCES = (16, 4, 1)  # sequences at once, the most that has room
CHUNK = 128  # tokens of a prompt in one pass
CONTEXT = 224  # tokens of room per sequence
CACHED_BYTES = 64 << 20  # more than caches hold: of smaller blocks several are timed, so that none stays warm
MAX_BLOCKS = 6


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


@dataclass
class Sizes:
    """A model's layers by their sizes, and shards of made-up numbers to time them by.

    All mappings are by the layer's number, where the embedding is 0.
    """

    runs: Mapping[LayerKind, tuple[int, int]]  # see `runs`
    head: int  # the number of the last layer
    hidden_size: int
    vocabulary: int
    context: int  # tokens of room that each sequence timed has
    limit_bytes: int  # the most that a mock-up may take
    working: WorkingSpace
    layer_bytes: Mapping[int, int]  # weights
    kv_bytes: Mapping[int, int]  # of one sequence with `context` tokens

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return tuple(self.runs)

    def plan(self, kind: LayerKind) -> Mockup:
        """The largest mock-up of a kind that keeps within the limit; RefusedError if one layer does not."""
        least = 0
        first = self.runs[kind][0]
        for count, sequences in self._rooms(kind):
            mockup = Mockup(kind, first, first + count - 1, sequences, self.context)
            least = self.nbytes(mockup)
            if least <= self.limit_bytes:
                return mockup
        raise RefusedError(f"{kind}: one layer takes {least} bytes to time, {max(0, self.limit_bytes)} are free here")

    def _rooms(self, kind: LayerKind) -> Iterator[tuple[int, int]]:
        """(layers, sequences), the best first: many layers before many sequences, but a few sequences before that."""
        first, length = self.runs[kind]
        most = min(length, MAX_BLOCKS, max(1, CACHED_BYTES // max(1, self.layer_bytes[first])))
        for count in sorted({most, (most + 1) // 2, 1}, reverse=True):
            yield from ((count, sequences) for sequences in SEQUENCES if sequences >= 4 or count == 1)

    def nbytes(self, mockup: Mockup) -> int:
        """Weights, KV and working space of a mock-up, which has one slot more than sequences (for a prompt)."""
        layers = range(mockup.first, mockup.last + 1)
        held = sum(self.layer_bytes.get(layer, 0) for layer in layers)
        kv = (mockup.sequences + 1) * sum(self.kv_bytes.get(layer, 0) for layer in layers)
        space, tokens = self.working, max(CHUNK, mockup.sequences)
        passing = kv + tokens * (space.token + space.pair * mockup.context) + mockup.context * space.position
        if mockup.last == self.head:
            passing += mockup.sequences * space.sequence
        return held + max(passing, space.loading) + space.once


    def build(self, mockup: Mockup) -> Shard:
        """With one slot more than the mock-up has sequences, for a prompt. RefusedError as for `plan`."""
        raise NotImplementedError


def kind_names(blocks: Sequence[tuple[str, Hashable]]) -> list[LayerKind]:
    """By each block's kind and how it is built: "block" where all are alike, else a name for each that differs."""
    names: dict[tuple[str, Hashable], str] = {}
    for block in dict.fromkeys(blocks):
        names[block] = block[0] if block[0] not in names.values() else f"{block[0]}-{len(names)}"
    return ["block"] * len(blocks) if len(names) == 1 else [f"block:{names[block]}" for block in blocks]


def runs(kinds: Sequence[LayerKind]) -> dict[LayerKind, tuple[int, int]]:
    """The longest run of neighbours of each kind, from the blocks' kinds: (number of its first layer, how many)."""
    found: dict[LayerKind, tuple[int, int]] = {"embedding": (0, 1)}
    start = 0
    for number in range(1, len(kinds) + 1):
        if number == len(kinds) or kinds[number] != kinds[start]:
            if number - start > found.get(kinds[start], (0, 0))[1]:
                found[kinds[start]] = (start + 1, number - start)
            start = number
    return {**found, "head": (len(kinds) + 1, 1)}
