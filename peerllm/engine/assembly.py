"""From a whole model without data to a shard: take out what others hold, load the rest, compute what no file holds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peerllm.engine.absent import Absent, BeforeBlocks
from peerllm.engine.base import Progress
from peerllm.engine.blocks import Blocks, replace_blocks
from peerllm.engine.division import Division
from peerllm.engine.loader import Target, load
from peerllm.engine.messages import TensorAt
from peerllm.engine.names import check, recipes
from peerllm.errors import EngineError, ModelError

PATTERN = 262_147  # made-up numbers before they repeat; prime
SPREAD = 0.05  # of made-up numbers
MAX_TABLE_BYTES = 1 << 30  # of a shard; masks of a long context are the largest


def strip(division: Division, first: int, last: int, numbers: range) -> nn.Module:
    """Take out all that belongs to other shards; returns the first module to run on what an earlier shard computed."""
    model = division.model
    blocks = Blocks([division.blocks[number] for number in numbers])
    replace_blocks(division.owner, division.attribute, blocks, numbers.start, len(division.blocks))
    entry: nn.Module = blocks[0] if len(blocks) else model.get_submodule(division.after[0])
    for name in dict.fromkeys((*division.before, *division.after)):
        original = model.get_submodule(name)
        early, late = name in division.before, name in division.after
        needed = (early and first == 0) or (late and last == division.head)
        if needed and not (early and late and last < division.head):
            continue
        if not late and not [*original.parameters(recurse=False)]:
            continue  # what blocks are given by, such as a rotary embedding
        parent, _, attribute = name.rpartition(".")
        stand_in = BeforeBlocks(original, blocks) if needed else Absent(original)
        setattr(model.get_submodule(parent), attribute, stand_in)
    return entry


def _owned(division: Division, first: int, last: int) -> dict[str, Target]:
    return {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in division.sizes.items()
        if first <= division.layer_of(name) <= last
    }


def fill(division: Division, first: int, last: int, tensors: tuple[TensorAt, ...], progress: Progress) -> int:
    """Load the tensors of layers first..last into the stripped model; returns the bytes they take in memory."""
    owned = _owned(division, first, last)
    found = recipes(division, tensors)
    check(division, found, owned)
    total = sum({(tensor.path, tensor.offset): tensor.nbytes for tensor in tensors}.values())
    done = held = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(min(done, total), total)

    places = _places(division, first)
    made = {name for recipe in found for name in recipe.targets}
    for recipe in found:
        targets = {name: (division.sizes[name].dtype, tuple(division.sizes[name].shape)) for name in recipe.targets}
        if not any(name in owned or owned.keys() & set(_aliases(division, name)) for name in targets):
            continue
        for name, tensor in load(recipe, targets, division.model, count).items():
            # A tied tensor fills its other place too, unless the file has one for that as well.
            others = [alias for alias in _aliases(division, name) if alias not in made]
            for place in (name, *others):
                if place in owned:
                    _place(division.model, places.get(place, place), tensor)
            held += tensor.numel() * tensor.element_size()
    return held


def make_up(division: Division, first: int, last: int) -> int:
    """Fill the stripped model's layers first..last with made-up numbers, for timing; returns the bytes they take."""
    places, held = _places(division, first), 0
    for name, (dtype, shape) in _owned(division, first, last).items():
        tensor = made_up(shape, dtype)
        _place(division.model, places.get(name, name), tensor)
        held += tensor.numel() * tensor.element_size()
    return held


def made_up(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small numbers about zero, or about one for a norm: like a model's, and no denormals, which are slow."""
    tensor = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        pattern, flat = _pattern(len(shape) == 1, dtype), tensor.view(-1)
        for start in range(0, flat.numel(), PATTERN):
            part = flat[start : start + PATTERN]
            part.copy_(pattern[: part.numel()])
    return tensor


@lru_cache(maxsize=4)
def _pattern(about_one: bool, dtype: torch.dtype) -> torch.Tensor:
    """Drawing every number takes seconds for a large layer; a prime length leaves no two rows of a matrix alike."""
    drawn = torch.empty(PATTERN).uniform_(-SPREAD, SPREAD, generator=torch.Generator().manual_seed(0))
    return (drawn + about_one).to(dtype)


def _aliases(division: Division, name: str) -> tuple[str, ...]:
    """Other names of the tensor that `name` shares memory with."""
    root = division.tied.get(name, name)
    group = {root, *(alias for alias, other in division.tied.items() if other == root)}
    return tuple(sorted(group - {name}))


def _places(division: Division, first: int) -> dict[str, str]:
    """Where a block's tensors lie in the stripped model: its list starts at this shard's first block."""
    offset = max(first, 1) - 1
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
        module._buffers[attribute] = tensor.data if isinstance(tensor, nn.Parameter) else tensor
        tensor = module._buffers[attribute]
    else:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[attribute] = tensor
    tensor.__dict__["_is_hf_initialized"] = True  # transformers' mark for what it must not fill with random numbers


def finish(division: Division, whole: Any) -> None:
    """Compute what no file holds: rotary frequencies, masks. `whole` is the configuration before it was cut."""
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
    if left:
        raise EngineError(f"tensor {left[0]} was not loaded")
