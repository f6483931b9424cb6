"""Where shards compute: on the processors, or on an accelerator that torch drives.

Weights, KV and intermediate results are in the accelerator's memory. Token ids, hidden states and logits come and go in
the machine's own memory, so links and the sampler need not know about accelerators.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from peerllm.errors import BadInputError
from peerllm.types import COMPUTE

CPU = torch.device("cpu")
LEAST_FOR_MPS = "2.12"  # earlier versions compute attention wrongly on Metal, without an error
_metal = threading.Lock()

# After such an error the accelerator does not work in this process any more; the engine must be restarted.
BROKEN: tuple[type[BaseException], ...] = tuple(filter(None, (getattr(torch, "AcceleratorError", None),)))


@dataclass(frozen=True, slots=True)
class ComputePlace:
    """A device for torch; `name` is shown to people and stored with measurements."""

    device: torch.device
    name: str
    memory_bytes: int = 0  # its own memory; 0: it uses the machine's
    free_bytes: int = 0  # free in its own memory

    def wait(self) -> None:
        """Wait until the device has done all work given to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


PROCESSORS = ComputePlace(CPU, "cpu")


def find(wish: str) -> ComputePlace:
    """The place for `cpu`, `cuda`, `cuda:N` or `mps`; BadInputError for anything else, or if it is not available."""
    if not COMPUTE.fullmatch(wish):
        raise BadInputError(f"--compute takes cpu, cuda, cuda:N or mps, not {wish!r}")
    if wish == "cpu":
        return PROCESSORS
    return _mps() if wish == "mps" else _cuda(int(wish.partition(":")[2] or 0))


def _cuda(number: int) -> ComputePlace:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        there = f"has {count}" if count else "sees none: it needs a torch built for CUDA, and NVIDIA's driver"
        raise BadInputError(f"--compute cuda:{number}: this device {there}; leave it out to compute on processors")
    about = torch.cuda.get_device_properties(number)
    free_bytes, memory_bytes = torch.cuda.mem_get_info(number)
    place = torch.device("cuda", number)
    if getattr(about, "is_integrated", False):  # as on a Jetson: processors and GPU share one memory
        return ComputePlace(place, f"cuda {about.name}")
    return ComputePlace(place, f"cuda {about.name}", memory_bytes, free_bytes)


def _mps() -> ComputePlace:
    if not torch.backends.mps.is_available():
        raise BadInputError("--compute mps: this torch drives no Apple GPU; leave it out to compute on processors")
    if torch.__version__ < LEAST_FOR_MPS:
        raise BadInputError(f"--compute mps: torch {torch.__version__} attends wrongly there; {LEAST_FOR_MPS} does not")
    most = int(torch.mps.recommended_max_memory())  # Metal shares the processors' memory
    return ComputePlace(torch.device("mps"), "mps", most, min(most, int(psutil.virtual_memory().available)))


def empty_caches() -> None:
    """Return accelerator memory that torch keeps for reuse."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for number in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(number):  # touching an unused device would allocate on it
                with torch.cuda.device(number):
                    torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        with turn(torch.device("mps")):
            torch.mps.empty_cache()


def turn(device: torch.device) -> AbstractContextManager[object]:
    """A lock to hold while using the device: Metal does not support two threads at once. Elsewhere it does nothing."""
    return _metal if device.type == "mps" else nullcontext()


def bridge(model: nn.Module, device: torch.device) -> None:
    """Let the processor look up embeddings that stay in their files, and move the rows to `device`."""
    if device == CPU:
        return

    def to_table(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(one.to(CPU) for one in args)

    def to_device(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(device)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.device == CPU:
            for name, buffer in module._buffers.items():  # such as a scale for the rows
                module._buffers[name] = None if buffer is None else buffer.to(CPU)
            module.register_forward_pre_hook(to_table)
            module.register_forward_hook(to_device)
