"""An accelerator that is none: tensors that say they lie elsewhere and refuse to meet those of the processor.

What a shard computes there is computed by the processor, with its numbers; but every operation whose tensors do not
all lie in one place is an error, as it is on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
CPU, META = torch.device("cpu"), torch.device("meta")  # torch's own code takes them for the latter
aten = torch.ops.aten
MIX = frozenset([aten.copy_.default, aten.index.Tensor])  # torch lets these


_passes = 0


@contextmanager
def a_pass() -> Iterator[None]:
    """No tensor without data is made now: what torch makes of its own accord lies on the device."""
    global _passes  # noqa: PLW0603
    _passes += 1
    try:
        yield
    finally:
        _passes -= 1


class Pretend(torch.Tensor):
    """Its numbers are in `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretend:
        with torch.inference_mode(False):  # views of such tensors may be taken in either mode
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                layout=held.layout, device=META, requires_grad=False,
            )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Here(TorchDispatchMode):
    """Tensors are made where they are asked for."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then does not look for a driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """So are those made of Python's numbers, of which torch asks no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **{**kwargs, "device": CPU}).to(DEVICE)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = [one for one in given if isinstance(one, Pretend)]
    if there and func not in MIX and any(not isinstance(one, Pretend) and one.dim() for one in given):
        raise RuntimeError(f"{func}: tensors of the processor and of {DEVICE}")
    owner = {id(one.held): one for one in there}
    goal = next((one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.device)), None)
    goes = goal in (DEVICE, META, None) if there else goal == DEVICE or (goal == META and not given and _passes)
    if func in MIX:
        goes = isinstance(given[0], Pretend)
    if there or goes:
        args, kwargs = tree_map(lambda one: CPU if isinstance(one, torch.device) else one, (args, kwargs))
    args, kwargs = tree_map(lambda one: one.held if isinstance(one, Pretend) else one, (args, kwargs))
    if func is aten.histc.default:  # counts whole numbers there, and only floats here
        args = (args[0].float(), *args[1:])
    out = func(*args, **kwargs)
    if func is aten._to_copy.default and there and not goes and out is args[0]:
        out = out.clone()
    if not goes:
        return out
    return tree_map(lambda one: _there(one, owner) if isinstance(one, torch.Tensor) else one, out)


def _there(held: torch.Tensor, owner: dict[int, Pretend]) -> Pretend:
    """What was written in place is the same tensor still."""
    known = owner.get(id(held))
    return Pretend(held) if known is None else known


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """A device to compute on; old enough to multiply experts one by one."""
    with (
        pytest.MonkeyPatch.context() as patched,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        Here(),
        Made(),
    ):
        patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        yield DEVICE
