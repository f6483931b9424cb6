"""What a model directory holds, layer by layer, from config.json and the safetensors headers. No weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from peerllm.engine.graph.describe import Described
from peerllm.engine.graph.load import MAKING_COPIES, ShardForm, largest_block
from peerllm.engine.graph.matrix_product import Product, check, require
from peerllm.engine.graph.structure import Attention, LatentAttention, Mixer
from peerllm.engine.measure.outline import kind_names
from peerllm.engine.messages import TensorAt
from peerllm.engine.state.state_kinds import together
from peerllm.engine.weights.checkpoint import COMPUTED, plain_name
from peerllm.engine.weights.tensors import Checkpoint
from peerllm.errors import ModelError
from peerllm.types import MATRIX_BITS, Layer, LayerKind, ModelProfile, WorkingSpace

GRAPH_BYTES = 160 << 10  # onnxruntime's overhead for one graph of any size
# float32 vectors that a block has at once, of the hidden size (or of all heads' queries) and of the feed-forward's
# width, with the holes that they leave in the heap. Measured alive: 4.0 of each, and the queries, keys and values.
HIDDEN_COPIES, WIDE_COPIES = 12, 8
ROW_COPIES = 4  # of the blocks' own inputs: as they came, in both buffers between graphs, and as they are handed on
SCORE_BYTES = 6  # per head and pair of tokens, where attention keeps its scores (4.5 were measured)
HEADS_AT_ONCE = 8  # that attention converts from float16 to float32 at once
DRAW_BYTES = 64  # per token id, while one token is drawn: scores in float64, their order and sums


def profile(described: Described, name: str, quantize: str) -> ModelProfile:
    """The layers as the planner sees them. The embedding stays in its file and takes no memory."""
    model = described.model
    shape = ShardForm(described, 0, len(model.units) + 1, 1, model.max_context, quantize)
    positions = 4 * model.hidden * model.max_context if described.positions else 0
    made = shape.embedding_bytes + GRAPH_BYTES if shape.embedding_bytes else 0
    layers = [Layer("embedding", "embedding", positions + made, 0, 4 * model.width(0))]  # float32 travels
    for unit, kind in zip(model.units, block_kinds(described), strict=True):
        states = [shape.states[number] for number in unit]
        token_bytes, kept_tokens, sequence_bytes = together(states, model.max_context)
        layers.append(
            Layer(
                f"block {unit.start}" if len(unit) == 1 else f"blocks {unit.start} to {unit.stop - 1}",
                kind,
                sum(shape.block_bytes[number] + GRAPH_BYTES for number in unit),
                token_bytes,
                4 * model.width(unit.stop),
                kv_window_tokens=None if kept_tokens is None else min(kept_tokens, model.max_context),
                state_bytes_per_sequence=sequence_bytes,
            )
        )
    graphs = -(-shape.head_bytes // largest_block(described, shape.bits))
    head = Layer("head", "head", shape.head_bytes + graphs * GRAPH_BYTES, 0, 4)
    return ModelProfile(name, (*layers, head))


def working(described: Described, quantize: str) -> WorkingSpace:
    """What a pass needs beside weights and KV: measured with onnxruntime 1.31, see tests/lab/test_memory_lab.py."""
    model, bits = described.model, MATRIX_BITS[quantize]
    rooms = [state.kept_tokens for state in model.states() if state.tokens]
    hidden = max(model.hidden, *(block.mixer.widest for block in model.blocks))
    keeping = [about for about in model.attentions if bits or _keeps_scores(about)]
    unfolded = max((min(about.heads, HEADS_AT_ONCE) * about.width * 8 for about in keeping), default=0)
    rows = ROW_COPIES * (model.width(0) - model.hidden)
    return WorkingSpace(
        token=4 * (rows + HIDDEN_COPIES * hidden + WIDE_COPIES * max(block.mlp.widest for block in model.blocks)),
        pair=SCORE_BYTES * max((about.heads for about in keeping), default=0),
        position=unfolded + sum(4 * rope.width for rope in model.ropes),
        sequence=8 * model.vocabulary,  # logits, and those of the parts of a divided head
        once=DRAW_BYTES * model.vocabulary,
        loading=MAKING_COPIES * largest_block(described, bits),
        window=max((min(room or 0, model.max_context) for room in rooms), default=1) if None not in rooms else None,
    )


def block_kinds(described: Described) -> list[LayerKind]:
    """The kind of each layer between embedding and head, see outline.kind_names."""
    units = [[described.blocks[number] for number in unit] for unit in described.model.units]
    alike = [tuple((weights.block, weights.forms) for weights in unit) for unit in units]
    return kind_names([(_kind(unit[0].block.mixer), key) for unit, key in zip(units, alike, strict=True)])


def _kind(mixer: Mixer) -> str:
    if isinstance(mixer, Attention):
        return "full_attention" if mixer.window is None else "sliding_attention"
    return "latent_attention" if isinstance(mixer, LatentAttention) else "recurrent"


def _keeps_scores(about: Attention | LatentAttention) -> bool:
    """Whether attention in float32 keeps its scores (in float16 it always does)."""
    return isinstance(about, Attention) and (about.softcap > 0 or about.sinks)


def layer_tensors(described: Described, files: Mapping[str, TensorAt]) -> tuple[tuple[TensorAt, ...], ...]:
    """For each layer the tensors that it needs; ModelError if one is missing or does not fit."""
    checkpoint, multiplied, coded = Checkpoint(files.values()), set[str](), described.coded_tensors()
    biased: dict[str, bool] = {}
    products = [(role, one) for weights in described.blocks for role, one in weights.products.items()]
    for role, product in (("head", described.head), *products):
        check(checkpoint, product)
        multiplied |= {name for name, _ in product.tensors}
        bias = f"{product.parts[0].tensor}.bias"
        if biased.setdefault(role, (there := checkpoint.at(bias) is not None)) != there:
            raise ModelError(f"tensor {bias} is {'there' if there else 'missing'}, unlike those of earlier blocks")

    def found(needed: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[TensorAt, ...]:
        names = []
        for name, shape in needed:
            if name not in multiplied:
                require(checkpoint, name, shape)
            multiplies = name.endswith(".weight") or name in coded
            names += [name, f"{name.rpartition('.')[0]}.bias"] if multiplies else [name]
        tensors = [tensor for name in dict.fromkeys(names) if (tensor := checkpoint.at(name)) is not None]
        for tensor in tensors:
            if tensor.dtype not in COMPUTED and plain_name(tensor.name) not in coded:
                raise ModelError(f"tensor {tensor.name} holds {tensor.dtype}, which is not computed with")
        return tuple(tensors)

    model = described.model
    embedding = list(Product((described.table,), model.hidden).tensors)
    if described.positions:
        positions = f"{described.positions}.weight"
        embedding.append((positions, checkpoint.shape(positions) or (0, model.hidden)))
    if described.own_inputs is not None:
        check(checkpoint, described.own_inputs.projection)
        embedding += described.own_inputs.tensors()
    head = list(described.head.tensors)
    if model.head.norm is not None and model.head.norm.weighted:
        head.append((f"{described.norm}.weight", (model.hidden,)))
    units = ([described.blocks[number].tensors() for number in unit] for unit in model.units)
    return found(embedding), *(found(chain(*unit)) for unit in units), found(head)
