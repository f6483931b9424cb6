"""What the sequences of an epoch keep in some layers here, taken to another stage part by part. Compute thread only.

Decoding goes on meanwhile. What is computed while a round goes on is taken in the next one, until little is left: that
is computed again by the stage that goes on. Every token changes a recurrent state, so its snapshot is taken instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peerllm.engine.base import StateForms
from peerllm.engine.messages import CarryState
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.wire.state_frames import CarriedPart, part_tokens
from peerllm.errors import RefusedError

TURN_BYTES = 1 << 20  # copied between two passes: well below a millisecond
FEW_TOKENS = 8  # of a sequence; to compute so many again costs about as much as another round
MAX_ROUNDS = 8


class StateExport:
    """The work of one CarryState, in turns between the passes."""

    def __init__(self, message: CarryState) -> None:
        self.message = message
        self.form = ""  # of the shards; see base.Shard
        self._parts: Iterator[CarriedPart] | None = None

    def turn(self, deployment: LocalDeployment) -> list[CarriedPart]:
        """The next parts; none: all is done. RefusedError if the epoch has ended here."""
        message = self.message
        ring = deployment.rings.get(message.epoch)
        if ring is None:
            raise RefusedError(f"epoch {message.epoch} is not loaded here any more")
        if self._parts is None:
            first, last = message.first_layer, message.last_layer
            shards = [one for stage in ring.stages.values() for one in stage.chain]
            self.form = shards[0].shard.form
            self._parts = parts_of(shards, message.epoch, first, last)
        taken: list[CarriedPart] = []
        nbytes = 0
        for carried in self._parts:
            taken.append(carried)
            nbytes += sum(rows.nbytes for rows in carried.part.rows.values())
            if nbytes >= TURN_BYTES:
                break
        return taken


def parts_of(shards: Sequence[HeldShard], epoch: int, first_layer: int, last_layer: int) -> Iterator[CarriedPart]:
    """Layer by layer what the epoch's sequences keep, and in further rounds what has come to it meanwhile."""
    sent: dict[tuple[int, int], int] = {}  # tokens by sequence and block
    forms = [(one, one.shard.state_forms(first_layer, last_layer)) for one in shards]
    for _ in range(MAX_ROUNDS):
        goals = [(one, form, sequence, slot, one.shard.steady(slot))
                 for one, form in forms for sequence, slot, _, _ in one.slots.holding(epoch)]  # fmt: skip
        if all(goal - sent.get((sequence, block), 0) <= FEW_TOKENS
               for _, form, sequence, _, goal in goals for block in (*form.tokens, *form.fixed)):  # fmt: skip
            return
        for one, form, sequence, slot, goal in goals:
            yield from _parts_of_one(one, form, epoch, sequence, slot, goal, sent)


def _parts_of_one(
    one: HeldShard, form: StateForms, epoch: int, sequence: int, slot: int, goal: int, sent: dict[tuple[int, int], int]
) -> Iterator[CarriedPart]:
    """What is to be sent of one sequence up to token `goal`, unless it ends before."""
    most = part_tokens(form)
    for block in form.tokens:
        while one.slots.holds(sequence, slot, epoch):
            held = one.shard.held(slot, block)
            start = max(sent.get((sequence, block), 0), held.start)  # a window has dropped what lies before
            stop = min(start + most, goal, held.stop)
            if start >= stop:
                break
            yield CarriedPart(sequence, slot, one.shard.export_part(slot, block, start, stop))
            sent[sequence, block] = stop
    for block in form.fixed:
        if one.slots.holds(sequence, slot, epoch) and 0 < goal == one.shard.steady(slot):
            yield CarriedPart(sequence, slot, one.shard.export_fixed(slot, block, goal))
            sent[sequence, block] = goal
