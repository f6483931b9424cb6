"""Where a model can be cut: its blocks, and what runs before and after them, found by running it without data.

The whole model is built on the meta device (shapes, no memory). Blocks keep their numbers of the whole model, so that
what they derive from the number (a window, a tensor's name) is right in every shard.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from peerllm.engine.model.blocks import ShardBlocks, run_without_data, stand_in
from peerllm.engine.model.config import text_config
from peerllm.engine.model.rows import RowLayout, row_layout
from peerllm.engine.state.layer_states import ProbeCache
from peerllm.engine.state.state_kinds import inseparable
from peerllm.errors import ModelError, one_line

# Arguments that a block may have beside hidden states: each shard can compute them from positions and the cache.
BLOCK_ARGUMENTS = frozenset(
    [
        "self", "hidden_states", "hidden_state", "x", "attention_mask", "causal_mask", "sliding_attention_mask",
        "mamba_attention_mask", "linear_attn_mask", "encoder_hidden_states", "encoder_attention_mask",
        "encoder_attn_mask", "head_mask", "layer_head_mask", "alibi", "position_bias", "position_ids",
        "position_embeddings", "cache_position", "past_key_values", "past_key_value", "layer_past", "use_cache",
        "output_attentions", "output_router_logits", "kwargs",
        "per_layer_input", "shared_kv_states",  # see rows.RowLayout and Division.units
    ]
)  # fmt: skip
_building = threading.Lock()


class _DefaultDtype(TorchFunctionMode):
    """Makes floats in `dtype`, on this thread only (torch's own switch would affect shards that compute meanwhile)."""

    _makers = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._makers and kwargs.get("dtype") is None:
            kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Division:
    """A whole model on the meta device, and where it can be cut. Names are those of the model's state dict.

    Layer 0 is the embedding, the last one the head, and between them each is a unit: one block, or the blocks that
    cannot be separated since the later ones use keys and values of the earlier ones.
    """

    model: Any
    dtype: torch.dtype
    blocks: tuple[nn.Module, ...]
    owner: Any  # the module that runs the blocks
    attribute: str  # the owner's attribute that holds the blocks
    prefix: str  # of the blocks' tensors, such as "model.layers."
    before: tuple[str, ...]  # modules that run before the first block, in order
    after: tuple[str, ...]  # modules that run after the last block, in order
    sizes: dict[str, torch.Tensor] = field(repr=False)  # every tensor a checkpoint must hold, on the meta device
    tied: dict[str, str] = field(repr=False)  # a tensor: the tensor that it shares memory with
    units: tuple[range, ...]  # the numbers of the blocks of each layer between embedding and head

    @property
    def head(self) -> int:
        """The number of the last layer; the embedding is 0."""
        return len(self.units) + 1

    def numbers(self, first: int, last: int) -> range:
        """The blocks among layers first..last, numbered from 0."""
        units = self.units[max(first, 1) - 1 : last]
        start = units[0].start if units else (len(self.blocks) if first else 0)
        return range(start, units[-1].stop if units else start)

    @property
    def layout(self) -> RowLayout:
        return row_layout(self.model.config)

    def unit_of(self, block: int) -> int:
        """The index of the unit that a block belongs to."""
        if len(self.units) == len(self.blocks):
            return block
        return next(index for index, unit in enumerate(self.units) if block in unit)

    def layer_of(self, name: str) -> int:
        """Which layer owns the tensor called `name` in the state dict."""
        if name.startswith(self.prefix):
            number = name[len(self.prefix) :].split(".", 1)[0]
            return self.unit_of(int(number)) + 1
        module = name.rpartition(".")[0]
        return self.head if module in self.after and module not in self.before else 0

    def names_of(self, name: str) -> set[str]:
        """All names of the tensor called `name`, those tied to it included."""
        root = self.tied.get(name, name)
        return {root, *(alias for alias, other in self.tied.items() if other == root)}

    def filled_by(self, name: str, made: set[str]) -> set[str]:
        """The names that a tensor for `name` fills: that name, and names tied to it that no file has `made`."""
        return {name, *(self.names_of(name) - made)}


def build(config: Any, dtype: torch.dtype) -> Any:
    """Build the whole causal language model of `config` on the meta device, with floats of `dtype`."""
    from transformers import AutoModelForCausalLM

    try:
        with _building, torch.device("meta"), _DefaultDtype(dtype):
            make: Any = AutoModelForCausalLM.from_config
            model = make(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a model's constructor may raise anything on numbers that do not fit together
        what = f"a model of type {config.model_type!r} cannot be built from config.json"
        raise ModelError(f"{what}: {one_line(error)}") from error
    model.config.dtype = dtype
    plan = model._get_dtype_plan(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(pattern in name.split(".") for pattern in plan) and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32)
    return model.eval().requires_grad_(False)


def divide(config: Any, dtype: torch.dtype) -> Division:
    """Build the model and find where it can be cut; ModelError says why it cannot be divided."""
    model = build(config, dtype)
    kind = config.model_type
    owner, attribute, prefix = _find_blocks(model, text_config(model.config).num_hidden_layers)
    blocks = tuple(getattr(owner, attribute))
    for block in {type(block): block for block in blocks}.values():
        names = inspect.signature(type(block).forward).parameters
        if extra := sorted(set(names) - BLOCK_ARGUMENTS):
            raise ModelError(f"architecture {kind!r} passes more than hidden states between its layers ({extra[0]})")
    before, after = _sides(model, owner, attribute, prefix)
    aliases = {id(tensor): name for name, tensor in reversed(list(model.named_parameters(remove_duplicate=False)))}
    tied = {
        name: aliases[id(tensor)]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if aliases[id(tensor)] != name
    }
    tied.update(getattr(model, "all_tied_weights_keys", {}))
    sizes = dict(model.state_dict(keep_vars=True))
    units = inseparable(makers(text_config(model.config), len(blocks)))
    return Division(model, dtype, blocks, owner, attribute, prefix, before, after, sizes, tied, units)


def makers(text: Any, count: int) -> list[int | None]:
    """For each block the one whose keys and values it uses instead of its own, if any."""
    modes = getattr(text, "kv_sharing_modes", None) or [None] * count
    kept = {text.layer_types[number]: number for number, mode in enumerate(modes) if mode == "store"}
    return [kept[text.layer_types[number]] if mode == "reuse" else None for number, mode in enumerate(modes)]


def _find_blocks(model: Any, count: int) -> tuple[Any, str, str]:
    best: tuple[int, Any, str, str] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            parent, _, attribute = name.rpartition(".")
            weight = sum(tensor.numel() for tensor in module.parameters())
            if best is None or weight > best[0]:
                best = weight, model.get_submodule(parent), attribute, name + "."
    if best is None:
        raise ModelError(f"architecture {model.config.model_type!r} has no list of {count} layers to cut")
    return best[1:]


def _sides(model: Any, owner: Any, attribute: str, prefix: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the modules (with own tensors, or without children) that run before the blocks, and after them."""
    seen: tuple[dict[str, None], dict[str, None]] = ({}, {})
    empty = ShardBlocks()
    outside = [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(prefix) and ([*module.parameters(recurse=False)] or not [*module.children()])
    ]

    def watch(name: str) -> Any:
        return lambda module, args: seen[empty.begun].setdefault(name)

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in outside]
    try:
        with stand_in(owner, attribute, empty):
            run_without_data(model, ProbeCache(len(getattr(owner, attribute))))
    except Exception as error:  # any exception of a foreign forward means the same
        raise ModelError(f"architecture {model.config.model_type!r} cannot be divided: {one_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not empty.begun or not seen[1]:
        raise ModelError(f"architecture {model.config.model_type!r} cannot be divided: its layers were not found")
    return tuple(seen[0]), tuple(seen[1])
