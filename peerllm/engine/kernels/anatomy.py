"""What a block is made of, as far as it is one that onnxruntime can compute around its attention.

Known are blocks of RMS norms, rotated queries and keys, and a gated MLP, in the orders of `LAYOUTS`: Llama, and most
that came after. Names alone prove nothing; `trial` shows that a block computes what its parts suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # as everyone calls it

# Matrices by role, before attention and after it; where several ways are known, those that a block has.
BEFORE = (
    {"queries": "self_attn.q_proj", "keys": "self_attn.k_proj", "values": "self_attn.v_proj"},
    {"heads": "self_attn.qkv_proj"},  # Phi-3: all three in one
)
AFTER = (
    {"out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    {"out": "self_attn.o_proj", "gate and up": "mlp.gate_up_proj", "down": "mlp.down_proj"},  # Phi-3, GLM
)
HEAD_NORMS = {"queries": "self_attn.q_norm", "keys": "self_attn.k_norm"}
LAYOUTS: tuple[Mapping[str, str], ...] = (
    {"before attention": "input_layernorm", "before mlp": "post_attention_layernorm"},  # Llama
    {  # Gemma 2
        "before attention": "input_layernorm",
        "after attention": "post_attention_layernorm",
        "before mlp": "pre_feedforward_layernorm",
        "after mlp": "post_feedforward_layernorm",
    },
    {"after attention": "post_attention_layernorm", "after mlp": "post_feedforward_layernorm"},  # OLMo 2
    {  # GLM-4
        "before attention": "input_layernorm",
        "after attention": "post_self_attn_layernorm",
        "before mlp": "post_attention_layernorm",
        "after mlp": "post_mlp_layernorm",
    },
)
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SAMPLE, NEAR = 257, 1e-5


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square; `offset` is added to the weight."""

    path: str  # in the block
    width: int
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class Anatomy:
    """`norms` by place in the block, of single heads or all by "queries" and "keys"."""

    before: Mapping[str, str]  # matrices, by role: where in the block
    after: Mapping[str, str]
    hidden: int
    wide: int  # of the feed-forward
    heads: int
    groups: int
    width: int
    value_width: int
    norms: Mapping[str, Norm]
    biases: frozenset[str]  # of which matrices
    activation: str
    residual: float = 1.0  # what is added to the hidden states is multiplied by
    rotary: int = 0  # numbers of a head that are turned by the token's position
    paired: bool = False  # turned are neighbours, not the halves of a head
    attention: Mapping[str, Any] = field(default_factory=dict)  # what the block hands to attention


def parts(block: Any) -> Anatomy | None:
    """What the names in a block (on the meta device) suggest; None: it has others."""
    modules = dict(block.named_modules())
    before, after = (
        next((way for way in ways if all(type(modules.get(path)) is nn.Linear for path in way.values())), None)
        for ways in (BEFORE, AFTER)
    )
    if before is None or after is None:
        return None
    linear = {role: modules[path] for role, path in {**before, **after}.items()}
    attention, width = block.self_attn, block.self_attn.head_dim
    children = {name for name, child in block.named_children() if not isinstance(child, nn.Dropout)}
    layout = next((layout for layout in LAYOUTS if set(layout.values()) == children - {"self_attn", "mlp"}), None)
    activation = _activation(getattr(block.mlp, "act_fn", getattr(block.mlp, "activation_fn", None)))
    if layout is None or activation is None:
        return None
    inner = {role: path for role, path in HEAD_NORMS.items() if hasattr(attention, path.rpartition(".")[2])}
    norms = {place: norm for place, path in {**layout, **inner}.items() if (norm := _norm(block, path)) is not None}
    if len(norms) < len(layout) + len(inner):
        return None
    if "heads" in linear:
        groups, value_width = _groups(attention, linear["heads"].out_features // width), width
        heads = linear["heads"].out_features // width - 2 * groups
    else:
        heads, groups = (linear[role].out_features // width for role in ("queries", "keys"))
        value_width = linear["values"].out_features // groups
    return Anatomy(
        before=before,
        after=after,
        hidden=linear["down"].out_features,
        wide=linear["down"].in_features,
        heads=heads,
        groups=groups,
        width=width,
        value_width=value_width,
        norms=norms,
        biases=frozenset(role for role, module in linear.items() if module.bias is not None),
        activation=activation,
        residual=getattr(block, "residual_multiplier", 1.0),
    )


def _groups(attention: Any, all_heads: int) -> int:
    """Heads of keys where one matrix makes queries, keys and values."""
    per_group: int = attention.num_key_value_groups  # heads of queries that share one
    return all_heads // (per_group + 2)


def _activation(module: Any) -> str | None:
    """The activation that gives the same numbers."""
    if not callable(module):
        return None
    numbers = torch.linspace(-9, 9, SAMPLE)
    return next((name for name, known in ACTIVATIONS.items() if _same(module(numbers), known(numbers))), None)


def _norm(block: Any, path: str) -> Norm | None:
    module = block.get_submodule(path)
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [*dict(module.named_parameters())] != ["weight"] or weight.dim() != 1 or not isinstance(eps, float):
        return None
    (width,) = weight.shape
    generator = torch.Generator().manual_seed(0)
    numbers, drawn = torch.randn(2, width, generator=generator) * 0.01, torch.rand(width, generator=generator)
    with torch.inference_mode():
        got = torch.func.functional_call(module, {"weight": drawn}, (numbers,))
        root = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps)
        offset = next((offset for offset in (0.0, 1.0) if _same(got, root * (drawn + offset))), None)
    return None if offset is None else Norm(path, width, eps, offset)


def _same(got: Any, want: torch.Tensor) -> bool:
    return isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, NEAR, NEAR)
