"""Attention of a packed row: each sequence over its own slot, whatever else stands in the row.

transformers' models call it through their registry of attention functions. There is no mask function of that name, so
models make no masks: what a query may see follows from its segment's view of the slot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from peerllm.errors import EngineError

PACKED = "peerllm-packed"  # the function's name in transformers' registry
# What layers hand over beside scale, soft cap and sinks: known to say nothing that a view of the slot does not.
IGNORED = frozenset(
    [
        "dropout", "sliding_window", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache",
        "output_attentions", "output_router_logits", "output_hidden_states", "layer_idx", "training", "layer_head_mask",
    ]
)  # fmt: skip


class View(Protocol):
    """One segment's part of a row, as one layer's attention sees it."""

    start: int  # of its tokens in the row
    length: int
    mask: torch.Tensor | None  # [length, tokens shown], added to the scores; None: all are seen, or `causal`
    causal: bool  # the first token shown is the first of the segment


class Row(Protocol):
    """The row that this thread computes, as its cache holds it."""

    def views(self, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[View, torch.Tensor, torch.Tensor]]: ...


_thread = threading.local()


@contextmanager
def computing(row: Any) -> Iterator[None]:
    """Attention on this thread is over `row` (a PackedCache; no other kind is asked) while the context lasts."""
    _thread.row = row
    try:
        yield
    finally:
        del _thread.row


def attend(
    module: Any,
    query: torch.Tensor,  # [1, heads, n, width]
    key: torch.Tensor,  # [1, key heads, n, width], as the cache gave it back
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[1, n, heads, value width]: what each token takes from its own sequence."""
    if attention_mask is not None or any(kwargs[name] is not None for name in kwargs.keys() - IGNORED):
        raise EngineError(f"attention was handed what a packed row does not know: {sorted(kwargs)}")
    heads, groups = query.shape[1], key.shape[1]
    plain = softcap is None and s_aux is None
    outputs = []
    for view, keys, values in _thread.row.views(key, value):
        part = query.narrow(2, view.start, view.length)
        if not plain:
            out = _by_hand(part, keys, values, view, scaling or query.shape[-1] ** -0.5, softcap, s_aux)
        elif view.length == 1:  # the heads that share keys stand in the place of tokens: nothing is repeated
            out = scaled_dot_product_attention(
                part.reshape(1, groups, heads // groups, part.shape[-1]), keys, values, scale=scaling
            ).reshape(1, 1, heads, values.shape[-1])
        elif heads != groups and part.is_cuda:
            out = _by_share(part, keys, values, view, scaling)
        else:
            out = scaled_dot_product_attention(
                part,
                keys,
                values,
                attn_mask=view.mask,
                is_causal=view.causal,
                scale=scaling,
                enable_gqa=heads != groups,
            ).transpose(1, 2)
        outputs.append(out)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _by_share(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, view: View, scaling: float | None
) -> torch.Tensor:
    """Heads that share keys one after the other.

    CUDA's kernel that takes a mask knows no shared keys: all at once, torch would repeat them and keep every score.
    """
    _, heads, length, width = query.shape
    groups = keys.shape[1]
    shared = query.view(1, groups, heads // groups, length, width)
    outs = [
        scaled_dot_product_attention(
            shared[:, :, number], keys, values, attn_mask=view.mask, is_causal=view.causal, scale=scaling
        )
        for number in range(heads // groups)
    ]
    return torch.stack(outs, dim=2).view(1, heads, length, -1).transpose(1, 2)


def _by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """With a soft cap or sinks; of a chunk one group of heads after the other, so that few scores are held at once."""
    _, heads, length, width = query.shape
    groups, shown = keys.shape[1:3]
    grouped = query.reshape(groups, heads // groups, length, width)
    out = query.new_empty(1, length, heads, values.shape[-1])
    placed = out.view(length, groups, heads // groups, -1)
    mask = query.new_full((length, length), float("-inf")).triu_(1) if view.causal else view.mask
    step = groups if length == 1 else 1
    for first in range(0, groups, step):
        some = slice(first, first + step)
        rows = grouped[some].reshape(step, -1, width)
        scores = torch.matmul(rows, keys[0, some].transpose(1, 2)).view(step, -1, length, shown) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores += mask
        if sinks is not None:
            sink = sinks.view(groups, -1, 1, 1)[some].expand(-1, -1, length, 1).to(scores.dtype)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., :shown]
        taken = torch.matmul(weights.reshape(step, -1, shown), values[0, some])
        placed[:, some] = taken.view(step, -1, length, values.shape[-1]).permute(2, 0, 1, 3)
    return out


def register() -> None:
    """Make the function known to transformers; may be called twice."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(PACKED, attend)


def adopt(model: Any, name: str) -> list[tuple[Any, str]]:
    """Every part of `model` calls the attention function `name` from now on; returns what to `restore`."""
    before: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in before:
            before[id(config)] = config, config._attn_implementation_internal
            config._attn_implementation_internal = name
    return list(before.values())


def restore(before: list[tuple[Any, str]]) -> None:
    """Undo `adopt`."""
    for config, name in before:
        config._attn_implementation_internal = name
