"""Fused blocks while a shard is loaded: a matrix is rounded when it comes, half a block becomes one session.

So of a block no more than its rounded numbers is there twice, and that only until its half is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from peerllm.engine.kernels.anatomy import Anatomy
from peerllm.engine.kernels.forms import block_of, packed_bytes
from peerllm.engine.kernels.fused import FusedBlock, Rooms
from peerllm.engine.kernels.graphs import Graph
from peerllm.engine.kernels.halves import Product, first, second
from peerllm.engine.kernels.matrices import Matrix
from peerllm.engine.kernels.packed import Gone
from peerllm.engine.kernels.rounding import rounded
from peerllm.engine.memory import trim


class Fusion:
    """One block's matrices, by role, until `finish` puts the fused forward in the place of the block's own."""

    def __init__(
        self, anatomy: Anatomy, block: Any, matrices: Mapping[str, Matrix], bits: int, dtype: torch.dtype
    ) -> None:
        self._anatomy, self._block, self._matrices, self._bits = anatomy, block, matrices, bits
        self._halves: tuple[tuple[Mapping[str, str], Callable[[Anatomy, Product], Graph]], ...]
        self._halves = ((anatomy.before, first), (anatomy.after, partial(second, dtype=dtype)))
        self._rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # codes and scales
        self._biases: dict[str, torch.Tensor] = {}
        self._sessions: dict[int, Any] = {}
        self.nbytes = 0

    def matrix(self, role: str, weight: torch.Tensor) -> None:
        """[rows, columns], maybe a view of a file."""
        columns = weight.shape[1]
        block = block_of(columns)
        assert block is not None
        self._rounded[role] = rounded([weight], self._bits, block)
        trim()  # what rounding left free would lie in holes between the tensors that stay
        self.nbytes += packed_bytes(len(weight), columns, self._bits)
        matrix = self._matrices[role]
        setattr(matrix.parent, matrix.name.rpartition(".")[2], Gone())
        for number, (roles, graph_of) in enumerate(self._halves):
            if role in roles and all(one in self._rounded for one in roles):
                self._sessions[number] = graph_of(self._anatomy, self._product).session()
                for one in roles:
                    del self._rounded[one]
                trim()

    def bias(self, role: str, bias: torch.Tensor) -> None:
        self._biases[role] = bias.clone()  # what was given may be a view of a file

    @property
    def missing(self) -> list[str]:
        """Weights and biases that never came."""
        roles = [role for number, (some, _) in enumerate(self._halves) if number not in self._sessions for role in some]
        weights = [self._matrices[role].weight for role in roles if role not in self._rounded]
        return [*weights, *(f"{self._matrices[role].bias}" for role in self._anatomy.biases - self._biases.keys())]

    def finish(self, rooms: Rooms, stays: bool) -> None:
        """Once the block's norms are there too; `stays`: see FusedBlock."""
        sessions = [self._sessions[number] for number in range(len(self._halves))]
        self._block.forward = FusedBlock(self._anatomy, self._block, sessions, self._biases, rooms, stays)

    def _product(self, graph: Graph, x: str, role: str) -> str:
        return graph.rounded_product(x, f"{role} product", *self._rounded[role], self._bits)


class Fusions:
    """All fused blocks of a shard. `blocks`: by number, those that are loaded; `wanted`: packed matrices by weight."""

    def __init__(
        self,
        anatomies: Mapping[int, Anatomy],
        blocks: Mapping[int, Any],
        wanted: Mapping[str, Matrix],
        bits: int,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is the model's."""
        self._order, self._dtype = list(blocks), dtype
        self._by_number: dict[int, Fusion] = {}
        self._takers: dict[str, Callable[[torch.Tensor], None]] = {}  # by a tensor's name
        by_module = {id(matrix.module): matrix for matrix in wanted.values()}
        for number in anatomies.keys() & blocks.keys():
            anatomy, block = anatomies[number], blocks[number]
            paths = {**anatomy.before, **anatomy.after}
            matrices = {role: by_module[id(block.get_submodule(path))] for role, path in paths.items()}
            self._by_number[number] = fusion = Fusion(anatomy, block, matrices, bits, dtype)
            for role, matrix in matrices.items():
                self._takers[matrix.weight] = partial(fusion.matrix, role)
                if matrix.bias is not None:
                    self._takers[matrix.bias] = partial(fusion.bias, role)

    @property
    def nbytes(self) -> int:
        return sum(fusion.nbytes for fusion in self._by_number.values())

    def takes(self, name: str) -> bool:
        return name in self._takers

    def give(self, name: str, tensor: torch.Tensor) -> None:
        self._takers[name](tensor)

    @property
    def missing(self) -> Sequence[str]:
        return [name for fusion in self._by_number.values() for name in fusion.missing]

    def finish(self) -> None:
        """When all tensors are in the model."""
        rooms = Rooms(self._dtype)
        for number, after in zip(self._order, [*self._order[1:], None], strict=True):
            if number in self._by_number:
                self._by_number[number].finish(rooms, stays=after in self._by_number)
