"""From a whole model without data to a shard: remove other shards' layers, load the rest, compute what no file has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peerllm.engine.base import Progress
from peerllm.engine.graph.nodes import make_pool
from peerllm.engine.kernels.accelerator import CPU, bridge, turn
from peerllm.engine.messages import TensorAt
from peerllm.engine.model.blocks import Absent, BeforeBlocks, ShardBlocks, replace_blocks
from peerllm.engine.model.division import Division
from peerllm.engine.model.keeping import Keeping, keeping
from peerllm.engine.model.loader import as_array, as_tensor, load
from peerllm.engine.model.packed import Packed
from peerllm.engine.model.rows import Passing
from peerllm.engine.model.tensor_names import TensorRecipe, check, recipes
from peerllm.engine.weights.checkpoint import mapped
from peerllm.errors import EngineError, ModelError
from peerllm.types import BITS

PATTERN = 65_537  # how many made-up numbers are drawn before they repeat; a prime
SPREAD = 0.05  # made-up numbers lie within ± this
MAX_TABLE_BYTES = 1 << 30  # tables that a shard computes itself; masks of a long context are the largest
_Loaded = tuple[set[str], torch.Tensor, bool]  # a tensor's names in the model, the tensor, whether it stays in its file


def strip(division: Division, first: int, last: int) -> nn.Module:
    """Remove what belongs to other shards; returns the module that takes the hidden states of the shard before."""
    model, numbers = division.model, division.numbers(first, last)
    blocks = ShardBlocks([division.blocks[number] for number in numbers])
    start, total = numbers.start, len(division.blocks)
    if not blocks and not division.layout.plain:
        blocks.append(Passing())
        start = min(start, total - 1)
    replace_blocks(division.owner, division.attribute, blocks, start, total)
    entry: nn.Module = blocks[0] if len(blocks) else model.get_submodule(division.after[0])
    for name in dict.fromkeys((*division.before, *division.after)):
        original = model.get_submodule(name)
        early, late = name in division.before, name in division.after
        needed = (early and first == 0) or (late and last == division.head)
        if needed and not (early and late and last < division.head):
            continue
        if not late and not [*original.parameters(recurse=False)]:
            continue  # computes arguments of the blocks, as a rotary embedding does
        parent, _, attribute = name.rpartition(".")
        stand_in = BeforeBlocks(original, blocks) if needed else Absent(original)
        setattr(model.get_submodule(parent), attribute, stand_in)
    return entry


def _owned(division: Division, first: int, last: int) -> set[str]:
    return {name for name in division.sizes if first <= division.layer_of(name) <= last}


@dataclass(frozen=True, slots=True)
class ShardTensors:
    """Which of a model's tensors a shard loads, and how it keeps them."""

    owned: set[str]
    found: list[TensorRecipe]
    kept: Keeping
    nbytes: int  # their memory once loaded; a tensor with two names counts once


def plan(division: Division, first: int, last: int, tensors: tuple[TensorAt, ...], quantize: str) -> ShardTensors:
    """The tensors of layers first..last; to be called before `strip`. ModelError if one is missing or does not fit."""
    owned = _owned(division, first, last)
    found = recipes(division, tensors)
    check(division, found, owned)
    kept = keeping(division, found, quantize)
    sizes: dict[object, int] = {}
    for name in owned:
        packed = name in kept.matrices
        sizes[name if packed else division.tied.get(name, name)] = kept.nbytes(name, division.sizes[name])
    return ShardTensors(owned, found, kept, sum(sizes.values()))


def fill(
    division: Division, first: int, work: ShardTensors, progress: Progress, device: torch.device = CPU
) -> dict[int, int]:
    """Load the tensors into the stripped model; returns their bytes, as base.Shard.weights has them."""
    found, tensors = work.found, [tensor for recipe in work.found for _, tensor in recipe.sources]
    total = sum({(tensor.path, tensor.offset): tensor.nbytes for tensor in tensors}.values())
    packed, done = _pack(work.kept, work.owned, device), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(min(done, total), total)

    def loaded() -> Iterator[_Loaded]:
        made = {name for recipe in found for name in recipe.targets}
        for recipe in found:
            fills = {name: work.owned & division.filled_by(name, made) for name in recipe.targets}
            here = set().union(*fills.values())
            if not here:
                continue
            if recipe.converter is None and here <= work.kept.tables | packed.keys():
                source = recipe.sources[0][1]
                yield here, as_tensor(mapped(source)), True
                count(source.nbytes)
            else:
                own = load(recipe, division.sizes, division.model, count)
                while own:  # pop: a tensor that was moved is not held here too
                    name = next(iter(own))
                    yield fills[name], own.pop(name), False

    return _settle(division, first, packed, loaded(), device)


def make_up(division: Division, first: int, last: int, kept: Keeping, device: torch.device = CPU) -> dict[int, int]:
    """Fill the stripped model's layers first..last with made-up numbers, for timing; returns their bytes."""
    owned = _owned(division, first, last)
    packed = _pack(kept, owned, device)

    def loaded() -> Iterator[_Loaded]:
        for name in owned:
            dtype, shape = division.sizes[name].dtype, tuple(division.sizes[name].shape)
            if name in packed:  # one row repeated: the whole is never in memory in float
                yield {name}, made_up(shape[-1:], dtype).expand(shape), False
            else:
                yield {name}, made_up(shape, dtype), name in kept.tables

    return _settle(division, first, packed, loaded(), device)


def _settle(
    division: Division, first: int, packed: dict[str, Packed], loaded: Iterator[_Loaded], device: torch.device
) -> dict[int, int]:
    """Put loaded tensors, one after the other, into the model and on the device; returns their bytes by tensor."""
    places, weights = _places(division, first), {id(one): one.nbytes for one in packed.values()}
    for names, tensor, stays in loaded:
        for name in packed.keys() & names:
            packed[name].fill(tensor)
        wanted = names - packed.keys()
        if wanted and not stays:
            tensor = _moved(tensor, device)
            weights[tensor.data_ptr()] = tensor.nbytes
        for name in wanted:
            _place(division.model, places.get(name, name), tensor)
    return weights


def _pack(kept: Keeping, owned: set[str], device: torch.device) -> dict[str, Packed]:
    """Replace the modules whose matrices are rounded by empty `Packed` ones; by the name of the weight."""
    packed: dict[str, Packed] = {}
    for name in kept.matrices.keys() & owned:
        matrix = kept.matrices[name]
        packed[name] = Packed(matrix, BITS[kept.quantize], device)
        setattr(matrix.parent, matrix.attribute, packed[name])
    if packed and device == CPU:
        make_pool(torch.get_num_threads())
    return packed


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the same object if it is there already."""
    if tensor.device == device:
        return tensor
    with turn(device):
        return tensor.detach().to(device)


def made_up(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small numbers around zero, or around one for a norm: like a model's, and not denormal, which would be slow."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    # Drawing every number takes seconds for a large layer; a prime length leaves no two rows of a matrix alike.
    drawn = torch.empty(PATTERN).uniform_(-SPREAD, SPREAD, generator=torch.Generator().manual_seed(0))
    about_one = len(shape) == 1
    return as_tensor(np.resize(as_array((drawn + about_one).to(dtype)), shape))


def _places(division: Division, first: int) -> dict[str, str]:
    """The names of the blocks' tensors in the stripped model, whose list starts at this shard's first block."""
    offset = division.numbers(first, division.head).start
    places = {}
    for name in division.sizes:
        if name.startswith(division.prefix):
            number, _, rest = name[len(division.prefix) :].partition(".")
            places[name] = f"{division.prefix}{int(number) - offset}.{rest}"
    return places


def _place(model: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._buffers:
        tensor = module._buffers[attribute] = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    else:
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[attribute] = tensor
    tensor.__dict__["_is_hf_initialized"] = True  # transformers' mark: do not fill this with random numbers


def finish(division: Division, whole: Any, device: torch.device = CPU) -> None:
    """Compute what no file has: rotary frequencies, masks. `whole` is the configuration before it was cut."""
    model, owner = division.model, division.owner
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers() if buffer.is_meta)
    if tables > MAX_TABLE_BYTES:
        raise ModelError(f"config.json asks for {tables} bytes that no file holds; at most {MAX_TABLE_BYTES} are taken")
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False
    cut, owner.config = owner.config, whole
    model.initialize_weights()
    owner.config = cut
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    left += [name for name, one in model.named_modules() if isinstance(one, Packed) and not one.filled]
    if left:
        raise EngineError(f"tensor {left[0]} was not loaded")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _moved(buffer, device)
    bridge(model, device)
