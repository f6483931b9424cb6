"""Fused blocks while a shard is loaded: a matrix is rounded when it comes, half a block becomes one session.

So of a block no more than its rounded numbers is there twice, and that only until its half is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peerllm.engine.kernels.anatomy import MATRICES, Anatomy
from peerllm.engine.kernels.forms import block_of, packed_bytes
from peerllm.engine.kernels.fused import FusedBlock, Rooms
from peerllm.engine.kernels.graphs import Graph
from peerllm.engine.kernels.halves import FIRST, SECOND, first, second
from peerllm.engine.kernels.matrices import Matrix
from peerllm.engine.kernels.packed import Gone
from peerllm.engine.kernels.rounding import rounded
from peerllm.engine.memory import trim

HALVES = ((FIRST, first), (SECOND, second))
Rounded = tuple[torch.Tensor, torch.Tensor]  # codes and scales


class Fusion:
    """One block's matrices, by role, until `finish` puts the fused forward in the block's own place."""

    def __init__(self, anatomy: Anatomy, block: Any, bits: int) -> None:
        self.block, self._anatomy, self._bits = block, anatomy, bits
        self._rounded: dict[str, Rounded] = {}
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
        path, _, last = MATRICES[role].rpartition(".")
        setattr(self.block.get_submodule(path), last, Gone())
        for number, (roles, graph_of) in enumerate(HALVES):
            if role in roles and all(one in self._rounded for one in roles):
                self._sessions[number] = graph_of(self._anatomy, self._product).session()
                for one in roles:
                    del self._rounded[one]
                trim()

    def bias(self, role: str, bias: torch.Tensor) -> None:
        self._biases[role] = bias.clone()  # what was given may be a view of a file

    @property
    def missing(self) -> Sequence[str]:
        """Roles of matrices that never came."""
        return [
            role
            for number, (roles, _) in enumerate(HALVES)
            if number not in self._sessions
            for role in roles
            if role not in self._rounded
        ]

    def finish(self, rooms: Rooms) -> FusedBlock:
        """Once the block's norms are there too."""
        sessions = [self._sessions[number] for number in range(len(HALVES))]
        fused = FusedBlock(self._anatomy, self.block, sessions, self._biases, rooms)
        self.block.forward = fused
        return fused

    def _product(self, graph: Graph, x: str, role: str) -> str:
        return graph.rounded_product(x, f"{role} product", *self._rounded[role], self._bits)


class Fusions:
    """All fused blocks of a shard. `blocks`: by number, those that are loaded; `wanted`: packed matrices by weight."""

    def __init__(
        self, anatomies: Mapping[int, Anatomy], blocks: Mapping[int, Any], wanted: Mapping[str, Matrix], bits: int
    ) -> None:
        self._by_number = {n: Fusion(one, blocks[n], bits) for n, one in anatomies.items() if n in blocks}
        self._order = list(blocks)
        self._roles: dict[str, tuple[Fusion, str, bool]] = {}  # by a tensor's name; True: a bias
        fusions = {
            id(one.block.get_submodule(path)): (one, role) for one in self.all for role, path in MATRICES.items()
        }
        for matrix in wanted.values():
            if id(matrix.module) in fusions:
                fusion, role = fusions[id(matrix.module)]
                self._roles[matrix.weight] = fusion, role, False
                if matrix.bias is not None:
                    self._roles[matrix.bias] = fusion, role, True

    @property
    def all(self) -> Sequence[Fusion]:
        return list(self._by_number.values())

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.all)

    def takes(self, name: str) -> bool:
        return name in self._roles

    def give(self, name: str, tensor: torch.Tensor) -> None:
        fusion, role, is_bias = self._roles[name]
        (fusion.bias if is_bias else fusion.matrix)(role, tensor)

    @property
    def missing(self) -> list[str]:
        gone = {(id(fusion), role) for fusion in self.all for role in fusion.missing}
        return [name for name, (fusion, role, bias) in self._roles.items() if not bias and (id(fusion), role) in gone]

    def finish(self, dtype: torch.dtype) -> None:
        """When all tensors are in the model; one that is followed by another hands on float32."""
        rooms = Rooms(dtype)
        for number, fusion in self._by_number.items():
            fused = fusion.finish(rooms)
            at = self._order.index(number) + 1
            fused.stays = at < len(self._order) and self._order[at] in self._by_number
