"""What the runtime needs of a compute backend."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "aiohttp", "onnxruntime", "onnx", "peerllm")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a daemon wants to know of its engine. `runtime_bytes`: resident size with all libraries and no model.

    `place` names where it computes; `memory_bytes` and `free_bytes` are of that place's own memory, 0 if it has none.
    """

    runtime_bytes: int
    versions: Mapping[str, str]
    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]
    place: str = "cpu"
    memory_bytes: int = 0
    free_bytes: int = 0


class Backend(Protocol):
    """All but `sampler` run in the loader thread or a helper's, not in the compute thread."""

    sampler: Sampler

    @property
    def broken(self) -> tuple[type[BaseException], ...]:
        """After such an error nothing in this process computes any more."""
        ...

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        """Before all else; `compute` and `threads` say where from now on. BadInputError if that is not here."""
        ...

    def load(self, spec: LoadStage, progress: Progress) -> Shard: ...
    def inspect(self, message: Inspect) -> Inspected: ...
    def measure(self, message: Measure) -> Measured: ...

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        """`check` is called before every pass and raises when it shall end."""
        ...


def versions() -> dict[str, str]:
    """Library versions by name, Python's among them."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a board's own build may come without metadata
            found[library] = "unknown"
    return found
