"""A block in two calls of onnxruntime, with the cache and attention between: nothing of it runs in Python else.

Within the two numbers are float32; keys and values are kept in the model's dtype, attention computes in it, and what a
block gives is rounded to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peerllm.engine.attention import attend
from peerllm.engine.kernels.anatomy import Anatomy
from peerllm.engine.kernels.dry import PRODUCTS, dry
from peerllm.engine.kernels.graphs import Bound
from peerllm.engine.kernels.halves import HEADS, bias_name, norm_name, widths
from peerllm.errors import EngineError

KEPT_ANGLES = 2  # kinds of rotary embeddings of one model: of windows and of the rest
KEPT_TOKENS = 16  # rows of as many have rooms that stay: batches of steps


class Room:
    """What a block reads and writes for a row of `count` tokens beside weights and cache, and views of it."""

    def __init__(self, anatomy: Anatomy, count: int, dtype: torch.dtype) -> None:
        self.hidden = (torch.empty(1, count, anatomy.hidden), torch.empty(1, count, anatomy.hidden))
        heads = anatomy.heads, anatomy.groups, anatomy.groups
        sizes = [count * width for width in widths(anatomy)]
        self._made = torch.empty(sum(sizes))
        self._kept = self._made if dtype is torch.float32 else torch.empty(sum(sizes), dtype=dtype)
        self.made = [part.view(1, count, -1) for part in torch.split(self._made, sizes)]
        self.queries, self.keys, self.values = (
            part.view(1, count, some, -1).transpose(1, 2)
            for part, some in zip(torch.split(self._kept, sizes), heads, strict=True)
        )
        self.attended = torch.empty(1, count, anatomy.heads * anatomy.value_width)
        self.taken = self.attended.view(1, count, anatomy.heads, -1)
        self.places = torch.arange(count).unsqueeze(0)

    def settle(self) -> None:
        """Queries, keys and values were made; have them in the model's dtype."""
        if self._kept is not self._made:
            self._kept.copy_(self._made)


class Rooms:
    """A shard's. Its blocks compute one after the other, so those of one shape share them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[object, Room] = {}
        self._alike = False  # the halves of the angles; one look is enough
        self._angles: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def of(self, anatomy: Anatomy, count: int) -> Room:
        if count > KEPT_TOKENS:
            return Room(anatomy, count, self.dtype)
        key = count, anatomy.hidden, anatomy.heads, anatomy.groups, anatomy.width, anatomy.value_width
        if key not in self._kept:
            self._kept[key] = Room(anatomy, count, self.dtype)
        return self._kept[key]

    def angles(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, rotary / 2]. `cos` and `sin` are [1, n, rotary]; their second halves are as their first."""
        for known, *given in self._angles:
            if known is cos:
                return given[0], given[1]
        half = cos.shape[-1] // 2
        if not self._alike:
            self._alike = all(torch.equal(one[..., :half], one[..., half:]) for one in (cos, sin))
            if not self._alike:
                raise EngineError("its rotary embedding is not what its blocks were tried with")
        found = cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
        self._angles = [(cos, *found), *self._angles[: KEPT_ANGLES - 1]]
        return found


class FusedBlock:
    """Stands in the place of a block's own `forward`."""

    def __init__(
        self,
        anatomy: Anatomy,
        block: Any,
        sessions: Sequence[Any],
        biases: Mapping[str, torch.Tensor],
        rooms: Rooms,
        stays: bool = False,
    ) -> None:
        """Of `block` the norms' weights and the attention's number are taken; `biases` by the matrix's role.

        `stays`: the next block takes what lies in the room.
        """
        self._anatomy, self._sessions, self._rooms, self._stays = anatomy, sessions, rooms, stays
        self._number: int = block.self_attn.layer_idx
        self._fixed: tuple[dict[str, torch.Tensor], ...] = {}, {}
        for place, norm in anatomy.norms.items():
            weight = block.get_submodule(norm.path).weight.detach().float() + norm.offset
            self._fixed[place not in ("before attention", *HEADS)][norm_name(place)] = weight.contiguous()
        for role, bias in biases.items():
            self._fixed[role in anatomy.after][bias_name(role)] = bias.detach().float().contiguous()
        self._kept: dict[tuple[int, int], tuple[Bound, Bound]] = {}

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, past_key_values: Any = None, **_: Any
    ) -> torch.Tensor:
        """[1, n, hidden] to the same; what stays in a room is overwritten by the next block but one."""
        anatomy, rooms, wet = self._anatomy, self._rooms, not dry(PRODUCTS)
        room = rooms.of(anatomy, hidden_states.shape[1])
        at = 1 if hidden_states is room.hidden[1] else 0
        if hidden_states is not room.hidden[at]:
            room.hidden[at].copy_(hidden_states)
        before, after = self._bound(room, at)
        if anatomy.rotary:
            cos, sin = rooms.angles(*position_embeddings)
            before.give("cos", cos)
            before.give("sin", sin)
        if wet:
            before.run()
        room.settle()
        keys, values = past_key_values.update(room.keys, room.values, self._number)
        room.taken.copy_(attend(self, room.queries, keys, values, None, **anatomy.attention)[0])
        if wet:
            after.run()
        out = room.hidden[1 - at]
        return out if self._stays else out.to(rooms.dtype, copy=True)

    def _bound(self, room: Room, at: int) -> tuple[Bound, Bound]:
        count = room.places.shape[1]
        if (count, at) in self._kept:
            return self._kept[count, at]
        before, after = both = Bound(self._sessions[0]), Bound(self._sessions[1])
        for bound, fixed in zip(both, self._fixed, strict=True):
            bound.give("x", room.hidden[at])
            for name, tensor in fixed.items():
                bound.give(name, tensor)
        if self._anatomy.rotary:
            before.give("places", room.places)
        for role, made in zip(HEADS, room.made, strict=True):
            before.want(role, made)
        after.give("attended", room.attended)
        after.want("y", room.hidden[1 - at])
        if count <= KEPT_TOKENS:
            self._kept[count, at] = both
        return both
