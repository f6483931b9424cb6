"""How a model's makers pool its hidden states into one vector, where its files say so."""

from __future__ import annotations

import json
from pathlib import Path

from peerllm.errors import ModelError
from peerllm.regular_files import read_regular
from peerllm.stored_types import POOLING_FILE
from peerllm.types import Pooling

MAX_BYTES = 64 << 10
_MODES: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def pooling_of(model_dir: Path) -> Pooling:
    """The mean where nothing is said; ModelError for ways that are not known here."""
    try:
        said = json.loads(read_regular(model_dir / POOLING_FILE, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return "mean"
    if not isinstance(said, dict):
        return "mean"
    modes = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in _MODES:
        raise ModelError(f"its {POOLING_FILE} asks for {' and '.join(modes)[:200]}, which cannot be done here")
    return _MODES[modes[0]]
