"""Can a model's tokens be packed? Its blocks are run once without data to see how they use masks, cache and attention.

Packed attention is right where each block stores keys and values once, attends over just those, and hides nothing but
what comes later or lies outside the layer's window. Whatever else a model does keeps it to one sequence at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peerllm.engine.attention import IGNORED, adopt, restore
from peerllm.engine.blocks import Blocks, stand_in
from peerllm.engine.config import text_config
from peerllm.engine.division import Division
from peerllm.engine.dryrun import PROBE_TOKENS, accepted, run_without_data
from peerllm.engine.probing import shape_key
from peerllm.engine.states import FULL, LayerState, ProbeCache

WATCHED = "peerllm-watched"  # the attention and mask functions that only take notes
SLIDING = "sliding_attention"
STATIC_ROPE = frozenset(["default", "linear", "yarn", "llama3", "proportional"])  # others follow the longest position
HONOURED = frozenset(["scaling", "softcap", "s_aux"])  # what packed attention does with what a layer hands over


class _Misfit(Exception):
    """Why tokens cannot be packed."""


@dataclass(slots=True)
class _Notes:
    """Of one block's walk."""

    stored: list[tuple[int, Any, Any]] = field(default_factory=list)
    masks: list[tuple[torch.Tensor, Any]] = field(default_factory=list)  # given to the model, and what each hides
    attended: list[tuple[Any, Any, Any, Any, dict[str, Any]]] = field(default_factory=list)  # as it was called
    asked_length: bool = False


class _WatchedCache(ProbeCache):
    """Notes what is stored and whether anyone asks how long the sequence is."""

    def __init__(self, notes: _Notes, *args: Any) -> None:
        super().__init__(*args)
        self.notes = notes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.notes.asked_length = True
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.notes.stored.append((layer_idx, key_states, value_states))
        return key_states, value_states


def obstacle(division: Division, states: Mapping[int, LayerState]) -> str | None:
    """Why tokens of several sequences cannot stand in one row through the blocks of `states`; None if they can."""
    from transformers.cache_utils import get_layer_types_and_kwargs
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not accepted(division.model, position_ids=None):
        return "it is not told its tokens' positions"
    try:
        _check_rope(division.model)
        for state in states.values():
            if state.kind not in (FULL, SLIDING) or state.state_bytes:
                raise _Misfit(f"layers of kind {state.kind!r}")
            if not (state.keys and state.values):
                raise _Misfit("a layer keeps no keys and values")
        AttentionInterface.register(WATCHED, _attend)
        AttentionMaskInterface.register(WATCHED, _mask)
        kinds, arguments = get_layer_types_and_kwargs(text_config(division.model.config))
        known: set[object] = set()
        for number, state in states.items():
            block = division.blocks[number]
            key = (state.kind, str(state.arguments), shape_key(block), settings(block))
            if key not in known:
                _walk(division, number, state, kinds, arguments)
                known.add(key)
    except _Misfit as misfit:
        return str(misfit)
    return None


def follows_length(model: Any) -> bool:
    """Whether a token's rotary embedding depends on how long the sequence is when it is computed."""
    try:
        _check_rope(model)
    except _Misfit:
        return True
    return False


def _check_rope(model: Any) -> None:
    for module in model.modules():
        kinds = getattr(module, "rope_type", "default")
        if not set(kinds.values() if isinstance(kinds, dict) else [kinds]) <= STATIC_ROPE:
            raise _Misfit(f"rotary embedding of type {kinds!r} follows the longest position")
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        if isinstance(parameters, dict) and {"long_mscale", "short_mscale"} & parameters.keys():
            raise _Misfit("the rotary embedding's scale follows the longest position")


def settings(block: Any) -> tuple[object, ...]:
    """Plain attributes of a block's parts: blocks built alike may still be told different things."""
    plain = (int, float, str, bool, type(None))
    numbered = ("layer_idx", "layer_id", "layer_number")
    return tuple(
        (path, name, value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in numbered
    )


_thread = threading.local()


def _walk(division: Division, number: int, state: LayerState, kinds: Any, arguments: Any) -> None:
    notes = _thread.notes = _Notes()
    cache = _WatchedCache(notes, len(division.blocks), kinds, arguments)
    before = adopt(division.model, WATCHED)
    try:
        with stand_in(division.owner, division.attribute, Blocks([division.blocks[number]]), number):
            run_without_data(division.model, cache)
    except Exception as error:  # routing of experts depends on values, so it may stop here; attention has run by then
        if not notes.attended:
            raise _Misfit("its attention is its own") from error
    finally:
        restore(before)
        del _thread.notes
    if notes.asked_length:
        raise _Misfit("it asks how long the sequence is")
    if [kept[0] for kept in notes.stored] != [number] or len(notes.attended) != 1:
        raise _Misfit("its attention is its own")
    _judge(notes, state, division.dtype)


def _mask(*args: Any, mask_function: Any, **kwargs: Any) -> torch.Tensor:
    """Stands in the mask's place, so that the layer that is given it can be told."""
    marker = torch.empty(1, 1, PROBE_TOKENS, PROBE_TOKENS, device="meta")
    _thread.notes.masks.append((marker, mask_function))
    return marker


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    _thread.notes.attended.append((query, key, value, attention_mask, kwargs))
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _judge(notes: _Notes, state: LayerState, dtype: torch.dtype) -> None:
    """_Misfit unless packed attention does for this layer what the model itself would."""
    query, key, value, mask, handed = notes.attended[0]
    if key is not notes.stored[0][1] or value is not notes.stored[0][2]:
        raise _Misfit("it attends over other keys and values than it keeps")
    if not query.dtype == key.dtype == value.dtype == state.dtype == dtype:
        raise _Misfit(f"attention in {query.dtype}, not {dtype}")
    heads, groups, width = query.shape[1], key.shape[1], query.shape[3]
    if query.shape != (1, heads, PROBE_TOKENS, width) or key.shape != (1, groups, PROBE_TOKENS, width):
        raise _Misfit("queries and keys do not fit together")
    if value.shape[:3] != key.shape[:3] or heads % groups:
        raise _Misfit("keys and values do not fit together")
    strange = sorted(name for name, held in handed.items() if held is not None and name not in IGNORED | HONOURED)
    if strange or handed.get("is_causal") is False or not isinstance(handed.get("scaling"), float | None):
        raise _Misfit(f"attention is handed {', '.join(strange) or 'what is not known'}")
    hides = [function for marker, function in notes.masks if marker is mask]
    if not hides or not _alike(hides[0], state.window):
        raise _Misfit("its mask is its own")


def _alike(hides: Any, window: int | None) -> bool:
    """Does a model's mask function show what a causal mask with that window does? Asked where it could differ."""
    reach = window or PROBE_TOKENS
    queries = sorted({place for place in (0, 1, reach - 1, reach, reach + 1, 2 * reach + 1, 1 << 20) if place >= 0})
    for place in queries:
        near = (0, 1, place - reach - 1, place - reach, place - reach + 1, place - 1, place, place + 1, place + reach)
        keys = torch.tensor(sorted({key for key in near if key >= 0}))
        try:
            shown = hides(torch.tensor(0), torch.tensor(0), torch.tensor(place), keys)
        except Exception:  # a mask that follows from more than positions
            return False
        ours = keys <= place if window is None else (keys <= place) & (keys > place - window)
        if not torch.equal(torch.as_tensor(shown).expand_as(ours), ours):
            return False
    return True
