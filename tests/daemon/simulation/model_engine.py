"""A model of an engine: what it has loaded, what its slots keep, and what it does with the frames of its epochs.

A token is a function of all tokens before it computed by all layers in their order, so whatever is computed in a wrong
place, from a wrong state or twice, gives a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

Ring = tuple[tuple[str, int, int], ...]  # device, first and last layer of each stage


def layer(number: int, kept: int, x: int) -> tuple[int, int]:
    """What the layer keeps after a token, and what it gives to the next layer."""
    kept = hash((number, kept, x))
    return kept, hash((kept, number))


def token_of(x: int, seed: int, position: int) -> int:
    return hash((x, seed, position)) % 50_000


def reference(layers: int, prompt: tuple[int, ...], seed: int, tokens: int) -> list[int]:
    """The answer of one device that nothing happens to."""
    kept, ids = [0] * layers, list(prompt)
    for position in range(len(prompt) + tokens - 1):
        x = ids[position]
        for number in range(layers):
            kept[number], x = layer(number, kept[number], x)
        if position >= len(prompt) - 1:
            ids.append(token_of(x, seed, position))
    return ids[len(prompt) :]


@dataclass(frozen=True, slots=True)
class ModelFrame:
    """On its way round the ring of its epoch, with tokens start, start + 1, ... of a sequence.

    kind "open": it finds out which layers lack tokens up to `start`: the `last` of them, and the fewest that one `has`.
    "replay": tokens that are computed through layer `last`, whose stage tells the source.
    "step": the token that follows is drawn.
    """

    kind: str
    epoch: int
    sequence: int
    slot: int
    start: int
    xs: tuple[int, ...] = ()
    last: int = -1
    has: int = 0


@dataclass(slots=True)
class ModelSlot:
    sequence: int = -1
    kept: list[int] = field(default_factory=list)  # after each token


@dataclass(slots=True)
class ModelEngine:
    """One life of an engine. `send` gives a frame to the stage after this one in a ring, or tells the source."""

    name: str
    recurrent: bool
    send: Callable[[Ring, int, ModelFrame], None]
    slots: dict[int, dict[int, ModelSlot]] = field(default_factory=dict)  # by loaded layer and slot
    rings: dict[int, Ring] = field(default_factory=dict)  # by epoch
    current: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot: sequence and epoch
    fed: dict[int, int] = field(default_factory=dict)  # slot: the token that follows in this epoch; -1: any may

    def load(self, epoch: int, ring: Ring) -> None:
        self.rings[epoch] = ring
        for number in self.own(ring):
            self.slots.setdefault(number, {})

    def own(self, ring: Ring) -> set[int]:
        return {number for device, first, last in ring if device == self.name for number in range(first, last + 1)}

    def unload(self, first: int, last: int) -> None:
        """Epochs first..last end; layers that no other uses are let go of."""
        self.rings = {epoch: ring for epoch, ring in self.rings.items() if not first <= epoch <= last}
        used = {number for ring in self.rings.values() for number in self.own(ring)}
        self.slots = {number: slots for number, slots in self.slots.items() if number in used}

    def hear(self, stage: int, frame: ModelFrame) -> None:
        ring = self.rings.get(frame.epoch)
        if ring is None:
            return  # an epoch that is over
        _, first, last = ring[stage]
        if frame.kind == "open":
            self._open(ring, stage, frame)
        elif self.current.get(frame.slot) == (frame.sequence, frame.epoch) and self._fits(first, last, frame):
            self._compute(ring, stage, frame)

    def _slot(self, number: int, frame: ModelFrame) -> ModelSlot:
        slot = self.slots[number].setdefault(frame.slot, ModelSlot())
        if slot.sequence != frame.sequence:
            slot.sequence, slot.kept = frame.sequence, []
        return slot

    def _open(self, ring: Ring, stage: int, frame: ModelFrame) -> None:
        before, now = self.current.get(frame.slot, (-1, -1)), (frame.sequence, frame.epoch)
        if before[1] > frame.epoch or (before[1] == frame.epoch and before[0] >= frame.sequence):
            return  # late, or doubled
        self.current[frame.slot], self.fed[frame.slot] = now, -1
        _, first, last = ring[stage]
        lacking, has = frame.last, frame.has
        for number in range(first, last + 1):
            slot = self._slot(number, frame)
            if self.recurrent and len(slot.kept) > frame.start:
                slot.kept.clear()  # it cannot go back
            del slot.kept[frame.start :]
            if len(slot.kept) < frame.start:
                lacking, has = number, min(has, 0 if self.recurrent else len(slot.kept))
        self.send(ring, stage + 1, replace(frame, last=lacking, has=has))

    def _fits(self, first: int, last: int, frame: ModelFrame) -> bool:
        """Whether the tokens follow what the layers have; frames that are doubled or late do not."""
        if frame.kind == "replay":
            return self.fed[frame.slot] in (-1, frame.start) and first <= frame.last
        return all(len(self._slot(number, frame).kept) == frame.start for number in range(first, last + 1))

    def _compute(self, ring: Ring, stage: int, frame: ModelFrame) -> None:
        _, first, last = ring[stage]
        through = last if frame.kind == "step" else min(last, frame.last)
        xs = frame.xs
        self.fed[frame.slot] = frame.start + len(xs)
        for number in range(first, through + 1):
            slot, out = self._slot(number, frame), []
            for position, x in enumerate(xs, frame.start):
                if self.recurrent and position == 0:
                    slot.kept.clear()
                upto = len(slot.kept) if self.recurrent else position  # it goes on from the state that it has
                kept, x = layer(number, slot.kept[upto - 1] if 0 < upto <= len(slot.kept) else 0, x)
                slot.kept[upto : upto + 1] = [kept]
                out.append(x)
            xs = tuple(out)
        ends = frame.kind == "replay" and first <= frame.last <= last
        self.send(ring, len(ring) if ends else stage + 1, replace(frame, xs=() if ends else xs))

    def take(self, number: int, epoch: int, kept: dict[int, tuple[int, list[int]]]) -> None:
        """State that another device kept of a layer, for sequences that are not computed here yet."""
        for slot, (sequence, values) in kept.items():
            if number in self.slots and self.current.get(slot, (-1, -1))[1] < epoch:
                self.slots[number][slot] = ModelSlot(sequence, values)
