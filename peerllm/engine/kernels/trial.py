"""Which blocks of a model may be fused: each kind is tried in float32, with thin matrices in the places of its own.

The block itself and its graphs compute the same random numbers, once small and once large (some models clip large
ones). Only a block whose graphs give what it gives is fused; whatever goes wrong keeps a block as it is.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from peerllm.engine.attention import IGNORED, PACKED, adopt, attend, computing, register, restore
from peerllm.engine.blocks import Blocks, stand_in
from peerllm.engine.config import text_config
from peerllm.engine.division import Division
from peerllm.engine.dryrun import run_without_data
from peerllm.engine.kernels.anatomy import MATRICES, Anatomy, parts
from peerllm.engine.kernels.fused import FusedBlock, Rooms
from peerllm.engine.kernels.graphs import Graph, make_pool
from peerllm.engine.kernels.halves import first, second
from peerllm.engine.kernels.matrices import Matrix
from peerllm.engine.probing import shape_key
from peerllm.engine.states import ProbeCache
from peerllm.engine.wiring import settings

log = logging.getLogger(__name__)
TRIED = "peerllm-tried"  # the attention function that notes what it is handed
TOKENS, THIN = 5, 16
SIZES, NEAR = (0.5, 12.0), 1e-3  # of the matrices' numbers; of the outputs' length
HANDED = frozenset(["scaling", "softcap"])
_thread = threading.local()


def fusible(division: Division, numbers: Iterable[int], packed: Mapping[str, Matrix]) -> dict[int, Anatomy]:
    """By number (from 0), those of an unstripped model's blocks that may be fused; `packed`: its packed matrices."""
    make_pool(torch.get_num_threads())
    known: dict[object, Anatomy | None] = {}
    found: dict[int, Anatomy] = {}
    for number in numbers:
        block = division.blocks[number]
        names = [f"{division.prefix}{number}.{path}.weight" for path in MATRICES.values()]
        if not all(name in packed and not packed[name].turned for name in names):
            continue
        key = shape_key(block), settings(block)
        if key not in known:
            known[key] = _tried(division, number)
        if (anatomy := known[key]) is not None:
            found[number] = anatomy
    return found


def _tried(division: Division, number: int) -> Anatomy | None:
    try:
        anatomy = parts(division.blocks[number])
        if anatomy is None:
            return None
        told = _told(division, number)
        small, large = (_trial(division.blocks[number], anatomy, told, size) for size in SIZES)
    except Exception as error:  # a foreign forward may raise anything
        log.debug("block %d is not fused: %s", number, error)
        return None
    return next((way for way in small if way in large), None)


def _told(division: Division, number: int) -> dict[str, Any]:
    """What the model hands the block beside the hidden states."""
    block = division.blocks[number]
    given: list[Any] = []
    hook = block.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
    kinds, arguments = get_layer_types_and_kwargs(text_config(division.model.config))
    register()
    before = adopt(division.model, PACKED)
    try:
        with stand_in(division.owner, division.attribute, Blocks([block]), number):
            run_without_data(division.model, ProbeCache(len(division.blocks), kinds, arguments))
    except Exception:
        if not given:
            raise
    finally:
        restore(before)
        hook.remove()
    args, kwargs = given[0]
    if len(args) != 1:
        raise ValueError("hidden states are not all that comes by position")
    return dict(kwargs)


class _Thin(nn.Module):
    """A matrix of few numbers: any that is the same on both sides will do."""

    def __init__(self, rows: int, columns: int, bias: bool, size: float, generator: torch.Generator) -> None:
        super().__init__()
        self.narrow = torch.randn(columns, THIN, generator=generator) / columns**0.5
        self.widen = torch.randn(THIN, rows, generator=generator) * size / THIN**0.5
        self.extra = torch.randn(rows, generator=generator) * size if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = inputs @ self.narrow @ self.widen
        return out if self.extra is None else out + self.extra


@dataclass(slots=True)
class _View:
    """All of one sequence."""

    start: int = 0
    length: int = TOKENS
    mask: torch.Tensor | None = None
    causal: bool = True


class _Row:
    """One sequence from its start, whose cache keeps nothing."""

    def update(self, keys: Any, values: Any, number: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return keys, values

    def views(self, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[_View, torch.Tensor, torch.Tensor]]:
        return [(_View(), keys, values)]


def _note(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    _thread.handed = {name: held for name, held in kwargs.items() if held is not None and name not in IGNORED}
    return attend(module, query, key, value, attention_mask, **kwargs)


@torch.inference_mode()
def _trial(original: nn.Module, anatomy: Anatomy, told: Mapping[str, Any], size: float) -> list[Anatomy]:
    """The anatomy with what only a run shows, in the ways whose graphs say what the block says."""
    from transformers.modeling_utils import AttentionInterface

    generator = torch.Generator().manual_seed(int(size * 10))
    block: Any = _with_data(original, size, generator)
    AttentionInterface.register(TRIED, _note)
    adopt(block, TRIED)
    hidden = torch.randn(1, TOKENS, anatomy.hidden, generator=generator) * size
    angles = _angles(told.get("position_embeddings"), generator)
    given = {name: _real(name, value) for name, value in told.items() if name != "position_embeddings"}
    given |= {"past_key_values": _Row(), "position_embeddings": angles}
    with computing(given["past_key_values"]):
        want = block(hidden.clone(), **given)
        handed = _thread.handed
        if not handed.keys() <= HANDED or not isinstance(want, torch.Tensor):
            return []
        ways = [replace(anatomy, attention=handed)]
        if angles is not None:
            turned = replace(ways[0], rotary=angles[0].shape[-1])
            ways = [turned, replace(turned, paired=True), *ways]
        computed = ((way, _fused(way, block)(hidden, **given)) for way in ways)
        return [way for way, got in computed if _near(got, want, hidden)]


def _near(got: torch.Tensor, want: torch.Tensor, hidden: torch.Tensor) -> bool:
    return bool(got.shape == want.shape and (got - want).norm() <= NEAR * (want - hidden).norm())


def _fused(anatomy: Anatomy, block: Any) -> FusedBlock:
    """With the thin matrices of `block`."""
    thin: dict[str, Any] = {role: block.get_submodule(path) for role, path in MATRICES.items()}

    def product(graph: Graph, x: str, role: str) -> str:
        for part in ("narrow", "widen"):
            held = graph.held(f"{role} {part}", getattr(thin[role], part).numpy())
            x = graph.add("MatMul", [x, held], f"{role} {part}ed")
        return x

    biases = {role: thin[role].extra for role in anatomy.biases}
    sessions = [graph.session() for graph in (first(anatomy, product), second(anatomy, product))]
    return FusedBlock(anatomy, block, sessions, biases, Rooms(torch.float32))


def _with_data(original: nn.Module, size: float, generator: torch.Generator) -> nn.Module:
    """A copy in float32 whose matrices are thin and whose other numbers are random."""
    block = copy.deepcopy(original)
    for path in MATRICES.values():
        parent, _, last = path.rpartition(".")
        linear: Any = block.get_submodule(path)
        thin = _Thin(linear.out_features, linear.in_features, linear.bias is not None, size, generator)
        setattr(block.get_submodule(parent), last, thin)
    block = block.to_empty(device="cpu").float()
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return block


def _angles(shapes: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Random cosines and sines for what the model hands over without data."""
    if shapes is None:
        return None
    cos, sin = shapes
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] != 1 or cos.shape[-1] % 2:
        raise ValueError("its rotary embedding is of another form")
    half = torch.rand(1, TOKENS, cos.shape[-1] // 2, generator=generator) * 6
    angle = torch.cat([half, half], dim=-1)
    return angle.cos(), angle.sin()


def _real(name: str, value: Any) -> Any:
    if name == "position_ids":
        return torch.arange(TOKENS).unsqueeze(0)
    if isinstance(value, torch.Tensor):
        raise ValueError(f"it is handed {name}")
    return None if isinstance(value, Cache) else value
