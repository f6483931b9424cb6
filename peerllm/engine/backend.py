"""What the runtime needs of a compute backend."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.messages import Facts, Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "aiohttp", "onnxruntime", "onnx", "peerllm")


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
