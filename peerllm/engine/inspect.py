"""What a model directory holds, layer by layer, from config.json and the safetensors headers. No weights are read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from peerllm.engine.checkpoint import compute_dtype, read_json, read_tensors, resolve, stop_ids
from peerllm.engine.config import DTYPES, eos_ids, max_context, parse_config, text_config
from peerllm.engine.division import Division, divide
from peerllm.engine.graph.load import MAKING_COPIES
from peerllm.engine.kernels.keeping import Keeping, keeping
from peerllm.engine.kernels.packed import PART_WEIGHTS
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.engine.names import check, recipes
from peerllm.engine.probing import probe, shape_key
from peerllm.engine.states import LayerState
from peerllm.errors import ModelError
from peerllm.types import BITS, TORCH_KERNELS, Layer, ModelProfile, WorkingSpace

LIBRARY_BYTES = 340_000_000  # torch and transformers in an engine that starts without them (322 MB were seen)
HIDDEN_COPIES = 8  # vectors of the hidden size alive at once in a block: residual, norm, queries, keys, values, output
WIDE_COPIES = 3  # vectors of its widest matrix: gate, up and their product
KERNEL_BYTES = 1 << 20  # of a compiled product in 16-bit numbers (oneDNN 3.12: 0.6 to 0.8 MB and the holes they leave)
DRAW_BYTES = 64  # per token id, while one token is drawn: scores in float64, their order and sums


@dataclass(frozen=True, slots=True)
class Inspection:
    """The fields of messages.Inspected but `request`."""

    profile: ModelProfile
    architecture: str
    config: str
    dtype: str
    quantize: str
    hidden_size: int
    vocabulary: int
    max_context: int
    stop_ids: tuple[int, ...]
    tensors: tuple[tuple[TensorAt, ...], ...]
    working: WorkingSpace

    def message(self, request: int) -> Inspected:
        """As the answer to a request."""
        return Inspected(request, **{name: getattr(self, name) for name in Inspection.__dataclass_fields__})


def inspect_model(
    model_dir: str | Path, dtype: str = "auto", quantize: str = "none", accelerator: bool = False
) -> Inspection:
    """The layers of the model in `model_dir`, computed in `dtype` from matrices rounded to `quantize`, if to anything.

    Either may be "auto", for what suits the checkpoint and where it is computed. ModelError says why it cannot be used.
    """
    directory = Path(model_dir).expanduser()
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory")
    values = read_json(directory / "config.json")
    text = (directory / "config.json").read_text(encoding="utf-8")
    config = parse_config(text)
    tensors = read_tensors(directory)
    dtype = compute_dtype(dtype, values, tensors.values())
    quantize = resolve(quantize, dtype, accelerator)
    division = divide(config, DTYPES[dtype])
    found = recipes(division, tensors)
    check(division, found, division.sizes)

    sources: dict[int, dict[str, TensorAt]] = defaultdict(dict)
    made = {name for recipe in found for name in recipe.targets}
    for recipe in found:
        for layer in {number for name in recipe.targets for number in _holders(division, name, made)}:
            sources[layer].update((tensor.name, tensor) for _, tensor in recipe.sources)
    language, kept = text_config(config), keeping(division, found, quantize)
    return Inspection(
        profile=ModelProfile(directory.resolve().name, _layers(division, made, kept, language.hidden_size)),
        architecture=config.model_type,
        config=text,
        dtype=dtype,
        quantize=quantize,
        hidden_size=language.hidden_size,
        vocabulary=language.vocab_size,
        max_context=max_context(config),
        stop_ids=stop_ids(directory, *eos_ids(config)),
        tensors=tuple(tuple(sources[number].values()) for number in range(division.head + 1)),
        working=working(division, quantize),
    )


def working(division: Division, quantize: str) -> WorkingSpace:
    """The mask of a chunk is one for all heads; fused attention keeps no scores."""
    language, itemsize = text_config(division.model.config), division.dtype.itemsize
    vocabulary = language.vocab_size
    matrices = [tensor for block in division.blocks for tensor in block.parameters() if tensor.dim() > 1]
    wide = max((side for matrix in matrices for side in matrix.shape[-2:]), default=0)
    largest = max((matrix.numel() for matrix in matrices), default=0)
    vectors = HIDDEN_COPIES * language.hidden_size + WIDE_COPIES * wide
    kernels = TORCH_KERNELS * KERNEL_BYTES if itemsize == 2 and not quantize else 0
    return WorkingSpace(
        token=vectors * (4 if quantize else itemsize),  # rounded matrices take and give float32
        pair=itemsize,
        position=0,
        sequence=vocabulary * (itemsize + 4),  # logits as computed and in float32
        once=LIBRARY_BYTES + kernels + DRAW_BYTES * vocabulary,
        loading=MAKING_COPIES * min(PART_WEIGHTS, largest) * BITS[quantize] // 8 if quantize else 0,
    )


def _holders(division: Division, name: str, made: set[str]) -> set[int]:
    """The layers that need the file's tensor for `name`: its own, and that of one tied to it with none of its own."""
    root = division.tied.get(name, name)
    tied = {alias for alias, other in division.tied.items() if root in (alias, other)} | {root}
    return {division.layer_of(name), *(division.layer_of(alias) for alias in tied - made)}


def _layers(division: Division, made: set[str], kept: Keeping, hidden_size: int) -> tuple[Layer, ...]:
    sizes: dict[int, int] = defaultdict(int)
    for name, tensor in division.sizes.items():
        sizes[division.layer_of(name)] += kept.nbytes(name, tensor)
    for number, block in enumerate(division.blocks):
        stored = {id(tensor) for tensor in division.sizes.values()}
        sizes[number + 1] += sum(b.numel() * b.element_size() for b in block.buffers() if id(b) not in stored)
    tied = not kept.matrices and any(
        {division.layer_of(a), division.layer_of(b)} == {0, division.head} and not {a, b} <= made
        for a, b in division.tied.items()
    )
    states = probe(division, range(len(division.blocks)))
    kinds = block_kinds(division, states)
    sent = hidden_size * division.dtype.itemsize
    layers = [Layer("embedding", "embedding", sizes[0], 0, sent)]
    for number, state in states.items():
        layers.append(
            Layer(
                f"block {number}",
                kinds[number],
                sizes[number + 1],
                state.token_bytes,
                sent,
                kv_window_tokens=state.kept_tokens,
                state_bytes_per_sequence=state.state_bytes,
            )
        )
    head = Layer("head", "head", sizes[division.head], 0, 4, tied_to=0 if tied else None)
    return (*layers, head)


def block_kinds(division: Division, states: dict[int, LayerState]) -> list[str]:
    """ "block" where all are alike, else one name for each way a block is built."""
    keys = [(states[number].kind, shape_key(block)) for number, block in enumerate(division.blocks)]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) == 1:
        return ["block"] * len(keys)
    names: dict[object, str] = {}
    for kind, shape in distinct:
        name = kind if kind not in names.values() else f"{kind}-{len(names)}"
        names[(kind, shape)] = name
    return [f"block:{names[key]}" for key in keys]
