"""At the head: the hidden states of a prompt's tokens become one vector, chunk by chunk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Floats
from peerllm.errors import EngineError
from peerllm.types import Pooling


class Pool:
    """Of one sequence, whose states come in order: their mean, or the last."""

    def __init__(self, pooling: Pooling) -> None:
        self._mean = pooling == "mean"
        self._sum: npt.NDArray[np.float64] | None = None  # of floats that chunks do not make differ
        self._count = 0

    def add(self, states: Floats) -> None:
        """The states [n, hidden] of the next tokens, after the model's last norm."""
        rows = states.astype(np.float64) if self._mean else states[-1:].astype(np.float64)
        whole = rows.sum(0)
        self._sum = whole if self._sum is None or not self._mean else self._sum + whole
        self._count = self._count + len(rows) if self._mean else 1

    def vector(self) -> Floats:
        """Of all that came; EngineError if it is no vector of numbers."""
        if self._sum is None:
            raise EngineError("nothing was computed of this prompt")
        made = (self._sum / self._count).astype(np.float32)
        if not np.isfinite(made).all():
            raise EngineError("the model computed hidden states that are no finite numbers; try --exact")
        return made
