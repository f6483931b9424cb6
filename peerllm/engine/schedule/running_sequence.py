"""One sequence on its source: what was fed of it, what is back, and what has to be computed again. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peerllm.engine.messages import Submit
from peerllm.engine.state.prefix_cache import CachedPrefix, SlotChoice
from peerllm.transport.frames.token_run import TokenRun

TAIL = 8  # tokens at a prompt's end, after the snapshot: chat templates render the answer's beginning anew next time
LEAST_BEFORE_SNAPSHOT = 32  # new tokens before a snapshot: for fewer, the extra pass costs more than it spares
MOST_PARTIAL = 2  # tries to go back to what the stages still hold; then the sequence is computed from its start


def chunk_length(left: int, chunk: int) -> int:
    """How many of a prompt's `left` tokens go next; none is left over by itself, if chunks are of 3 or more.

    A recurrent model may compute a single token in another way than a run of them (Nemotron-H bounds its time step in
    runs only), and prompts are to be computed as they would be in one run.
    """
    return chunk - 1 if left == chunk + 1 and chunk > 2 else min(chunk, left)


@dataclass(slots=True)
class RunningSequence:
    """Of prompt and answer, tokens up to `fed` were put into stage 0, and those up to `back` have come back.

    While `back` is less than `goal`, tokens are computed again by the layers up to `through`, without the head's draw.
    """

    order: Submit
    choice: SlotChoice
    epoch: int | None  # in which it is computed; None: in none, it waits
    chunk: int = 0  # the most tokens that are fed at once of what is left
    fed: int = 0
    back: int = 0
    snapshot: int = 0  # where a chunk of the prompt ends with a new snapshot; 0: nowhere
    answer: list[int] = field(default_factory=list)  # its ids so far, all put into stage 0 but the last
    in_flight: deque[int] = field(default_factory=deque)  # lengths of the chunks under way
    goal: int = 0
    through: int = -1
    attempt: int = 0  # the number of its last OPEN
    awaited: bool = False  # which is to come back
    partial: int = 0  # how often it went back to what stages still held since it entered the epoch
    mask: tuple[int, bytes] | None = None  # the last: for the place after so many ids of the answer
    exact: bool = False  # tokens that are computed again must go through the layers in the same runs as before

    def __post_init__(self) -> None:
        self.fed = self.back = self.choice.position
        self.answer = list(self.order.answer)

    def plan_snapshot(self) -> None:
        """Let a snapshot be kept near the prompt's end, or where the prompt parts from an earlier one."""
        tail = len(self.order.prompt) - TAIL
        place = min(self.choice.parting or tail, tail)
        self.snapshot = place if place - self.choice.position >= LEAST_BEFORE_SNAPSHOT else 0

    def feed(self, length: int) -> TokenRun:
        """The next `length` tokens, which count as put into stage 0 from now on."""
        start = self.fed
        self.fed += length
        again, kept = start < self.goal, self.fed == self.snapshot
        ends = self.fed >= len(self.order.prompt) and not again
        through = self.through if again else -1
        masked = ends and self.order.constraint is not None
        return TokenRun(self.order.sequence, self.choice.slot, start, length, ends, kept, through, masked)

    @property
    def due_mask(self) -> bytes | None:
        """The mask for what is drawn next, once the tokens before it were fed; None: it is not there, or not due."""
        count, mask = self.mask or (-1, None)
        return mask if self.fed == len(self.order.prompt) + count else None

    @property
    def end(self) -> int:
        """Up to where tokens are fed as chunks now."""
        return self.goal if self.fed < self.goal else len(self.order.prompt)

    @property
    def left(self) -> int:
        """Tokens that are to be fed as chunks, up to the snapshot if that is ahead."""
        end = self.end
        return max(0, (self.snapshot if self.fed < self.snapshot < end else end) - self.fed)

    @property
    def next_length(self) -> int:
        """How many tokens the next chunk has."""
        if self.exact and self.fed < self.goal:
            prompt_left = len(self.order.prompt) - self.fed
            return min(chunk_length(prompt_left, self.chunk), self.left) if prompt_left > 0 else 1
        return chunk_length(self.left, self.chunk)

    @property
    def kept_snapshot(self) -> int:
        """The position of which every stage keeps a snapshot, once the head has seen the tokens before it; 0: none."""
        return self.snapshot if 0 < self.snapshot <= self.fed else self.choice.snapshot

    @property
    def reused(self) -> int:
        """Prompt tokens that the slot held already: told with the answer's first token only, else 0."""
        return 0 if self.answer else self.choice.position

    def ids(self, run: TokenRun) -> Sequence[int]:
        """The token ids of a run that was fed: of the prompt, of the answer, or of both."""
        prompt, start, end = self.order.prompt, run.position, run.position + run.length
        if end <= len(prompt):
            return prompt[start:end]
        return (*prompt[start:], *self.answer[max(start - len(prompt), 0) : end - len(prompt)])

    def leave(self) -> None:
        """What is under way does not count any more."""
        self._forget_flight()
        self.epoch, self.awaited, self.partial = None, False, 0
        if self.back < self.goal:  # the stages are asked anew, for all of it
            self.fed = self.back = self.goal
        self.goal, self.through = 0, -1
        if self.order.pool is not None:  # the head that made a sum of what came before may be another's
            self.fed = self.back = 0

    def go_back(self, place: int, through: int) -> None:
        """Tokens from `place` on are to be computed again, by layers up to `through`, or as far as they are already."""
        self._forget_flight()
        snapshot = self.kept_snapshot
        self.goal = max(self.goal, self.back)
        self.fed = self.back = place
        self.through = max(through, self.through)
        if place < snapshot < self.goal:
            self.snapshot = snapshot

    def attempts_left(self) -> bool:
        """Whether it may go back to a place after its start once more."""
        self.partial += 1
        return self.partial <= MOST_PARTIAL

    def left_behind(self) -> CachedPrefix:
        """What an ended sequence has left in its slot."""
        order = self.order
        ids = (*order.prompt, *self.answer)[: self.back]
        furthest, body = max(self.choice.furthest, self.fed), len(order.prompt) - TAIL
        return CachedPrefix(
            order.sequence, order.client, ids, furthest, self.fed == self.back, self.kept_snapshot, body
        )

    def _forget_flight(self) -> None:
        self.fed = self.back
        self.in_flight.clear()
