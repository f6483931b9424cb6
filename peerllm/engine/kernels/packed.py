"""Modules that stand in a model where its matrices were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peerllm.engine.kernels.dry import dry
from peerllm.engine.kernels.forms import Part


class _InPlace(nn.Module):
    """A model's initialisation may reach for weights; marked as it marks what is loaded, they are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(weight=torch.empty(0), bias=None)
        self.__dict__["weight"].__dict__["_is_hf_initialized"] = True


class Gone(_InPlace):
    """Where a fused block had a matrix: nothing calls it any more."""


class Packed(_InPlace):
    """A matrix in parts, each with some of its rows; with its bias, if it has one."""

    def __init__(self, parts: Sequence[Part], bias: torch.Tensor | None) -> None:
        super().__init__()
        self._parts, self._bias = tuple(parts), bias
        self.nbytes = sum(part.nbytes for part in parts) + (bias.nbytes if bias is not None else 0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] to [..., rows]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        rows = sum(part.rows for part in self._parts)
        if dry(numbers=len(flat) * rows):
            out = inputs.new_zeros(len(flat), rows)
        else:
            outs = [part(flat) for part in self._parts]
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        if self._bias is not None:
            out += self._bias
        return out.view(*inputs.shape[:-1], out.shape[-1])


class Siblings:
    """Several matrices of one input, packed as one: the first that is asked computes for all."""

    def __init__(self, whole: Packed, count: int) -> None:
        self._whole, self._count = whole, count
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._left = 0

    def of(self, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of all, side by side."""
        if self._output is None or self._input is not inputs:
            self._input, self._output, self._left = inputs, self._whole(inputs), self._count
        out, self._left = self._output, self._left - 1
        if not self._left:
            self._input = self._output = None  # nothing is kept alive for longer than it is needed
        return out


class Share(_InPlace):
    """One matrix of several."""

    def __init__(self, siblings: Siblings, start: int, rows: int) -> None:
        super().__init__()
        self._siblings, self._start, self._rows = siblings, start, rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] to [..., rows]."""
        return self._siblings.of(inputs).narrow(-1, self._start, self._rows)
