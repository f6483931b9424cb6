"""A shard's tensors, from safetensors into memory: each is read in bounded pieces straight into its final place."""

from __future__ import annotations

import io
import math
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peerllm.engine.messages import TensorAt
from peerllm.engine.names import Recipe
from peerllm.errors import ModelError

MAPPED = "_peerllm_mapped"  # an attribute of tensors that lie in their file
PIECE_BYTES = 1 << 20  # read at once when the file's dtype is not the one computed in
FILE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Tensors in memory by where they came from: an embedding and a head that share one on disk share it here too, also
# between two shards of this process.
_loaded: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = weakref.WeakValueDictionary()

Target = tuple[torch.dtype, tuple[int, ...]]


def load(
    recipe: Recipe, targets: dict[str, Target], model: Any, count: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """The tensors a recipe makes, in their targets' dtypes; `count` is told of bytes read. ModelError if damaged."""
    if recipe.converter is None:
        (name,), (_, source) = recipe.targets, recipe.sources[0]
        return {name: _shared(source, targets[name], count)}
    stacked = _stack(recipe, targets, count)
    return stacked if stacked is not None else _convert(recipe, targets, model, count)


def _shared(source: TensorAt, target: Target, count: Callable[[int], None]) -> torch.Tensor:
    try:
        status = Path(source.path).stat()
    except OSError as error:
        raise ModelError(f"{Path(source.path).name} cannot be read: {error}") from error
    key = (source.path, status.st_ino, status.st_mtime_ns, source.offset, source.shape, target[0])
    if (tensor := _loaded.get(key)) is not None:
        count(source.nbytes)
        return tensor
    tensor = torch.nn.Parameter(torch.empty(source.shape, dtype=target[0]), requires_grad=False)
    read_into(source, tensor, count)
    _loaded[key] = tensor
    return tensor


def mapped(source: TensorAt) -> torch.Tensor:
    """The file's own bytes as a tensor that is not to be written to: its pages are the system's, no memory of ours."""
    try:
        with Path(source.path).open("rb") as file:
            start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
            length = source.offset - start + source.nbytes
            if file.seek(0, io.SEEK_END) < source.offset + source.nbytes:
                raise ModelError(f"{Path(source.path).name} ends in the middle of tensor {source.name}; fetch it again")
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        raise ModelError(f"{Path(source.path).name} cannot be read: {error}") from error
    dtype = FILE_DTYPES[source.dtype]
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=source.offset - start)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # the format aligns tensors; not every writer of it does
    tensor = flat.view(dtype).view(source.shape)
    tensor.__dict__[MAPPED] = True
    return tensor


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether it lies in its file, not in memory of ours."""
    return MAPPED in tensor.__dict__


def read_into(source: TensorAt, out: torch.Tensor, count: Callable[[int], None]) -> None:
    """Fill `out` (contiguous, of the source's shape) from the file, in its dtype; takes one piece of extra memory."""
    dtype = FILE_DTYPES[source.dtype]
    try:
        with Path(source.path).open("rb", buffering=0) as file:
            file.seek(source.offset)
            flat = out.view(-1)
            if out.dtype == dtype:
                _fill(file, flat.view(torch.uint8), source, count)
                return
            step = max(PIECE_BYTES // dtype.itemsize, 1)
            # Its own mapping: taken from the allocator it would leave holes between the tensors that stay.
            scratch = mmap.mmap(-1, max(min(step, out.numel()), 1) * dtype.itemsize)
            piece = torch.frombuffer(scratch, dtype=dtype)
            for start in range(0, out.numel(), step):
                part = piece[: out.numel() - start]
                _fill(file, part.view(torch.uint8), source, count)
                flat[start : start + part.numel()].copy_(part)
    except OSError as error:
        raise ModelError(f"{Path(source.path).name} cannot be read: {error}") from error


def _fill(file: io.FileIO, into: torch.Tensor, source: TensorAt, count: Callable[[int], None]) -> None:
    view: Any = memoryview(into.numpy().data) if into.numel() else b""
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + PIECE_BYTES])
        if not got:
            raise ModelError(f"{Path(source.path).name} ends in the middle of tensor {source.name}; fetch it again")
        done += got
        count(got)


def _stack(recipe: Recipe, targets: dict[str, Target], count: Callable[[int], None]) -> dict[str, torch.Tensor] | None:
    """Experts kept one by one in the file, stacked (and their parts joined) in place. None for other conversions."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *rest = recipe.converter.operations
    if type(first) is not MergeModulelist or first.dim != 0 or len(recipe.targets) != 1 or len(rest) > 1:
        return None
    if rest and (type(rest[0]) is not Concatenate or rest[0].dim != 1):
        return None
    dtype, shape = targets[recipe.targets[0]]
    groups = [[t for p, t in recipe.sources if p == pattern] for pattern in recipe.converter.source_patterns]
    groups = [group for group in groups if group]
    rows = [group[0].shape[0] for group in groups]
    fits = all(t.shape == (r, *shape[2:]) for group, r in zip(groups, rows, strict=True) for t in group)
    if not fits or any(len(group) != shape[0] for group in groups) or (sum(rows) != shape[1]):
        raise ModelError(f"the experts of {recipe.targets[0]} are misshapen or not all there")
    out = torch.empty(shape, dtype=dtype)
    start = 0
    for group, length in zip(groups, rows, strict=True):
        for expert, tensor in enumerate(group):
            read_into(tensor, out[expert, start : start + length], count)
        start += length
    return {recipe.targets[0]: out}


def _convert(
    recipe: Recipe, targets: dict[str, Target], model: Any, count: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Any other conversion, by transformers' own operations."""
    for pattern, source in recipe.sources:
        tensor = torch.empty(source.shape, dtype=FILE_DTYPES[source.dtype])
        read_into(source, tensor, count)
        recipe.converter.add_tensor(recipe.targets[0], source.name, pattern, tensor)
    try:
        made = recipe.converter.convert(recipe.targets[0], model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"tensor {recipe.targets[0]} cannot be made from the model's files: {error}") from error
    result = {}
    for name, value in made.items():
        if name not in targets:
            continue
        dtype, shape = targets[name]
        tensor = value[0] if isinstance(value, list) else value
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}; the model needs {list(shape)}")
        result[name] = tensor.to(dtype).contiguous()
    return result


def tensor_bytes(target: Target) -> int:
    """Memory of one tensor."""
    return math.prod(target[1]) * target[0].itemsize
