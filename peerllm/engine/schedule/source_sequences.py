"""The source's sequences of one deployment: who holds which slot, what is fed next, when an answer ends.

Pure: drawn tokens come in, runs for stage 0 and `Tokens` go out. A prompt that continues what an earlier sequence left
in an idle slot (`PrefixCache`) is fed from there on. Prompts are fed in chunks, and clients take turns. At most
CHUNKS_PER_STAGE_IN_FLIGHT × stages × the largest chunk of prompt tokens are under way at once, which bounds how many
wait at any stage. One prompt has at most CHUNKS_PER_STAGE_IN_FLIGHT × stages chunks under way, so that a long prompt in
small chunks keeps no other waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from peerllm.engine.base import Reach, Tensor
from peerllm.engine.messages import FinishReason, Submit, Tokens
from peerllm.engine.schedule.prompt_turns import PromptTurns
from peerllm.engine.state.prefix_cache import CachedPrefix, PrefixCache, SlotChoice
from peerllm.errors import BadInputError, FrameError, OverloadedError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Cuts, DeploymentId, chunk_of

CHUNKS_PER_STAGE_IN_FLIGHT = 2  # one being computed, one waiting
TAIL = 8  # tokens at a prompt's end, after the snapshot: chat templates render the answer's beginning anew next time
LEAST_BEFORE_SNAPSHOT = 32  # new tokens before a snapshot: for fewer, the extra pass costs more than it spares
MAX_DRAINING = 1024  # ended sequences whose RELEASE has not come back to the source


def window_tokens(stages: int, chunk: int) -> int:
    """How many prompt tokens of a deployment may be under way at once."""
    return CHUNKS_PER_STAGE_IN_FLIGHT * stages * chunk


def chunk_length(left: int, chunk: int) -> int:
    """How many of a prompt's `left` tokens go next; none is left over by itself, if chunks are of 3 or more.

    A recurrent model may compute a single token in another way than a run of them (Nemotron-H bounds its time step in
    runs only), and prompts are to be computed as they would be in one run.
    """
    return chunk - 1 if left == chunk + 1 and chunk > 2 else min(chunk, left)


@dataclass(slots=True)
class _Running:
    order: Submit
    choice: SlotChoice
    chunk: int  # what is new of the prompt is fed in chunks of so many tokens
    fed: int  # tokens of prompt and answer that were put into stage 0, and those that the slot held already
    back: int  # of those, tokens that the head has seen
    snapshot: int = 0  # where a chunk of the prompt ends with a new snapshot; 0: nowhere
    answer: list[int] = field(default_factory=list)  # ids of the answer so far, all put into stage 0
    in_flight: deque[int] = field(default_factory=deque)  # lengths of the prompt chunks under way

    def feed(self, length: int) -> TokenRun:
        """The next `length` tokens, which count as put into stage 0 from now on."""
        start = self.fed
        self.fed += length
        ends, kept = self.fed >= len(self.order.prompt), self.fed == self.snapshot
        return TokenRun(self.order.sequence, self.choice.slot, start, length, ends, kept)

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are to be fed, up to the snapshot if that is ahead."""
        return (self.snapshot if self.fed < self.snapshot else len(self.order.prompt)) - self.fed

    @property
    def kept_snapshot(self) -> int:
        """The position of which every stage keeps a snapshot, once the head has seen the tokens before it; 0: none."""
        return self.snapshot if 0 < self.snapshot <= self.fed else self.choice.snapshot

    def ids(self, run: TokenRun) -> Sequence[int]:
        """The token ids of a run that was fed: of the prompt, or one of the answer."""
        start, prompt = run.position, self.order.prompt
        return prompt[start : start + run.length] if start < len(prompt) else (self.answer[start - len(prompt)],)


class SourceSequences:
    """Of one deployment on its source. Tokens that come late belong to a sequence number that is not running."""

    def __init__(
        self,
        deployment: DeploymentId,
        slots: int,
        context: int,
        chunk: int,
        stages: int,
        vocabulary: int,
        reach: Reach | None = None,
        cuts: Cuts = (),
    ) -> None:
        """`reach` says where idle slots can be taken up again; None: nowhere. No `cuts`: always `chunk` tokens."""
        self._vocabulary = vocabulary
        self._deployment, self._slots, self._context = deployment, slots, context
        self._cuts = cuts or ((1, chunk),)
        self._window = window_tokens(stages, chunk)
        self._most_chunks = CHUNKS_PER_STAGE_IN_FLIGHT * stages  # of one prompt under way
        self._running: dict[int, _Running] = {}
        self._idle = PrefixCache(slots, reach)
        self._snapshots = reach is not None and not reach.rewinds and reach.snapshots
        self._prompts = PromptTurns()
        self._under_way = 0  # prompt tokens between stage 0 and the head, or not known to have left
        self._draining: dict[int, int] = {}  # of those, by ended sequence, until its RELEASE has gone round

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(self._running)

    @property
    def prompting(self) -> bool:
        """Whether prompts wait to be fed."""
        return bool(self._prompts)

    @property
    def prompts_under_way(self) -> bool:
        return self._under_way > 0

    def slot(self, sequence: int) -> int:
        return self._running[sequence].choice.slot

    def reused(self, sequence: int) -> int:
        """How many tokens of its prompt a running sequence found in its slot."""
        return self._running[sequence].choice.position

    def kept(self, slot: int) -> int:
        """How many tokens the stages are to keep in a slot whose sequence has ended."""
        return self._idle.kept(slot)

    def submit(self, order: Submit) -> int:
        """Takes a sequence in and returns its slot; BadInputError or OverloadedError says why it cannot."""
        if order.sequence in self._running or order.sequence in self._draining:
            raise BadInputError(f"sequence {order.sequence} is in use; every sequence needs a number of its own")
        if len(self._draining) >= MAX_DRAINING:
            raise OverloadedError(f"{MAX_DRAINING} ended sequences are still leaving the stages; ask again later")
        if not 1 <= len(order.prompt) <= self._context:
            raise BadInputError(f"a prompt has 1 to {self._context} tokens here, not {len(order.prompt)}")
        if min(order.prompt) < 0 or max(order.prompt) >= self._vocabulary:
            raise BadInputError(
                f"the prompt's token ids are not all from 0 to {self._vocabulary - 1}, as the model's are"
            )
        if order.max_tokens < 1:
            raise BadInputError(f"an answer has at least 1 token, not {order.max_tokens}")
        taken = {running.choice.slot for running in self._running.values()}
        choice = self._idle.take(taken, order.prompt, order.client)
        if choice is None:
            raise OverloadedError(f"all {self._slots} slots are taken; wait for a sequence to end")
        chunk = chunk_of(self._cuts, len(order.prompt) - choice.position)
        self._running[order.sequence] = running = _Running(order, choice, chunk, choice.position, choice.position)
        if self._snapshots:
            tail = len(order.prompt) - TAIL
            place = min(choice.parting or tail, tail)
            running.snapshot = place if place - choice.position >= LEAST_BEFORE_SNAPSHOT else 0
        self._prompts.add(order.client, order.sequence)
        return choice.slot

    def feed(self, most: int | None = None) -> list[TokenRun]:
        """The prompt chunks that may go into stage 0 now, `most` of them at most."""
        chunks: list[TokenRun] = []
        while most is None or len(chunks) < most:
            sequence = self._prompts.next(lambda one: len(self._running[one].in_flight) < self._most_chunks)
            if sequence is None:
                break
            running = self._running[sequence]
            length = chunk_length(running.prompt_left, running.chunk)
            if self._under_way + length > self._window:
                break
            running.in_flight.append(length)
            self._under_way += length
            chunks.append(running.feed(length))
            self._prompts.served(running.order.client, sequence, more=not chunks[-1].sample)
        return chunks

    def ids(self, runs: Sequence[TokenRun]) -> Tensor:
        """The token ids of runs that were fed and whose sequences still run: int64 [tokens]."""
        return np.array([one for run in runs for one in self._running[run.sequence].ids(run)], np.int64)

    def came_back(self, run: TokenRun, token: int | None) -> tuple[TokenRun | None, Tokens | None]:
        """A run passed the head, which drew `token` after it (None after a chunk that is not the prompt's last).

        Returns the step to feed at once and what to tell the daemon; both None for a sequence that has ended.
        FrameError if the run is not the one that is due, or the token is none.
        """
        sequence, position, length = run.sequence, run.position, run.length
        running = self._running.get(sequence)
        if running is None:
            return None, None
        due = running.in_flight[0] if running.in_flight else 1
        if position != running.back or length != due or position + length > running.fed:
            raise FrameError(f"positions {position}+{length} came back, {running.back}+{due} were due")
        sampled = position + length >= len(running.order.prompt)
        if sampled != (token is not None):
            raise FrameError(f"the head {'drew no' if sampled else 'drew a'} token at position {position + length}")
        if token is not None and not 0 <= token < self._vocabulary:
            raise FrameError(f"the head drew {token}, which is no token id; they go from 0 to {self._vocabulary - 1}")
        if running.in_flight:
            self._under_way -= running.in_flight.popleft()
        running.back += length
        if token is None:
            return None, None
        if token in running.order.stop_ids:
            return None, self.end(sequence, "stop")
        start = len(running.answer)
        tokens = Tokens(self._deployment, sequence, start, (token,), reused=_reused(running))
        if start + 1 >= running.order.max_tokens or running.fed >= self._context:
            self.end(sequence, "length")
            return None, replace(tokens, finish="length")
        running.answer.append(token)
        return running.feed(1), tokens

    def end(self, sequence: int, finish: FinishReason, error: str = "") -> Tokens | None:
        """End a sequence; its slot is free, and idle unless the sequence failed. None if it had ended before."""
        running = self._running.pop(sequence, None)
        if running is None:
            return None
        self._draining[sequence] = sum(running.in_flight)
        order, choice = running.order, running.choice
        self._prompts.remove(order.client, sequence)
        if finish != "error":
            ids = (*order.prompt, *running.answer)[: running.back]
            furthest, settled = max(choice.furthest, running.fed), running.fed == running.back
            body = len(order.prompt) - TAIL
            left = CachedPrefix(sequence, order.client, ids, furthest, settled, running.kept_snapshot, body)
            self._idle.keep(choice.slot, left)
        return Tokens(self._deployment, sequence, len(running.answer), (), finish, error, _reused(running))

    def forget(self, sequence: int) -> None:
        """Some stage let go of what an ended sequence left in its slot: no sequence may begin with it."""
        self._idle.forget(sequence)

    def drained(self, sequence: int) -> None:
        """An ended sequence's RELEASE came back from the last stage: nothing of it is under way."""
        self._under_way -= self._draining.pop(sequence, 0)

    def reset(self) -> None:
        """The links are new: nothing of ended sequences is under way, and the stages keep nothing in idle slots."""
        for sequence in list(self._draining):
            self.drained(sequence)
        self._idle.clear()


def _reused(running: _Running) -> int:
    """Prompt tokens that the slot held already: told with the answer's first token only, else 0."""
    return 0 if running.answer else running.choice.position
