"""Loading a shard: weights from safetensors, tensor by tensor, into graphs as large as the promised memory allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Progress
from peerllm.engine.free_memory import trim
from peerllm.engine.graph.describe import Described
from peerllm.engine.graph.graph_shard import BlockRange, GraphShard, make_head, make_norm, make_span
from peerllm.engine.graph.matrix_product import Part, Product, check, require
from peerllm.engine.graph.nodes import make_pool
from peerllm.engine.graph.row_maker import Embedding, make_own_inputs
from peerllm.engine.messages import LoadStage
from peerllm.engine.state.state_kinds import LayerState, slot_bytes
from peerllm.engine.weights.tensors import Checkpoint, CodedTable, Tensors
from peerllm.errors import BadInputError, RefusedError
from peerllm.types import MATRIX_BITS

# While a graph is built, its weights are in memory as we made them, as onnxruntime copied them, and packed. So building
# needs this many times the final size on top (1.65 was measured for a block, 2 for one matrix).
MAKING_COPIES = 2


@dataclass(frozen=True, slots=True)
class ShardForm:
    """Which part of a model a shard holds, and in which form."""

    described: Described
    first_layer: int
    last_layer: int
    slots: int
    context: int
    quantize: str

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer <= self.last_layer <= self.head:
            raise BadInputError(f"layers {self.first_layer}..{self.last_layer} of a model whose last is {self.head}")

    @property
    def head(self) -> int:
        return len(self.described.model.units) + 1

    @property
    def bits(self) -> int:
        return MATRIX_BITS[self.quantize]

    @property
    def numbers(self) -> range:
        """The shard's blocks, numbered from 0."""
        units = self.described.model.units[max(self.first_layer, 1) - 1 : self.last_layer]
        start = units[0].start if units else 0
        return range(start, units[-1].stop if units else start)

    @property
    def block_bytes(self) -> list[int]:
        return [self.described.blocks[number].nbytes(self.bits) for number in self.numbers]

    @property
    def head_bytes(self) -> int:
        return self.described.head.nbytes(self.bits) if self.last_layer == self.head else 0

    @property
    def weight_bytes(self) -> int:
        return self.embedding_bytes + sum(self.block_bytes) + self.head_bytes

    @property
    def embedding_bytes(self) -> int:
        """Of the embedding; tables stay in their files."""
        own = self.described.own_inputs
        return own.nbytes(self.bits) if own is not None and self.first_layer == 0 else 0

    @property
    def states(self) -> dict[int, LayerState]:
        """What each of the shard's blocks keeps of a sequence."""
        return {number: self.described.blocks[number].block.state(half=bool(self.bits)) for number in self.numbers}

    @property
    def kv_bytes(self) -> int:
        return slot_bytes(self.states.values(), self.slots, self.context)

    @property
    def graph_bytes(self) -> int:
        """The most bytes of weights that one graph may have.

        Building it may use the memory of the keys and values, which come later. The plan promises at least the memory
        to build the largest block (WorkingSpace.loading).
        """
        return max(largest_block(self.described, self.bits), self.kv_bytes // MAKING_COPIES)

    def spans(self) -> list[range]:
        """The shard's blocks, divided into runs that become one graph each."""
        sizes, most = self.block_bytes, self.graph_bytes
        runs: list[range] = []
        start, taken = self.numbers.start, 0
        for number, size in zip(self.numbers, sizes, strict=True):
            if number > start and taken + size > most:
                runs.append(range(start, number))
                start, taken = number, 0
            taken += size
        return [*runs, range(start, self.numbers.stop)] if sizes else []

    def head_parts(self) -> list[Product]:
        """The output matrix, divided into runs of rows that become one graph each."""
        return parts_of(self.described.head, -(-self.head_bytes // self.graph_bytes)) if self.head_bytes else []


def largest_block(described: Described, bits: int) -> int:
    """Bytes of the largest block's weights, or of what makes the blocks' own inputs."""
    own = 0 if described.own_inputs is None else described.own_inputs.nbytes(bits)
    return max(own, *(weights.nbytes(bits) for weights in described.blocks))


def parts_of(product: Product, count: int) -> list[Product]:
    """Divide a product of one tensor into `count` products with a share of its rows each."""
    ends = [product.rows * number // count for number in range(count + 1)]
    if count == 1:
        return [product]
    part = product.parts[0]
    return [
        replace(product, parts=(replace(part, count=end - start, rows=np.arange(start, end)),))
        for start, end in pairwise(ends)
    ]


def load_shard(described: Described, spec: LoadStage, threads: int, progress: Progress) -> GraphShard:
    """Layers spec.first_layer..last_layer from the files that spec.tensors names; ModelError if they do not fit."""
    shape = ShardForm(described, spec.first_layer, spec.last_layer, spec.slots, spec.context, spec.quantize)
    if spec.limit_bytes is not None and shape.weight_bytes + shape.kv_bytes > spec.limit_bytes:
        held = f"weights of {shape.weight_bytes} bytes and KV of {shape.kv_bytes}"
        raise RefusedError(f"{held} are asked for, {spec.limit_bytes} are promised")
    total = max(1, sum(tensor.nbytes for tensor in spec.tensors))
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done = min(done + read, total)
        progress(done, total)

    checkpoint = Checkpoint(spec.tensors, count)
    embedding = None
    if shape.first_layer == 0:
        table, model, positions = described.table, described.model, None
        check(checkpoint, Product((table,), model.hidden))
        if described.positions is not None:
            learned, start = f"{described.positions}.weight", model.position_offset or 0
            require(checkpoint, learned, (start + spec.context, model.hidden), growing=(0,))
            positions = checkpoint.floats(learned, slice(start, start + spec.context))
        make_pool(threads)
        own, made = described.own_inputs, None
        if own is not None:
            check(checkpoint, Product((own.table,), own.width))
            session = make_own_inputs(own, model.hidden, checkpoint, shape.bits)
            made = mapped_table(checkpoint, own.table, own.width), own.each, session
        embedding = Embedding(mapped_table(checkpoint, table, model.hidden), model.embedding_scale, positions, made)
    shard = build(shape, checkpoint, embedding, threads, spec.chunk)
    progress(total, total)
    return shard


def mapped_table(checkpoint: Checkpoint, part: Part, columns: int) -> npt.NDArray[Any] | CodedTable:
    """An embedding's rows, which stay in their file."""
    if part.form is not None:
        return CodedTable(checkpoint, part.form, part.name, (part.count, columns))
    return checkpoint.mapped(part.name)


def build(shape: ShardForm, tensors: Tensors, embedding: Embedding | None, threads: int, chunk: int) -> GraphShard:
    """Build the shard, one graph after the other."""
    make_pool(threads)
    described, bits = shape.described, shape.bits
    spans: list[BlockRange] = []
    for run in shape.spans():
        own = [described.blocks[number] for number in run]
        spans.append(make_span(described.model, run, own, tensors, bits, shape.context))
        trim()
    head, norm = [], None
    for product in shape.head_parts():
        head.append(make_head(described.model.head, described.model.hidden, product, described.norm, tensors, bits))
        trim()
    if head:
        norm = make_norm(described.model.head, described.model.hidden, described.norm, tensors)
    return GraphShard(
        described.model, shape.states, shape.slots, shape.context, embedding, spans, head, shape.weight_bytes, chunk,
        norm,
    )  # fmt: skip
