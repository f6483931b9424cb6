"""What a model directory holds, layer by layer, from config.json and the safetensors headers. No weights are read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from peerllm.engine.graph.load import MAKING_COPIES
from peerllm.engine.measure.outline import kind_names
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.engine.model.config import DTYPES, max_context, parse_config, text_config
from peerllm.engine.model.division import Division, divide
from peerllm.engine.model.keeping import Keeping, keeping
from peerllm.engine.model.packed import PART_WEIGHTS
from peerllm.engine.model.probing import layer_kinds, probe, shape_key
from peerllm.engine.model.tensor_names import check, recipes
from peerllm.engine.state.state_kinds import together
from peerllm.engine.weights.checkpoint import read_model
from peerllm.types import BITS, TORCH_KERNELS, Layer, ModelProfile, WorkingSpace

LIBRARY_BYTES = 340_000_000  # of torch and transformers, imported when first needed (322 MB were measured)
HIDDEN_COPIES = 8  # vectors of the hidden size alive at once in a block: residual, norm, queries, keys, values, output
WIDE_COPIES = 3  # vectors of its widest matrix: gate, up and their product
ROW_COPIES = 3  # of a row of several parts (rows.py): as it came, its parts, and as it is handed on
KERNEL_BYTES = 1 << 20  # of a compiled 16-bit product (oneDNN 3.12: 0.6 to 0.8 MB, and holes in the heap)
DRAW_BYTES = 64  # per token id, while one token is drawn: scores in float64, their order and sums


def inspect_model(
    model_dir: str | Path, dtype: str = "auto", quantize: str = "none", accelerator: bool = False, request: int = 0
) -> Inspected:
    """The layers of the model in `model_dir`, see checkpoint.read_model; ModelError says why it cannot be used."""
    files = read_model(model_dir, dtype, quantize, accelerator)
    config = parse_config(files.config)
    division = divide(config, DTYPES[files.dtype])
    found = recipes(division, files.tensors.values())
    check(division, found, division.sizes)

    sources: dict[int, dict[str, TensorAt]] = defaultdict(dict)
    made = {name for recipe in found for name in recipe.targets}
    for recipe in found:
        fills = [one for name in recipe.targets for one in division.filled_by(name, made)]
        for layer in {division.layer_of(name) for name in fills}:
            sources[layer].update((tensor.name, tensor) for _, tensor in recipe.sources)
    language, kept = text_config(config), keeping(division, found, files.quantize)
    return Inspected(
        request,
        profile=ModelProfile(files.name, _layers(division, made, kept)),
        architecture=config.model_type,
        config=files.config,
        dtype=files.dtype,
        quantize=files.quantize,
        hidden_size=language.hidden_size,
        vocabulary=language.vocab_size,
        max_context=max_context(config),
        stop_ids=files.stop_ids,
        tensors=tuple(tuple(sources[number].values()) for number in range(division.head + 1)),
        working=working(division, files.quantize),
        mixed_rows=not division.layout.plain,
    )


def working(division: Division, quantize: str) -> WorkingSpace:
    """What a pass needs beside weights and KV. All heads share a chunk's mask; fused attention keeps no scores."""
    language, itemsize = text_config(division.model.config), division.dtype.itemsize
    vocabulary = language.vocab_size
    matrices = [tensor for block in division.blocks for tensor in block.parameters() if tensor.dim() > 1]
    wide = max((side for matrix in matrices for side in matrix.shape[-2:]), default=0)
    largest = max((matrix.numel() for matrix in matrices), default=0)
    vectors = HIDDEN_COPIES * language.hidden_size * division.layout.streams + WIDE_COPIES * wide
    vectors += 0 if division.layout.plain else ROW_COPIES * division.layout.width(0)
    kernels = TORCH_KERNELS * KERNEL_BYTES if itemsize == 2 and not quantize else 0
    return WorkingSpace(
        token=vectors * (4 if quantize else itemsize),  # rounded matrices take and give float32
        pair=itemsize,
        position=0,
        sequence=vocabulary * (itemsize + 4),  # logits as computed and in float32
        once=LIBRARY_BYTES + kernels + DRAW_BYTES * vocabulary,
        loading=MAKING_COPIES * min(PART_WEIGHTS, largest) * BITS[quantize] // 8 if quantize else 0,
    )


def _layers(division: Division, made: set[str], kept: Keeping) -> tuple[Layer, ...]:
    sizes: dict[int, int] = defaultdict(int)
    for name, tensor in division.sizes.items():
        sizes[division.layer_of(name)] += kept.nbytes(name, tensor)
    stored = {id(tensor) for tensor in division.sizes.values()}
    for number, block in enumerate(division.blocks):
        layer = division.unit_of(number) + 1
        sizes[layer] += sum(b.numel() * b.element_size() for b in block.buffers() if id(b) not in stored)
    tied = not kept.matrices and any(
        {division.layer_of(a), division.layer_of(b)} == {0, division.head} and not {a, b} <= made
        for a, b in division.tied.items()
    )
    states = probe(division, range(len(division.blocks)))
    kinds = block_kinds(division)
    context = max_context(division.model.config)
    width, itemsize = division.layout.width, division.dtype.itemsize
    layers = [Layer("embedding", "embedding", sizes[0], 0, width(0) * itemsize)]
    for number, unit in enumerate(division.units, 1):
        token_bytes, kept_tokens, sequence_bytes = together((states[block] for block in unit), context)
        layers.append(
            Layer(
                f"block {unit.start}" if len(unit) == 1 else f"blocks {unit.start} to {unit.stop - 1}",
                kinds[number - 1],
                sizes[number],
                token_bytes,
                width(unit.stop) * itemsize,
                kv_window_tokens=kept_tokens,
                state_bytes_per_sequence=sequence_bytes,
            )
        )
    head = Layer("head", "head", sizes[division.head], 0, 4, tied_to=0 if tied else None)
    return (*layers, head)


def block_kinds(division: Division) -> list[str]:
    """The kind of each layer between embedding and head, see outline.kind_names."""
    kinds, units = layer_kinds(division), division.units
    shapes = [tuple(shape_key(division.blocks[number]) for number in unit) for unit in units]
    return kind_names([(kinds[unit.start], shape) for unit, shape in zip(units, shapes, strict=True)])
