"""Which layer of a model stands for its kind when layers are timed, and what memory that takes; for any backend."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from peerllm.engine.base import Shard
from peerllm.errors import RefusedError
from peerllm.types import LayerKind, WorkingSpace

SEQUENCES = (16, 4, 1)  # sequences at once, the most that has room
CHUNK = 128  # tokens of a prompt in one pass
CONTEXT = 272  # tokens of room per sequence: two chunks, and some steps behind them


@dataclass(frozen=True, slots=True)
class Mockup:
    """One layer of a kind, with room for `sequences` of `context` tokens."""

    kind: LayerKind
    layer: int
    sequences: int
    context: int


@dataclass
class Sizes:
    """A model's layers by their sizes, and shards of made-up numbers to time them by.

    All mappings are by the layer's number, where the embedding is 0.
    """

    firsts: Mapping[LayerKind, int]  # see `firsts`
    head: int  # the number of the last layer
    vocabulary: int
    context: int  # tokens of room that each sequence timed has
    limit_bytes: int  # the most that a mock-up may take
    working: WorkingSpace
    layer_bytes: Mapping[int, int]  # weights
    kv_bytes: Mapping[int, int]  # of one sequence with `context` tokens

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return tuple(self.firsts)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return sum(self.layer_bytes.values())

    def plan(self, kind: LayerKind) -> Mockup:
        """With as many sequences as keep within the limit; RefusedError if not even one does."""
        for sequences in SEQUENCES:
            mockup = Mockup(kind, self.firsts[kind], sequences, self.context)
            if (least := self.nbytes(mockup)) <= self.limit_bytes:
                return mockup
        raise RefusedError(f"{kind}: one layer takes {least} bytes to time, {max(0, self.limit_bytes)} are free here")

    def nbytes(self, mockup: Mockup) -> int:
        """Weights, KV and working space of a mock-up, which has one slot more than sequences (for a prompt)."""
        kv = (mockup.sequences + 1) * self.kv_bytes.get(mockup.layer, 0)
        space, tokens = self.working, max(CHUNK, mockup.sequences)
        passing = kv + tokens * (space.token + space.pair * mockup.context) + mockup.context * space.position
        if mockup.layer == self.head:
            passing += mockup.sequences * space.sequence
        return self.layer_bytes.get(mockup.layer, 0) + max(passing, space.loading) + space.once

    def build(self, mockup: Mockup) -> Shard:
        """With one slot more than the mock-up has sequences, for a prompt. RefusedError as for `plan`."""
        raise NotImplementedError


def kind_names(blocks: Sequence[tuple[str, Hashable]]) -> list[LayerKind]:
    """By each block's kind and how it is built: "block" where all are alike, else a name for each that differs."""
    names: dict[tuple[str, Hashable], str] = {}
    for block in dict.fromkeys(blocks):
        names[block] = block[0] if block[0] not in names.values() else f"{block[0]}-{len(names)}"
    return ["block"] * len(blocks) if len(names) == 1 else [f"block:{names[block]}" for block in blocks]


def firsts(kinds: Sequence[LayerKind]) -> dict[LayerKind, int]:
    """The number of the first layer of each kind, from the blocks' kinds."""
    found = {kind: number for number, kind in reversed(list(enumerate(kinds, 1)))}
    return {"embedding": 0, **dict(sorted(found.items(), key=lambda one: one[1])), "head": len(kinds) + 1}
