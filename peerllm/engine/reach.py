"""Where a model's sequences can be taken up again: what its blocks keep of one decides how far back that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peerllm.engine import base
from peerllm.engine.base import Reach
from peerllm.engine.states import FULL, WINDOWED, LayerState

STATIC_ROPE = frozenset(["default", "linear", "yarn", "llama3", "proportional"])  # others follow the longest position


def reach_of(model: Any, kept: Mapping[int, LayerState]) -> Reach | None:
    """Of a model with those states; None where a prompt in one run would be computed otherwise than going on."""
    if any(_follows_length(module) or _bounds_runs(module) for module in model.modules()):
        return None
    rewinds = all(state.kind in (FULL, *WINDOWED) and not state.state_bytes for state in kept.values())
    rooms = [state.kept_tokens for state in kept.values() if state.kept_tokens is not None]
    return Reach(rewinds, min(rooms, default=None), base.ROLLBACK_TOKENS)


def _follows_length(module: Any) -> bool:
    """A rotary embedding that depends on how long the sequence is when a token is computed."""
    kinds = getattr(module, "rope_type", "default")
    if not set(kinds.values() if isinstance(kinds, dict) else [kinds]) <= STATIC_ROPE:
        return True
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    return isinstance(parameters, dict) and bool({"long_mscale", "short_mscale"} & parameters.keys())


def _bounds_runs(module: Any) -> bool:
    """Mamba2's time step is bounded where tokens come in a run, and not where they come one at a time."""
    limit = getattr(module, "time_step_limit", None)
    return limit is not None and tuple(limit) != (0.0, math.inf)
