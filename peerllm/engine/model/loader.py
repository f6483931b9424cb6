"""A shard's tensors: mapped from safetensors files and copied into our own memory, in the compute dtype."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from peerllm.engine.messages import TensorAt
from peerllm.engine.model.tensor_names import TensorRecipe
from peerllm.engine.weights.checkpoint import mapped
from peerllm.errors import ModelError

ADDED_DTYPES = {  # dtypes that torch cannot take from numpy arrays
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}

# Loaded tensors by their place on disk: an embedding and a head that share a tensor there share it in memory too, even
# if they belong to two shards of this process.
_loaded: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = weakref.WeakValueDictionary()


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor; a copy if the array is read-only or not aligned, which torch does not support."""
    own = np.require(array, requirements=("C", "W", "A"))
    for dtype, added in ADDED_DTYPES.items():
        if own.dtype == added:
            return torch.from_numpy(own.view(f"i{own.itemsize}")).view(dtype)
    return torch.from_numpy(own)


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor on the processor as an array over the same memory."""
    if tensor.dtype in ADDED_DTYPES:
        bits: NDArray[Any] = tensor.view(torch.int8 if tensor.itemsize == 1 else torch.int16).numpy()
        return bits.view(ADDED_DTYPES[tensor.dtype])
    array: NDArray[Any] = tensor.numpy()
    return array


def load(
    recipe: TensorRecipe, sizes: Mapping[str, torch.Tensor], model: Any, count: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Make a recipe's tensors, in the dtypes of `sizes`; `count` is called with bytes read. ModelError if damaged."""
    if recipe.converter is None:
        (name,), (_, source) = recipe.targets, recipe.sources[0]
        return {name: _shared(source, sizes[name].dtype, count)}
    stacked = _stack(recipe, sizes[recipe.targets[0]], count)
    return {recipe.targets[0]: stacked} if stacked is not None else _convert(recipe, sizes, model, count)


def _shared(source: TensorAt, dtype: torch.dtype, count: Callable[[int], None]) -> torch.Tensor:
    try:
        status = Path(source.path).stat()
    except OSError as error:
        raise ModelError(f"{Path(source.path).name} cannot be read: {error}") from error
    key = (source.path, status.st_ino, status.st_mtime_ns, source.offset, source.shape, dtype)
    tensor = _loaded.get(key)
    if tensor is None:
        tensor = _loaded[key] = torch.nn.Parameter(torch.empty(source.shape, dtype=dtype), requires_grad=False)
        tensor.copy_(as_tensor(mapped(source)))
    count(source.nbytes)
    return tensor


def _stack(recipe: TensorRecipe, target: torch.Tensor, count: Callable[[int], None]) -> torch.Tensor | None:
    """Stack experts that the file has one by one, joining their parts. None if the recipe is another conversion."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *rest = recipe.converter.operations
    if type(first) is not MergeModulelist or first.dim != 0 or len(recipe.targets) != 1 or len(rest) > 1:
        return None
    if rest and (type(rest[0]) is not Concatenate or rest[0].dim != 1):
        return None
    shape = tuple(target.shape)
    groups = [[t for p, t in recipe.sources if p == pattern] for pattern in recipe.converter.source_patterns]
    groups = [group for group in groups if group]
    rows = [group[0].shape[0] for group in groups]
    fits = all(t.shape == (r, *shape[2:]) for group, r in zip(groups, rows, strict=True) for t in group)
    if not fits or any(len(group) != shape[0] for group in groups) or (sum(rows) != shape[1]):
        raise ModelError(f"the experts of {recipe.targets[0]} are misshapen or not all there")
    out = torch.empty(shape, dtype=target.dtype)
    start = 0
    for group, length in zip(groups, rows, strict=True):
        for expert, tensor in enumerate(group):
            out[expert, start : start + length] = as_tensor(mapped(tensor))
            count(tensor.nbytes)
        start += length
    return out


def _convert(
    recipe: TensorRecipe, sizes: Mapping[str, torch.Tensor], model: Any, count: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Do any other conversion with transformers' own operations."""
    for pattern, source in recipe.sources:
        recipe.converter.add_tensor(recipe.targets[0], source.name, pattern, as_tensor(mapped(source)))
        count(source.nbytes)
    try:
        made = recipe.converter.convert(recipe.targets[0], model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"tensor {recipe.targets[0]} cannot be made from the model's files: {error}") from error
    result = {}
    for name in made.keys() & sizes.keys():
        tensor, size = made[name][0] if isinstance(made[name], list) else made[name], sizes[name]
        if tensor.shape != size.shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}; the model needs {list(size.shape)}")
        # The copy brings tensors that no operation touched out of their files into memory.
        result[name] = torch.empty(size.shape, dtype=size.dtype).copy_(tensor)
    return result
