"""The source's sequences of one deployment: who holds which slot, what is fed next, when an answer ends.

Pure: drawn tokens come in, runs for stage 0 and `Tokens` go out. A sequence is computed in one epoch at a time; it
enters one with an OPEN that goes round and tells what the stages lack of it, which is then fed again. A prompt that
continues what an earlier sequence left in an idle slot (`PrefixCache`) is fed from there on. Prompts are fed in chunks,
and clients take turns. At most CHUNKS_PER_STAGE_IN_FLIGHT × stages × the largest chunk of prompt tokens are under way
at once, which bounds how many wait at any stage. One prompt has at most CHUNKS_PER_STAGE_IN_FLIGHT × stages chunks
under way, so that a long prompt in small chunks keeps no other waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from peerllm.engine.base import Floats, Reach, Tensor
from peerllm.engine.messages import FinishReason, LoadStage, Submit, Tokens
from peerllm.engine.schedule.prompt_turns import PromptTurns
from peerllm.engine.schedule.running_sequence import RunningSequence
from peerllm.engine.state.prefix_cache import PrefixCache
from peerllm.engine.wire.parcels import Masked, Opened, first_attempt
from peerllm.errors import BadInputError, FrameError, OverloadedError
from peerllm.logprobs import unpacked
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Cuts, DeploymentId, chunk_of

CHUNKS_PER_STAGE_IN_FLIGHT = 2  # one being computed, one waiting
NOBODY = "\0"  # a client that no sequence is of
MAX_DRAINING = 1024  # ended sequences whose RELEASE has not come back to the source


def window_tokens(stages: int, chunk: int) -> int:
    """How many prompt tokens of a deployment may be under way at once."""
    return CHUNKS_PER_STAGE_IN_FLIGHT * stages * chunk


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
        epoch: int = 0,
    ) -> None:
        """`reach` says where idle slots can be taken up again; None: nowhere. No `cuts`: always `chunk` tokens."""
        self._vocabulary, self._deployment = vocabulary, deployment
        self._opens = (
            0  # the number of the last OPEN; above those of a source before this one, whose epochs were earlier
        )
        self._plan(slots, context, chunk, stages, cuts, epoch)
        self._running: dict[int, RunningSequence] = {}
        self._idle, self._reach = PrefixCache(slots, reach), reach
        self._prompts = PromptTurns()
        self._under_way = 0  # prompt tokens between stage 0 and the head, or not known to have left
        self._draining: dict[int, tuple[int, int]] = {}  # of those, by ended sequence, until its RELEASE comes back

    def _plan(self, slots: int, context: int, chunk: int, stages: int, cuts: Cuts, epoch: int) -> None:
        self.epoch = epoch  # in which sequences are fed
        self._opens = max(self._opens, first_attempt(epoch))
        self._slots, self.context = slots, context
        self._cuts, self._chunk = cuts or ((1, chunk),), chunk
        self._window = window_tokens(stages, chunk)
        self._most_chunks = CHUNKS_PER_STAGE_IN_FLIGHT * stages  # of one prompt under way

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

    def epoch_of(self, sequence: int) -> int | None:
        """In which epoch a sequence is computed; None: in none now, or it has ended."""
        running = self._running.get(sequence)
        return None if running is None else running.epoch

    def is_under_way(self, sequence: int) -> bool:
        """Whether tokens of a running sequence were fed that are not back."""
        running = self._running[sequence]
        return running.fed > running.back

    def is_late(self, run: TokenRun) -> bool:
        """Whether a run that came back has come back before, was given up, or is of a sequence that has ended."""
        running = self._running.get(run.sequence)
        return running is None or running.awaited or run.position < running.back

    def answer(self, sequence: int) -> Sequence[int]:
        """The ids of an answer so far."""
        running = self._running.get(sequence)
        return () if running is None else running.answer

    def reused(self, sequence: int) -> int:
        """How many tokens of its prompt a running sequence found in its slot."""
        return self._running[sequence].choice.position

    def kept(self, slot: int) -> int:
        """How many tokens the stages are to keep in a slot whose sequence has ended."""
        return self._idle.kept(slot)

    def take_mask(self, sequence: int, count: int, mask: bytes) -> None:
        """Which tokens a sequence may go on with after so many ids of its answer."""
        if (running := self._running.get(sequence)) is not None:
            running.mask = count, mask

    def due_mask(self, sequence: int) -> Masked | None:
        """What the head must know to draw after what was fed of a sequence last; None: nothing, or not known yet."""
        running = self._running.get(sequence)
        mask = None if running is None or running.epoch is None else running.due_mask
        if running is None or mask is None:
            return None
        return Masked(sequence, running.choice.slot, running.fed, mask)

    def submit(self, order: Submit) -> int:
        """Takes a sequence in and returns its slot; BadInputError or OverloadedError says why it cannot."""
        if order.sequence in self._running or order.sequence in self._draining:
            raise BadInputError(f"sequence {order.sequence} is in use; every sequence needs a number of its own")
        if len(self._draining) >= MAX_DRAINING:
            raise OverloadedError(f"{MAX_DRAINING} ended sequences are still leaving the stages; ask again later")
        if not 1 <= len(order.prompt) <= self.context:
            raise BadInputError(f"a prompt has 1 to {self.context} tokens here, not {len(order.prompt)}")
        if not all(0 <= one < self._vocabulary for one in (*order.prompt, *order.answer)):
            raise BadInputError(
                f"the prompt's token ids are not all from 0 to {self._vocabulary - 1}, as the model's are"
            )
        if order.max_tokens < 1:
            raise BadInputError(f"an answer has at least 1 token, not {order.max_tokens}")
        taken = {running.choice.slot for running in self._running.values()}
        # What becomes a vector is computed from its first token on, and leaves nothing behind.
        choice = self._idle.take(taken, order.prompt, order.client if order.pool is None else NOBODY)
        if choice is None:
            raise OverloadedError(f"all {self._slots} slots are taken; wait for a sequence to end")
        self._running[order.sequence] = running = RunningSequence(order, choice, self.epoch)
        if order.answer:  # the stages may still have all of it
            running.fed = running.back = len(order.prompt) + len(order.answer) - 1
        if self._reach is not None and not self._reach.rewinds and self._reach.snapshots and order.pool is None:
            running.plan_snapshot()
        self._cut(running)
        if running.left:
            self._prompts.add(order.client, order.sequence)
        return choice.slot

    # ---- entering epochs --------------------------------------------------------------------------------------------

    def change_to(self, plan: LoadStage) -> None:
        """From now on sequences are fed in the epoch of `plan`; those that run are to `leave` theirs and `enter` it."""
        if plan.slots != self._slots:
            self._idle = PrefixCache(plan.slots, self._reach)
        self._plan(plan.slots, plan.context, plan.chunk, plan.stages, plan.cuts, plan.epoch)

    def leave(self, sequence: int) -> None:
        """What is under way of a sequence does not count any more; it is fed nothing until it enters an epoch."""
        running = self._running[sequence]
        self._under_way -= sum(running.in_flight)
        self._prompts.remove(running.order.client, sequence)
        running.leave()

    def leave_behind(self, epoch: int) -> None:
        """Nothing that ended in an epoch comes back any more."""
        for sequence in [one for one, (left, _) in self._draining.items() if left == epoch]:
            self.drained(sequence)

    def fits(self, sequence: int) -> bool:
        """Whether a running sequence has room in the stages of the epoch."""
        running = self._running[sequence]
        return running.choice.slot < self._slots and max(running.back, len(running.order.prompt)) <= self.context

    def opened(self, sequence: int) -> Opened:
        """What goes round when a sequence enters the epoch, or asks again what the stages hold."""
        running = self._running[sequence]
        self._opens += 1
        running.attempt, running.awaited = self._opens, True
        order, choice = running.order, running.choice
        after = choice.after if running.back == choice.position else 0
        where = running.back, after, running.through, running.attempt
        return Opened(order.sequence, choice.slot, order.sampling, *where, pool=order.pool, logprobs=order.logprobs)

    def enter(self, sequence: int) -> tuple[Opened, TokenRun | None]:
        """A sequence that had left its epoch is fed again in the present one: what goes round, and its step if due."""
        running = self._running[sequence]
        running.epoch = self.epoch
        return self.opened(sequence), self._go_on(running)

    def came_round(self, opened: Opened) -> tuple[Opened, TokenRun | None] | None:
        """An OPEN is back. If stages lack something, the sequence goes back to there: see `enter`.

        FrameError if a stage lacks what it was to begin with: nothing.
        """
        running = self._running.get(opened.sequence)
        if running is None or not running.awaited or opened.attempt != running.attempt:
            return None
        running.awaited = False
        if opened.lacking < 0:
            return None
        if not running.back:
            raise FrameError("a device says again and again that it lacks the tokens before this answer's next one")
        place = opened.held if 0 < opened.held < opened.position and running.attempts_left() else 0
        self._under_way -= sum(running.in_flight)
        self._prompts.remove(running.order.client, opened.sequence)
        running.go_back(place, opened.lacking)
        return self.opened(opened.sequence), self._go_on(running)

    def _go_on(self, running: RunningSequence) -> TokenRun | None:
        self._cut(running)
        if running.left:
            self._prompts.add(running.order.client, running.order.sequence)
            return None
        return running.feed(1)

    def _cut(self, running: RunningSequence) -> None:
        """Decide in what chunks the sequence's tokens are fed; those that must be computed as before keep theirs."""
        running.exact = self._reach is None
        if not running.exact or not running.chunk:
            running.chunk = chunk_of(self._cuts, max(1, running.end - (0 if running.exact else running.fed)))
        running.chunk = min(running.chunk, self._chunk)

    # ---- feeding ----------------------------------------------------------------------------------------------------

    def feed(self, most: int | None = None) -> list[TokenRun]:
        """The prompt chunks that may go into stage 0 now, `most` of them at most."""
        chunks: list[TokenRun] = []
        while most is None or len(chunks) < most:
            sequence = self._prompts.next(self._may_feed)
            if sequence is None:
                break
            running = self._running[sequence]
            length = running.next_length
            if self._under_way + length > self._window:
                break
            running.in_flight.append(length)
            self._under_way += length
            chunks.append(running.feed(length))
            self._prompts.served(running.order.client, sequence, more=bool(running.left))
            if running.left and running.fed == running.goal:
                self._cut(running)
        return chunks

    def _may_feed(self, sequence: int) -> bool:
        running = self._running[sequence]
        return running.epoch == self.epoch and len(running.in_flight) < self._most_chunks

    def ids(self, runs: Sequence[TokenRun]) -> Tensor:
        """The token ids of runs that were fed and whose sequences still run: int64 [tokens]."""
        return np.array([one for run in runs for one in self._running[run.sequence].ids(run)], np.int64)

    def came_back(
        self, run: TokenRun, token: int | None, vector: Floats | None = None, logprobs: bytes = b""
    ) -> tuple[TokenRun | None, Tokens | None]:
        """A run passed the head, which drew `token` after it (None after a chunk that is not the prompt's last).

        Or, where that was asked for, made a `vector` of the whole prompt. `logprobs`: as in Drawn.

        Returns the step to feed at once and what to tell the daemon; both None for a sequence that has ended, and for
        what came late. FrameError if the run is not the one that is due, or the token is none.
        """
        sequence, position, length = run.sequence, run.position, run.length
        running = self._running.get(sequence)
        if running is None or self.is_late(run):
            return None, None
        due = running.in_flight[0] if running.in_flight else 1
        if position != running.back or length != due or position + length > running.fed:
            raise FrameError(f"positions {position}+{length} came back, {running.back}+{due} were due")
        sampled = position + length >= max(len(running.order.prompt), running.goal + 1)
        pool = running.order.pool
        if (vector is not None) != (sampled and pool is not None):
            raise FrameError(f"the head made {'no' if vector is None else 'a'} vector at position {position + length}")
        if (sampled and pool is None) != (token is not None):
            raise FrameError(f"the head {'drew no' if sampled else 'drew a'} token at position {position + length}")
        if token is not None and not 0 <= token < self._vocabulary:
            raise FrameError(f"the head drew {token}, which is no token id; they go from 0 to {self._vocabulary - 1}")
        self._check(logprobs, token, running.order.logprobs)
        if running.in_flight:
            self._under_way -= running.in_flight.popleft()
        running.back += length
        if vector is not None:
            if not np.isfinite(vector).all():
                raise FrameError("the head made a vector that has no finite numbers")
            ended = self.end(sequence, "stop")
            return None, replace(ended, vector=tuple(vector.tolist())) if ended is not None else None
        if token is None:
            return self._passed(running), None
        if token in running.order.stop_ids:
            return None, self.end(sequence, "stop")
        start = len(running.answer)
        told = (logprobs,) if logprobs else ()
        tokens = Tokens(self._deployment, sequence, start, (token,), reused=running.reused, logprobs=told)
        if start + 1 >= running.order.max_tokens or running.fed >= self.context:
            self.end(sequence, "length")
            return None, replace(tokens, finish="length")
        running.answer.append(token)
        return running.feed(1), tokens

    def _check(self, logprobs: bytes, token: int | None, asked: int | None) -> None:
        """FrameError unless these are a token's log probabilities, with `asked` likeliest ones."""
        if token is None or asked is None:
            if logprobs:
                raise FrameError("the head sent log probabilities that nobody asked for")
            return
        try:
            (own, *likeliest) = unpacked(logprobs)
        except ValueError as error:
            raise FrameError(f"the head sent {error}") from error
        known = own[0] == token and all(one < self._vocabulary for one, _ in likeliest)
        if not known or len(likeliest) != min(asked, self._vocabulary):
            raise FrameError("the head sent log probabilities of other tokens than were asked for")

    def _passed(self, running: RunningSequence) -> TokenRun | None:
        """A chunk is back that no token was drawn after: the step that may be due now."""
        if running.through < 0 or running.back < running.goal:
            return None
        running.through = -1
        return running.feed(1) if running.goal >= len(running.order.prompt) else None

    # ---- ending -----------------------------------------------------------------------------------------------------

    def end(self, sequence: int, finish: FinishReason, error: str = "") -> Tokens | None:
        """End a sequence; its slot is free, and idle unless the sequence failed. None if it had ended before."""
        running = self._running.pop(sequence, None)
        if running is None:
            return None
        if running.epoch is not None:
            self._draining[sequence] = running.epoch, sum(running.in_flight)
        self._prompts.remove(running.order.client, sequence)
        if finish != "error" and running.order.pool is None:
            self._idle.keep(running.choice.slot, running.left_behind())
        return Tokens(self._deployment, sequence, len(running.answer), (), finish, error, running.reused)

    def forget(self, sequence: int) -> None:
        """Some stage let go of what an ended sequence left in its slot: no sequence may begin with it."""
        self._idle.forget(sequence)

    def drained(self, sequence: int) -> None:
        """An ended sequence's RELEASE came back from the last stage: nothing of it is under way."""
        self._under_way -= self._draining.pop(sequence, (0, 0))[1]
