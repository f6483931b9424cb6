"""What travels from shard to shard for each token of Gemma 3n and Gemma 4: more than one hidden state.

Gemma 3n has several hidden states a token (streams). In both, each block also needs a vector of its own, made of the
token's id and of its embedding (per-layer inputs). Only the shard with the embedding can make those, so that token ids
and tables stay there; rows carry them for the blocks still to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerllm.engine.graph.describe import MAX_ROW
from peerllm.engine.model.blocks import ShardBlocks
from peerllm.engine.model.config import text_config
from peerllm.errors import ModelError


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A row before block `n`: `streams` hidden states, then a vector of `each` numbers for every block from `n` on."""

    hidden: int
    streams: int
    each: int
    blocks: int

    @property
    def plain(self) -> bool:
        """Whether a row is one hidden state."""
        return self.streams == 1 and not self.each

    def width(self, block: int) -> int:
        """Numbers in a row before block `block`."""
        return self.streams * self.hidden + self.each * (self.blocks - block)


def row_layout(config: Any) -> RowLayout:
    """How the model of a configuration lays out its rows."""
    text = text_config(config)
    each, streams = (getattr(text, name, 0) for name in ("hidden_size_per_layer_input", "altup_num_inputs"))
    layout = RowLayout(text.hidden_size, streams or 1, each or 0, text.num_hidden_layers)
    if layout.width(0) > MAX_ROW:
        raise ModelError(f"config.json is not usable: rows of {layout.width(0)} numbers")
    return layout


class Passing(nn.Module):
    """Stands for the blocks of a shard that has none: what came in goes out."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Rows:
    """Takes rows apart for a stripped model, and makes those that it hands on."""

    def __init__(self, layout: RowLayout, owner: Any, blocks: ShardBlocks, numbers: range, embeds: bool) -> None:
        """`numbers`: the shard's blocks; `embeds`: its rows are made here, of token ids."""
        self._layout, self._numbers = layout, numbers
        self._inputs: torch.Tensor | None = None  # per-layer inputs [1, n, blocks, each], from the first that is here
        self._leaving: torch.Tensor | None = None
        blocks[-1].register_forward_hook(self._left)
        if layout.each and embeds:
            project = owner.project_per_layer_inputs
            owner.project_per_layer_inputs = lambda *given: self._kept(project(*given))
        elif layout.each:
            owner.project_per_layer_inputs = lambda embedded, given: given

    def _left(self, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._leaving = output

    def _kept(self, inputs: torch.Tensor) -> torch.Tensor:
        self._inputs = inputs
        return inputs

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What rows [n, width] give the first block ([1, n, hidden], or of all streams) and the model as arguments."""
        about = self._layout
        streams = rows[:, : about.streams * about.hidden].reshape(len(rows), about.streams, about.hidden)
        entering = streams.transpose(0, 1).unsqueeze(1)  # [streams, 1, n, hidden]
        given = {"inputs_embeds": entering[0]}
        if about.each:
            rest = rows[:, about.streams * about.hidden :]
            count = len(rows)
            self._inputs = rest.reshape(1, count, rest.shape[1] // about.each, about.each)
            own = self._inputs[:, :, : len(self._numbers)]
            given["per_layer_inputs"] = own if own.shape[2] else rest.new_zeros(1, count, 1, about.each)
        return (entering if about.streams > 1 else entering[0]), given

    def made(self) -> torch.Tensor:
        """The rows [n, width] that go to the next shard after a pass."""
        leaving, self._leaving = self._leaving, None
        inputs, self._inputs = self._inputs, None
        assert leaving is not None
        hidden = leaving if self._layout.streams > 1 else leaving.unsqueeze(0)
        parts = [hidden[:, 0].transpose(0, 1).flatten(1)]
        if inputs is not None:
            parts.append(inputs[0, :, len(self._numbers) :].flatten(1))
        return torch.cat(parts, dim=1)
