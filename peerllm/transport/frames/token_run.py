"""The one record of a run of tokens, from the source's prompt to the shards and over the wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRun:
    """`length` tokens of one sequence from `position` on, in KV slot `slot`; what is computed of them lies beside it.

    Position 0 starts the slot afresh; a position below what the slot holds rolls the slot back to there (where layers
    are recurrent, only to a snapshot).
    """

    sequence: int  # u64 on the wire
    slot: int  # u32, as the other two
    position: int
    length: int
    sample: bool = False  # the head picks a token after the run's last position
    snapshot: bool = False  # every stage keeps a copy of its recurrent states after it, in place of an earlier one
    through: int = -1  # computed again, by layers up to this one, whose stage answers in the head's place; -1: by all
    masked: bool = False  # the head picks among the tokens that a mask allows, which comes to it by another way

    @property
    def is_step(self) -> bool:
        """One token that the head samples after: a step of an answer, or the last token of a prompt."""
        return self.sample and self.length == 1
