"""What each block keeps of a sequence, found by running it without data, and how far back a sequence can go."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from peerllm.engine.base import Reach
from peerllm.engine.model.blocks import ShardBlocks, run_without_data, stand_in
from peerllm.engine.model.config import text_config
from peerllm.engine.model.division import Division
from peerllm.engine.state import state_kinds
from peerllm.engine.state.layer_states import REWINDS, SNAPSHOTS_OF, UNKEPT, ProbeCache
from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import ModelError

STATIC_ROPE = frozenset(["default", "linear", "yarn", "llama3", "proportional"])  # others follow the length


def probe(division: Division, numbers: range) -> dict[int, LayerState]:
    """What each of the blocks `numbers` (from 0) keeps of a sequence; one block of each kind is run."""
    kinds, arguments = get_layer_types_and_kwargs(text_config(division.model.config))
    known: dict[object, LayerState] = {}
    states: dict[int, LayerState] = {}
    for number in numbers:
        if kinds[number] == UNKEPT:
            states[number] = LayerState()
            continue
        key = (kinds[number], str(arguments[number]), shape_key(division.blocks[number]))
        if key not in known:
            known[key] = _probe_block(division, number)
        states[number] = known[key]
    return states


def run_block(division: Division, number: int, block: nn.Module) -> tuple[ProbeCache, Exception | None]:
    """Run `block` as block `number`, without data: what it would keep, and the exception that ended it.

    It runs alone, or after those of its unit, whose keys and values it may use.
    """
    cache = ProbeCache(len(division.blocks), *get_layer_types_and_kwargs(text_config(division.model.config)))
    try:
        first = division.units[division.unit_of(number)].start
        blocks = ShardBlocks([*division.blocks[first:number], block])
        with stand_in(division.owner, division.attribute, blocks, first):
            run_without_data(division.model, cache)
    except Exception as error:  # a foreign forward may raise anything
        return cache, error
    return cache, None


def _probe_block(division: Division, number: int) -> LayerState:
    block = division.blocks[number]
    given: list[Any] = []
    hook = block.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
    cache, error = run_block(division, number, block)
    hook.remove()
    state = cache.state(number)
    # Routing of experts needs values, so the run may fail there; by then attention has mostly run.
    if error is None or state.tokens or state.fixed:
        return state
    if not given:
        raise ModelError(f"block {number} cannot be measured: {error}") from error
    # Run again, on zeros. Pages that are never written take no memory.
    real = copy.deepcopy(block).to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        tensor.data = torch.zeros_like(tensor)
    args, kwargs = _real(given[0])
    with torch.inference_mode():
        real(*args, **kwargs)
    return cache.state(number)


def _real(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, device="cpu")
    if isinstance(value, tuple | list):
        return type(value)(_real(item) for item in value)
    return {key: _real(item) for key, item in value.items()} if isinstance(value, dict) else value


def shape_key(block: nn.Module) -> tuple[object, ...]:
    """A key that is equal for blocks with the same parameters."""
    return tuple((name, tuple(t.shape), t.dtype) for name, t in block.named_parameters())


def reach_of(division: Division, kept: Mapping[int, LayerState]) -> Reach | None:
    """How far back sequences can go; None if a prompt in one run would give other numbers than continuing a slot."""
    if any(_follows_length(module) or _bounds_runs(module) for module in division.model.modules()):
        return None
    kinds = set(layer_kinds(division))
    reach = state_kinds.reach_of(kept.values())
    if not kinds <= {*REWINDS, *SNAPSHOTS_OF}:
        reach = replace(reach, rewinds=False, snapshots=False)
    return reach


def layer_kinds(division: Division) -> list[str]:
    """transformers' layer type of each block."""
    return list(get_layer_types_and_kwargs(text_config(division.model.config))[0])


def _follows_length(module: Any) -> bool:
    """Whether a rotary embedding depends on how long the sequence is when a token is computed."""
    kinds = getattr(module, "rope_type", "default")
    if not set(kinds.values() if isinstance(kinds, dict) else [kinds]) <= STATIC_ROPE:
        return True
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    return isinstance(parameters, dict) and bool({"long_mscale", "short_mscale"} & parameters.keys())


def _bounds_runs(module: Any) -> bool:
    """Whether a Mamba2 module bounds its time step: it does so for runs of tokens and not for single ones."""
    limit = getattr(module, "time_step_limit", None)
    return limit is not None and tuple(limit) != (0.0, math.inf)
