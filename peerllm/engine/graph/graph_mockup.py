"""Graph shards with made-up weights in a model's true shapes, to time its layers without its files."""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.describe import Described
from peerllm.engine.graph.graph_inspect import block_kinds, working
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.graph.load import ShardForm, build
from peerllm.engine.graph.row_maker import Embedding, make_own_inputs
from peerllm.engine.measure import outline
from peerllm.engine.measure.outline import CHUNK, CONTEXT, Mockup
from peerllm.engine.messages import TimeLayers
from peerllm.engine.weights.tensors import MadeUp


class GraphOutline(outline.Sizes):
    """The sizes of a model's layers from config.json alone, and shards of them; see outline.Sizes."""

    def __init__(self, described: Described, message: TimeLayers, threads: int) -> None:
        self._described, self._quantize, self._threads = described, message.quantize, threads
        model, head = described.model, len(described.model.units) + 1
        context = max(2, min(CONTEXT, model.max_context))
        whole = ShardForm(described, 0, head, 1, context, message.quantize)
        kv = [ShardForm(described, n, n, 1, context, message.quantize).kv_bytes for n in range(1, head)]
        units = [sum(whole.block_bytes[number] for number in unit) for unit in model.units]
        super().__init__(
            firsts=outline.firsts(block_kinds(described)),
            head=head,
            vocabulary=model.vocabulary,
            context=context,
            limit_bytes=message.limit_bytes,
            working=working(described, message.quantize),
            layer_bytes=dict(enumerate([whole.embedding_bytes, *units, whole.head_bytes])),
            kv_bytes=dict(enumerate(kv, 1)),
        )

    def build(self, mockup: Mockup) -> GraphShard:
        described, model = self._described, self._described.model
        shape = ShardForm(described, mockup.layer, mockup.layer, mockup.sequences + 1, mockup.context, self._quantize)
        shapes = {name: size for number in shape.numbers for name, size in described.blocks[number].tensors()}
        shapes |= dict(described.head.tensors) | {f"{described.norm}.weight": (model.hidden,)}
        tensors = MadeUp(shapes)
        embedding = None
        if mockup.layer == 0:  # a table of one row repeated, which takes no memory
            row = tensors.floats(f"{described.norm}.weight", slice(None))
            positions = np.broadcast_to(row, (mockup.context, model.hidden)) if described.positions else None
            table = np.broadcast_to(row, (model.vocabulary, model.hidden))
            own, made = described.own_inputs, None
            if own is not None:
                tensors = MadeUp(dict(own.tensors()))
                row = tensors.floats(f"{own.norm}.weight", slice(None))
                inputs = np.broadcast_to(np.resize(row, own.width), (own.table.count, own.width))
                made = inputs, own.each, make_own_inputs(own, model.hidden, tensors, shape.bits)
            embedding = Embedding(table, model.embedding_scale, positions, made)
        return build(shape, tensors, embedding, self._threads, CHUNK)
