"""A shard's matrices, packed while it is loaded: tensor by tensor, so that never more than one is there in float.

Matrices of one input that stand side by side in a block (queries, keys and values; gate and up) become one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from peerllm.engine.kernels.forms import Form, Part
from peerllm.engine.kernels.fusing import Fusions
from peerllm.engine.kernels.matrices import Matrix
from peerllm.engine.kernels.packed import Packed, Share, Siblings
from peerllm.engine.memory import trim
from peerllm.engine.place import CPU, turn

# Of a matrix in 16 bits: larger ones are packed in parts, so that little is held twice; smaller shards in smaller ones.
PART_BYTES, LEAST_PART_BYTES, PART_SHARE = 64 << 20, 4 << 20, 16
TILE_ROWS = 8  # an accelerator's own products take whole numbers of so many
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


class Packing:
    """Takes the tensors of `wanted` (by the weight's name), in any order, and puts what they become in the model.

    A group is packed as soon as its last tensor is there; `fusions` take theirs, and are to be finished at the end.
    """

    def __init__(self, form: Form, wanted: Mapping[str, Matrix], fusions: Fusions | None = None) -> None:
        self.form, self._fusions = form, fusions
        self._groups: dict[str, tuple[Matrix, ...]] = {}  # by each name of a tensor that it waits for
        self._held: dict[str, torch.Tensor] = {}
        self._nbytes = 0
        whole = sum(2 * matrix.rows * matrix.columns for matrix in wanted.values())
        self._part_bytes = min(PART_BYTES, max(LEAST_PART_BYTES, whole // PART_SHARE))
        alone = [one for one in wanted.values() if fusions is None or not fusions.takes(one.weight)]
        for group in grouped(alone):
            for matrix in group:
                for name in filter(None, (matrix.weight, matrix.bias)):
                    self._groups[name] = group

    def takes(self, name: str) -> bool:
        """Whether this tensor becomes part of something packed."""
        return name in self._groups or (self._fusions is not None and self._fusions.takes(name))

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` may be a view of a file; what is packed lies in memory of its own."""
        if self._fusions is not None and self._fusions.takes(name):
            with torch.inference_mode():
                self._fusions.give(name, tensor)
            return
        self._held[name] = tensor
        group = self._groups[name]
        names = [one for matrix in group for one in (matrix.weight, matrix.bias) if one is not None]
        if all(one in self._held for one in names):
            with torch.inference_mode():
                self._pack(group)
            for one in names:
                del self._held[one]

    @property
    def missing(self) -> list[str]:
        """Tensors that never came beside others of their group."""
        fused = self._fusions.missing if self._fusions is not None else []
        left = {id(self._groups[name]): self._groups[name] for name in self._held}
        weights = (matrix.weight for group in left.values() for matrix in group)
        return [*fused, *(name for name in weights if name not in self._held)]

    @property
    def nbytes(self) -> int:
        """Of all that was packed."""
        return self._nbytes + (self._fusions.nbytes if self._fusions is not None else 0)

    def finish(self) -> None:
        """When all tensors are in the model."""
        if self._fusions is not None:
            self._fusions.finish()

    def _pack(self, group: Sequence[Matrix]) -> None:
        parts: list[Part] = []
        waiting: list[torch.Tensor] = []
        columns = group[0].columns
        most = max(1, self._part_bytes // (2 * columns))  # rows of a part
        if self.form.device != CPU:
            most = max(TILE_ROWS, most // TILE_ROWS * TILE_ROWS)
        for matrix in group:
            weight = self._held[matrix.weight]
            weight = weight.t() if matrix.turned else weight
            for start in range(0, matrix.rows, most):
                rows = weight[start : start + most]
                if sum(map(len, waiting)) + len(rows) > most:
                    parts.append(self._part(waiting))
                    waiting = []
                waiting.append(rows)
        parts.append(self._part(waiting))
        biases = [self._held[matrix.bias] for matrix in group if matrix.bias is not None]
        bias = torch.cat(biases).to(self.form.device, group[0].module.weight.dtype) if biases else None
        whole = Packed(parts, bias)
        self._nbytes += whole.nbytes
        if len(group) == 1:
            setattr(group[0].parent, _last(group[0]), whole)
            return
        siblings, start = Siblings(whole, len(group)), 0
        for matrix in group:
            setattr(matrix.parent, _last(matrix), Share(siblings, start, matrix.rows))
            start += matrix.rows

    def _part(self, rows: Sequence[torch.Tensor]) -> Part:
        with turn(self.form.device):
            part = self.form.make(rows)
        trim()  # what packing left free would lie in holes between the tensors that stay
        return part


def grouped(wanted: Iterable[Matrix]) -> list[tuple[Matrix, ...]]:
    """Siblings together: of one parent and width, all with a bias or none."""
    by_parent: dict[int, dict[str, Matrix]] = {}
    for matrix in wanted:
        by_parent.setdefault(id(matrix.parent), {})[_last(matrix)] = matrix
    groups = []
    for members in by_parent.values():
        for names in SIBLINGS:
            some = [members[name] for name in names if name in members]
            alike = {(one.columns, one.turned, one.bias is None) for one in some}
            if len(some) == len(names) and len(alike) == 1:
                groups.append(tuple(members.pop(name) for name in names))
        groups += [(matrix,) for matrix in members.values()]
    return groups


def _last(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[2]
