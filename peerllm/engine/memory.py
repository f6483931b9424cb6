"""Freed memory back to the system, which glibc's allocator does not do by itself."""

from __future__ import annotations

import ctypes
import gc

import torch

from peerllm.engine.place import turn


def return_memory() -> None:
    """After something large was let go."""
    gc.collect()
    trim()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for number in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(number):  # asking another device would make room on it
                with torch.cuda.device(number):
                    torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        with turn(torch.device("mps")):
            torch.mps.empty_cache()


def trim() -> None:
    """What is free already, at once."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
