"""Which blocks of a model may be fused: each kind is tried in float32, with thin matrices in the places of its own.

The block itself and its graphs compute the same random numbers, small, large and huge (some models clip), at far
positions (some scale by them). Only a block whose graphs give what it gives is fused; whatever goes wrong keeps a
block as it is.
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
from peerllm.engine.kernels.anatomy import Anatomy, parts
from peerllm.engine.kernels.fused import FusedBlock, Rooms
from peerllm.engine.kernels.graphs import Graph, make_pool
from peerllm.engine.kernels.halves import first, second
from peerllm.engine.kernels.matrices import Matrix
from peerllm.engine.probing import shape_key
from peerllm.engine.states import ProbeCache
from peerllm.engine.wiring import settings

log = logging.getLogger(__name__)
TRIED = "peerllm-tried"  # the attention function that notes what it is handed
FAR = (0, 900, 20_000, 300_000, 1 << 22)  # positions
TOKENS, THIN = len(FAR), 16
MOST_NUMBERS = 1 << 24  # of a trial: a config.json may say anything
SIZES, NEAR = (0.5, 12.0, 1000.0), 1e-3  # of the matrices' numbers; of the outputs' length
HANDED = frozenset(["scaling", "softcap"])
_thread = threading.local()


def fusible(division: Division, numbers: Iterable[int], packed: Mapping[str, Matrix]) -> dict[int, Anatomy]:
    """By number (from 0), those of an unstripped model's blocks that may be fused; `packed`: its packed matrices."""
    make_pool(torch.get_num_threads())  # no more than a form of that many threads has done already
    known: dict[object, Anatomy | None] = {}
    found: dict[int, Anatomy] = {}
    for number in numbers:
        block = division.blocks[number]
        key = shape_key(block), settings(block), tuple(type(module) for module in block.modules())
        if key not in known:
            known[key] = _tried(division, number, packed)
        if (anatomy := known[key]) is not None:
            found[number] = anatomy
    return found


def _tried(division: Division, number: int, packed: Mapping[str, Matrix]) -> Anatomy | None:
    try:
        if _numbers(division.blocks[number]) > MOST_NUMBERS:
            return None
        anatomy = parts(division.blocks[number])
        if anatomy is None:
            return None
        paths = [*anatomy.before.values(), *anatomy.after.values()]
        if not all(f"{division.prefix}{number}.{path}.weight" in packed for path in paths):
            return None
        told = _told(division, number)
        ways, *others = (_trial(division.blocks[number], anatomy, told, size) for size in SIZES)
    except Exception as error:  # a foreign forward may raise anything
        log.info("blocks like number %d are not fused: %s", number, error)
        return None
    return next((way for way in ways if all(way in some for some in others)), None)


def _numbers(block: nn.Module) -> int:
    """How many a trial of the block makes up at most."""
    linears = [module for module in block.modules() if type(module) is nn.Linear]
    thin = sum(THIN * (one.in_features + one.out_features) for one in linears)
    tensors = [*block.parameters(), *block.buffers()]
    return thin + sum(t.numel() for t in tensors) - sum(one.weight.numel() for one in linears)


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
    block: Any = _with_data(original, anatomy, size, generator)
    AttentionInterface.register(TRIED, _note)
    adopt(block, TRIED)
    hidden = torch.randn(1, TOKENS, anatomy.hidden, generator=generator) * size
    angles = _angles(told.get("position_embeddings"), generator)
    given = {name: _real(name, value) for name, value in told.items() if name != "position_embeddings"}
    given |= {"past_key_values": _Row(), "position_embeddings": angles}
    _thread.handed = None
    with computing(given["past_key_values"]):
        want = block(hidden.clone(), **given)
        handed = _thread.handed
        if handed is None or not handed.keys() <= HANDED or not isinstance(want, torch.Tensor):
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
    thin: dict[str, Any] = {
        role: block.get_submodule(path) for role, path in {**anatomy.before, **anatomy.after}.items()
    }

    def product(graph: Graph, x: str, role: str) -> str:
        for part in ("narrow", "widen"):
            held = graph.held(f"{role} {part}", getattr(thin[role], part).numpy())
            x = graph.add("MatMul", [x, held], f"{role} {part}ed")
        return x

    biases = {role: thin[role].extra for role in anatomy.biases}
    graphs = first(anatomy, product), second(anatomy, product, torch.float32)
    return FusedBlock(anatomy, block, [graph.session() for graph in graphs], biases, Rooms(torch.float32))


def _with_data(original: nn.Module, anatomy: Anatomy, size: float, generator: torch.Generator) -> nn.Module:
    """A copy in float32 whose matrices are thin and whose other numbers are random."""
    block = copy.deepcopy(original)
    paths = [*anatomy.before.values(), *anatomy.after.values()]
    linears: Any = [block.get_submodule(path) for path in paths]
    for path, linear in zip(paths, linears, strict=True):
        parent, _, last = path.rpartition(".")
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
        return torch.tensor([FAR])
    if isinstance(value, torch.Tensor):
        raise ValueError(f"it is handed {name}")
    return None if isinstance(value, Cache) else value
