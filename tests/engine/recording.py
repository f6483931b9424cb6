"""An engine process that also writes down the logits it draws from: `PEERLLM_TEST_LOGITS` names the folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peerllm.engine import __main__ as engine
from peerllm.engine.backends import Backends
from peerllm.engine.base import Draw
from peerllm.engine.sampler import SeededSampler

FOLDER = "PEERLLM_TEST_LOGITS"


class RecordingSampler(SeededSampler):
    """Each row of logits is in the file before its token is told."""

    def __call__(self, logits: npt.ArrayLike, draws: Sequence[Draw]) -> list[int]:
        with (Path(os.environ[FOLDER]) / str(os.getpid())).open("ab") as file:
            for row, draw in zip(np.asarray(logits, np.float32), draws, strict=True):
                np.int32(draw.position).tofile(file)
                row.tofile(file)
        return super().__call__(logits, draws)


def recorded(folder: Path, vocabulary: int) -> dict[int, list[npt.NDArray[np.float32]]]:
    """The rows [vocabulary] drawn from since the last call, by the position of the token drawn."""
    rows: dict[int, list[npt.NDArray[np.float32]]] = {}
    for path in folder.iterdir():
        for position, row in np.fromfile(path, dtype=[("position", "<i4"), ("row", "<f4", (vocabulary,))]):
            rows.setdefault(int(position), []).append(row.copy())
        path.unlink()
    return rows


if __name__ == "__main__":
    Backends.sampler = RecordingSampler()
    engine.main()
