"""Slots taken up again, in whatever order frames, batches, failures and clients come.

The real source, stages, slots and frames of a three-stage plan, over links that deliver when the machine says so and
shards that add up what they hold: an answer is right only if every stage held just the tokens it should.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peerllm.engine import base
from peerllm.engine.base import Reach, Tensor
from peerllm.engine.messages import Hop, Submit, Tokens
from peerllm.engine.schedule import running_sequence
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.state.kv_cache import slot_caches
from peerllm.engine.state.kv_slots import KVSlots
from peerllm.engine.state.prefix_cache import CachedPrefix, PrefixCache, _common
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, keys_and_values
from peerllm.engine.wire.parcels import Opened, Released, from_frame, source_limits, stage_limits
from peerllm.errors import EngineError, LinkError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame
from peerllm.transport.frames.limits import FrameRefused
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.runs import in_slot
from tests.transport.frames_support import encode

STAGES, CONTEXT, CHUNK, WINDOW, SLACK = 3, 40, 4, 3, 2
MODULUS, WORDS = 251, 4  # few words: prompts often begin alike
KINDS: dict[str, Reach | None] = {
    "full": Reach(True),
    "window": Reach(True, WINDOW + 2 * SLACK, SLACK),
    "recurrent": Reach(False),
    "hybrid": Reach(False, WINDOW + 2 * SLACK, SLACK),
    "exact end": Reach(False, snapshots=False),
    "never": None,
}


def sums(tokens: Sequence[int]) -> list[int]:
    return [total % MODULUS for total in itertools.accumulate(tokens)]


def expected(prompt: Sequence[int], count: int) -> list[int]:
    said: list[int] = []
    while len(said) < count:
        hidden: Sequence[int] = [*prompt, *said]
        for _ in range(STAGES):
            hidden = sums(hidden)
        said.append(hidden[-1] % WORDS)
    return said


RECURRENT = LayerState(fixed=(SequenceArray("recurrent", (1,)),))  # the sum so far
STATES = {
    "recurrent": {0: RECURRENT},
    "exact end": {0: RECURRENT},
    "hybrid": {0: RECURRENT, 1: keys_and_values(1, 1, "float32", WINDOW)},
}


class Adder:
    """A shard whose output for a token is the sum of its input and all before it in the slot.

    Recurrent ones keep that sum in the slots of the graph engine, the others all inputs in lists.
    """

    hidden_size, vocabulary, weight_bytes, kv_bytes, weights = 1, WORDS, 1, 1, {}

    def __init__(self, kind: str, slots: int, head: bool) -> None:
        self.first_layer = self.last_layer = 0
        self.reach, self._kind, self._head = KINDS[kind], kind, head
        self._held: list[list[int]] = [[] for _ in range(slots)]
        state = keys_and_values(1, 1, "float32", WINDOW)
        self._window = slot_caches(["sliding_attention"], [{"sliding_window": WINDOW}], {0: state}, slots, CONTEXT)
        self._slots = KVSlots(STATES.get(kind, {}), slots, CONTEXT)
        self.fails = 0  # at the pass so many from now
        self.snapshots = 0

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        fails = self.fails == 1
        self.fails = max(self.fails - 1, 0)
        if self._kind in STATES:
            return self._recur(inputs, runs, fails)
        if fails:
            raise EngineError("it fails on purpose")
        rows, start = [], 0
        for each in runs:
            held = self._held[each.slot]
            if self._kind == "window":
                cache = self._window[each.slot]
                cache.seek(each.position)  # raises where the real cache would
                cache.update(*torch.zeros(2, 1, 1, each.length, 1), 0)
                cache.advance(each.length)
            exact = self._kind == "never" and each.position
            if each.position > len(held) or (exact and each.position != len(held)):
                raise EngineError(f"{len(held)} held, {each.position} wanted")
            held[each.position :] = inputs[start : start + each.length].flatten().astype(int).tolist()
            start += each.length
            new = np.array(sums(held)[each.position :], np.float32)
            if not self._head:
                rows.append(new[:, None])
            elif each.sample:
                rows.append(np.eye(WORDS, dtype=np.float32)[new[-1:].astype(int) % WORDS])
        return np.concatenate(rows) if rows else np.empty((0, WORDS), np.float32)

    def _recur(self, inputs: Tensor, runs: Sequence[TokenRun], fails: bool) -> Tensor:
        slots, rows, start = self._slots, [], 0
        slots.check(runs)
        slots.seek(runs)
        for each in runs:
            total = slots.stores["recurrent 0"][slots._place[each.slot]]
            sum_so_far = (total + inputs[start : start + each.length].reshape(-1).cumsum()) % MODULUS
            total[:] = sum_so_far[-1]
            start += each.length
            if not self._head:
                rows.append(sum_so_far.astype(np.float32)[:, None])
            elif each.sample:
                rows.append(np.eye(WORDS, dtype=np.float32)[sum_so_far[-1:].astype(int) % WORDS])
        if fails:
            raise EngineError("it fails on purpose")
        slots.advance(runs)
        for each in runs:
            if each.snapshot:
                self.snapshots += 1
                slots.keep_snapshot(each.slot)
        return np.concatenate(rows) if rows else np.empty((0, WORDS), np.float32)

    def release(self, slot: int) -> None:
        self._held[slot] = []
        self._slots.release(slot)
        self._window[slot].seek(0)

    def close(self) -> None: ...


class Wire:
    """An outlet whose frames wait until somebody delivers them."""

    device = "d" * 64

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.cut = False

    def send(self, frame: Frame) -> None:
        if self.cut:
            raise LinkError("cut")
        self.frames.append(encode(frame))


class Plan:
    """Three stages on three engines."""

    def __init__(self, kind: str, slots: int) -> None:
        self.told: list[Tokens] = []
        self.schedules: list[Scheduler[Any]] = [Scheduler() for _ in range(STAGES)]
        self.deployments: list[LocalDeployment] = []
        self.shards: list[Adder] = []
        self.limits = []
        for place in range(STAGES):
            hop = Hop("d" * 64, (), 1, place + 1)
            spec = stage(
                1,
                stage=place,
                stages=STAGES,
                first_layer=place,
                last_layer=place,
                slots=slots,
                context=CONTEXT,
                chunk=CHUNK,
                downstream=hop,
            )
            self.deployments.append(LocalDeployment(DEPLOYMENT, self.schedules[place], self._hear))
            self.shards.append(Adder(kind, slots, place == STAGES - 1))
            self.deployments[place].loaded(LoadedStage(spec, [HeldShard.of(spec, self.shards[place])], _greedy))
            self.limits.append(stage_limits(spec, 1) if place else source_limits(spec, 1))
        self.link()

    def _hear(self, message: Any) -> None:
        if isinstance(message, Tokens):
            self.told.append(message)

    def link(self) -> None:
        self.wires = [Wire() for _ in range(STAGES)]  # by the stage that sends
        for place, deployment in enumerate(self.deployments):
            deployment.linked(1, {place: self.wires[place]})

    def deliver(self, sender: int) -> None:
        receiver = (sender + 1) % STAGES
        frame = decode(self.wires[sender].frames.popleft(), self.limits[receiver])
        self.deployments[receiver].arrived(1, sender + 1, from_frame(frame))

    def compute(self, place: int) -> None:
        batch = self.schedules[place].next()
        assert batch is not None
        deployment = self.deployments[place]
        try:
            deployment.rings[1].computed(place, *deployment.rings[1].stages[place].compute(batch[1]))
        except EngineError as error:
            for run in batch[1].runs:
                deployment.rings[1].fail(place, run, str(error))

    def waiting(self, place: int) -> int:
        return self.schedules[place].waiting((DEPLOYMENT, 1, place))

    def settle(self) -> None:
        while any(wire.frames for wire in self.wires) or any(self.waiting(place) for place in range(STAGES)):
            for place in range(STAGES):
                while self.wires[place].frames:
                    self.deliver(place)
                while self.waiting(place):
                    self.compute(place)


def _greedy(logits: Tensor, draws: Any) -> list[int]:
    return logits.argmax(1).tolist()


class Household(RuleBasedStateMachine):
    """Clients talk on, begin anew, hang up; stages fail and links break."""

    @initialize(
        kind=st.sampled_from(["window", "window", "recurrent", "recurrent", "hybrid", "exact end", "full", "never"]),
        slots=st.integers(1, 3),
        faults=st.sampled_from([False, False, True]),
    )
    def begin(self, kind: str, slots: int, faults: bool) -> None:
        self._patched = pytest.MonkeyPatch()
        self._patched.setattr(base, "ROLLBACK_TOKENS", SLACK)
        self._patched.setattr(running_sequence, "TAIL", 2)
        self._patched.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 2)
        self.plan, self.slots, self.faults = Plan(kind, slots), slots, faults
        self.source = self.plan.deployments[0].feed.sequences
        self.orders: dict[int, Submit] = {}
        self.went_wrong = False

    def teardown(self) -> None:
        if not hasattr(self, "plan"):
            return
        self.plan.settle()
        for number in self.orders:
            self.check(number, settled=True)
        for place, deployment in enumerate(self.plan.deployments):
            held = deployment.rings[1].stages[place].chain[0].slots
            assert self.went_wrong or held.in_use(1) == 0, "a RELEASE that was lost with a link is not sent again"
            for slot, remains in self.source._idle._remains.items():
                assert self.went_wrong or held.kept(slot) == len(remains.ids)
        self._patched.undo()

    def answer(self, number: int) -> tuple[list[int], Tokens | None]:
        said: list[int] = []
        for event in self.plan.told:
            if event.sequence == number:
                assert event.start == len(said)
                said += event.ids
                if event.finish is not None:
                    return said, event
        return said, None

    def check(self, number: int, settled: bool = False) -> None:
        order = self.orders[number]
        said, end = self.answer(number)
        assert said == expected(order.prompt, len(said))
        if settled:
            assert end is not None
            assert end.finish != "error" or self.went_wrong, end
            assert end.finish != "length" or len(said) == min(order.max_tokens, CONTEXT - len(order.prompt) + 1)

    @precondition(lambda self: len(self.source.running) < self.slots)
    @rule(
        data=st.data(),
        client=st.sampled_from(["anna", "ben", None]),
        new=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=9),
        count=st.integers(1, 6),
    )
    def ask(self, data: st.DataObject, client: str | None, new: list[int], count: int) -> None:
        prompt = new
        if self.orders and data.draw(st.booleans(), label="goes on"):
            earlier = data.draw(st.sampled_from(sorted(self.orders)), label="with")
            client = client or self.orders[earlier].client
            before = [*self.orders[earlier].prompt, *self.answer(earlier)[0]]
            back = data.draw(st.sampled_from([0, 1, 2, 3, 4, 6, 9, 20]), label="but for")
            prompt = [*before[: max(len(before) - back, 0)], *new]
        if len(prompt) >= CONTEXT:
            return
        number = len(self.orders) + 1
        order = self.orders[number] = Submit(DEPLOYMENT, number, tuple(prompt), count, (), Sampling(), client or "anna")
        self.plan.deployments[0].submit(order)
        if number in self.source.running and (reused := self.source.reused(number)):
            assert reused < len(prompt)
            earlier = [o for n, o in self.orders.items() if n != number and o.client == order.client]
            texts = [(*order.prompt, *self.answer(order.sequence)[0]) for order in earlier]
            assert any(text[:reused] == tuple(prompt)[:reused] for text in texts)
        if data.draw(st.booleans(), label="is waited for"):
            self.plan.settle()

    @precondition(lambda self: self.source.running)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        self.plan.deployments[0].cancel(data.draw(st.sampled_from(self.source.running)))

    @rule(sender=st.integers(0, STAGES - 1), count=st.integers(1, 4))
    def deliver(self, sender: int, count: int) -> None:
        for _ in range(min(count, len(self.plan.wires[sender].frames))):
            self.plan.deliver(sender)

    @rule(place=st.integers(0, STAGES - 1), count=st.integers(1, 4))
    def compute(self, place: int, count: int) -> None:
        for _ in range(count):
            if self.plan.waiting(place):
                self.plan.compute(place)

    @rule()
    def settle(self) -> None:
        self.plan.settle()

    @precondition(lambda self: self.faults)
    @rule(place=st.integers(0, STAGES - 1))
    def fail(self, place: int) -> None:
        self.plan.shards[place].fails, self.went_wrong = 1, True

    @precondition(lambda self: self.faults)
    @rule(place=st.integers(0, STAGES - 1))
    def lose_a_link(self, place: int) -> None:
        """Both ends and the source hear of it, then the links are made anew."""
        self.went_wrong = True
        self.plan.wires[place].cut = True
        self.plan.wires[place].frames.clear()
        self.plan.deployments[place].rings[1].lost("d" * 64, None, "cut")
        self.plan.deployments[(place + 1) % STAGES].rings[1].lost("d" * 64, (place + 1) % STAGES, "cut")
        self.plan.settle()
        self.plan.link()

    @invariant()
    def every_slot_has_one_holder(self) -> None:
        if not hasattr(self, "plan"):
            return
        slots = [self.source.slot(number) for number in self.source.running]
        assert len(set(slots)) == len(slots)
        idle = self.source._idle._remains
        assert not idle.keys() & set(slots)
        assert all(slot < self.slots and len(one.ids) <= CONTEXT for slot, one in idle.items())
        for number in self.orders:
            self.check(number)


Household.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestHousehold = Household.TestCase


@settings(max_examples=100)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    slots=st.integers(1, 4),
    lives=st.lists(
        st.tuples(
            st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(0, 5), st.booleans()
        ),
        max_size=25,
    ),
)
def test_an_empty_slot_first_then_the_one_left_longest_ago(kind: str, slots: int, lives: Any) -> None:
    """Against a list of what ended, in its order; `True` lets a sequence run on until all slots are taken."""
    idle, ended, running = PrefixCache(slots, KINDS[kind]), [], set()
    for number, (client, prompt, extra, stays) in enumerate(lives):
        choice = idle.take(running, prompt, client)
        if choice is None:
            assert len(running) == slots
            running.clear()
            continue
        assert choice.slot not in running
        slot, position = choice.slot, choice.position
        found = {kept.slot: kept for kept in ended}.get(slot) if ended else None
        if position:
            assert found is not None and found.client == client and position < len(prompt)
            assert found.ids[:position] == tuple(prompt)[:position]
            known = (len(found.ids), found.snapshot)
            assert KINDS[kind].allows(position, found.furthest, known) and choice.furthest == found.furthest
            assert choice.snapshot == (found.snapshot if found.snapshot <= position else 0)
        common = 0 if found is None else _common(found.ids, tuple(prompt))
        if found is not None and not (position and (2 * common >= len(found.ids) or common >= len(prompt) - 1)):
            assert found is ended[0], "another was left longer ago"
            assert len(running) + len(ended) == slots, "a slot was empty"
        ended = [kept for kept in ended if kept.slot != slot]
        if stays:
            running.add(slot)
            continue
        ids = (*prompt, *[1] * extra)
        furthest = max(choice.furthest, len(ids))
        snapshot = max(len(prompt) - 2, 0) if kind in ("recurrent", "hybrid") else 0
        left = CachedPrefix(number, client, ids, furthest, True, snapshot)
        idle.keep(slot, left)
        if idle.kept(slot):
            ended.append(Kept(slot, left))
        assert len(ended) <= slots


class Kept:
    def __init__(self, slot: int, left: CachedPrefix) -> None:
        self.slot, self.client, self.ids, self.furthest = slot, left.client, left.ids, left.furthest
        self.snapshot = left.snapshot


def test_another_conversation_with_the_same_beginning_leaves_a_long_one_alone() -> None:
    idle = PrefixCache(2, Reach(True))
    idle.keep(0, CachedPrefix(1, "", tuple(range(50)), 50))
    choice = idle.take((), [*range(10), 99, 98], "")
    assert choice is not None and (choice.slot, choice.position) == (1, 0)
    idle.keep(1, CachedPrefix(2, "", (*range(10), 99, 98, 97), 13))
    again = idle.take((), list(range(8)), "")  # asked once more, word for word: it is the same conversation
    assert again is not None and (again.slot, again.position) in ((0, 7), (1, 7))


def opened(plan: Plan, *parcels: Any) -> list[Any]:
    """What stage 1 sends on after these have come from the source's engine, as frames."""
    for parcel in parcels:
        plan.deployments[1].arrived(1, 1, [parcel])
    frames, plan.wires[1].frames = plan.wires[1].frames, deque()
    return [came for raw in frames for came in from_frame(decode(raw, plan.limits[2]))]


@pytest.mark.parametrize(
    ("slot", "position", "after", "held"),
    [
        (1, 4, 1, 4),  # computed, though it was not asked to be kept
        (1, 5, 1, 4),  # more than is there
        (1, 3, 0, 0),  # of another sequence than the one that left it
        (2, 1, 1, 0),  # of nobody
    ],
)
def test_a_stage_tells_what_it_lacks(slot: int, position: int, after: int, held: int) -> None:
    plan = Plan("full", 3)
    held_slots = plan.deployments[1].rings[1].stages[1].chain[0].slots
    for number in (0, 1):
        opened(plan, Opened(number, number, Sampling()))
        run = in_slot(number, 0, 4)
        assert held_slots.extend(run, 1)
        held_slots.computed(run)
    assert opened(plan, Released(1, 1, keep=3)) == [Released(1, 1, keep=3)]
    assert held_slots.kept(1) == 3
    asked = Opened(7, slot, Sampling(), position, after)
    told = asked if held == position else asked.lacks(1, held)
    assert opened(plan, asked) == [told]
    assert 7 in held_slots and held_slots.kept(1) == (3 if slot != 1 else 0)


def test_a_sequence_whose_release_was_lost_makes_way() -> None:
    plan = Plan("full", 1)
    held_slots = plan.deployments[1].rings[1].stages[1].chain[0].slots
    opened(plan, Opened(0, 0, Sampling()))
    assert held_slots.extend(in_slot(0, 0, 4), 1)
    asked = Opened(7, 0, Sampling())
    assert opened(plan, asked) == [asked]
    assert 0 not in held_slots and 7 in held_slots


@pytest.mark.parametrize(("parcel", "kept"), [
    (Released(0, 0, keep=5), 0),  # more than it took in
    (Released(0, 0, "failed", keep=2), 0),
    (Released(0, 0), 0),
    (Released(0, 0, keep=4), 4),
])  # fmt: skip
def test_what_is_kept(parcel: Released, kept: int) -> None:
    plan = Plan("full", 2)
    opened(plan, Opened(0, 0, Sampling()))
    slots, run = plan.deployments[1].rings[1].stages[1].chain[0].slots, in_slot(0, 0, 4)
    assert slots.extend(run, 1)
    slots.computed(run)
    opened(plan, parcel)
    assert 0 not in slots and slots.kept(0) == kept


def test_a_position_beyond_the_context_is_refused_by_the_decoder() -> None:
    plan = Plan("full", 1)
    plan.deployments[0].rings[1]._pass_on(0, Opened(1, 0, Sampling(), CONTEXT + 1))
    with pytest.raises(FrameRefused, match="context"):
        plan.deliver(0)


def test_a_failure_after_the_end_is_heard() -> None:
    """A stage failed while the source, not knowing it, ended the sequence: nobody is to go on from there."""
    plan = Plan("full", 1)
    source = plan.deployments[0]
    source.submit(Submit(DEPLOYMENT, 1, tuple([1] * 9), 9, (), Sampling()))
    plan.compute(0)
    plan.deliver(0)
    plan.deliver(0)
    plan.compute(1)
    for sender in (1, 1, 2, 2):
        if sender == 2 and plan.waiting(2):
            plan.compute(2)
        plan.deliver(sender)
    plan.shards[1].fails = 1
    plan.compute(0)
    plan.deliver(0)
    plan.compute(1)
    source.cancel(1)
    assert source.feed is not None and source.feed.sequences.kept(0) == 4
    plan.settle()
    assert source.feed.sequences.kept(0) == 0
    for number, fails in ((2, True), (3, False)):  # nor after one that failed while it ran
        plan.shards[1].fails = 3 * fails
        source.submit(Submit(DEPLOYMENT, number, (1, 1, 1, 1), 5, (), Sampling()))
        plan.settle()
        assert (plan.told[-1].finish == "error") is fails
    assert [i for event in plan.told if event.sequence == 3 for i in event.ids] == expected([1] * 4, 5)


def test_going_back_again_and_again_brings_back_nothing_that_slid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)
    plan = Plan("window", 1)
    prompt, reused = [1] * 20, []
    for number in range(1, 10):
        source = plan.deployments[0]
        source.submit(Submit(DEPLOYMENT, number, tuple(prompt), 1, (), Sampling()))
        assert source.feed is not None
        reused.append(source.feed.sequences.reused(number))
        plan.settle()
        assert plan.told[-1].finish == "length" and list(plan.told[-1].ids) == expected(prompt, 1)
        prompt = [*prompt[:-SLACK], number % WORDS]
    assert reused[:3] == [0, 18, 0]
    assert len(set(reused)) > 2


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_a_recurrent_slot_is_taken_up_at_its_end_or_at_the_snapshot_before_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", CONTEXT)  # the window is not to matter here
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 3)
    monkeypatch.setitem(KINDS, "hybrid", Reach(False, CONTEXT, CONTEXT))
    plan, numbers = Plan(kind, 1), itertools.count(1)

    def turn(prompt: list[int], client: str = "anna") -> tuple[int, list[int]]:
        """(tokens reused, the answer)"""
        number, source = next(numbers), plan.deployments[0]
        source.submit(Submit(DEPLOYMENT, number, tuple(prompt), 3, (), Sampling(), client))
        assert source.feed is not None
        reused = source.feed.sequences.reused(number)
        plan.settle()
        said = [token for event in plan.told if event.sequence == number for token in event.ids]
        assert said == expected(prompt, 3)
        return reused, said

    first = [1, 2, 3, 1, 2, 3, 1, 2]
    reused, said = turn(first)
    assert reused == 0 and [shard.snapshots for shard in plan.shards] == [1, 1, 1]
    # The client sends the answer back as it was: all but its last token, which was drawn and not computed, is there.
    second = [*first, *said, 1, 1, 1, 1]
    reused, said = turn(second)
    assert reused == len(first) + 2
    # The template renders the answer in another way: it begins at the snapshot before the prompt's last two tokens.
    third = [*second, (said[0] + 1) % WORDS, 2, 2, 2, 2]
    reused, said = turn(third)
    assert reused == len(second) - 2
    # The prompt itself again, and a prompt whose last tokens differ from it.
    made = plan.shards[0].snapshots
    reused, said = turn(third)
    assert reused == len(third) - 2
    assert turn([*third, *said, 1, 1, 1])[0] == len(third) + 2
    assert plan.shards[0].snapshots == made, "what is new of the prompt is too short for another"
    changed = [*third[:-1], 3]
    assert turn(changed)[0] == len(third) - 2
    # What differs before the snapshot begins afresh, and so does another client, who leaves nothing to the first.
    assert turn([*third[:-4], 3, 3])[0] == 0
    assert turn([*third[:-4], 3, 3, 1], "ben")[0] == 0
    assert turn([*third[:-4], 3, 3, 1, 1])[0] == 0


def test_a_window_that_has_slid_is_not_brought_back_by_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 3)
    plan, prompt = Plan("hybrid", 1), [1, 2, 3] * 4
    source = plan.deployments[0]
    assert source.feed is not None
    for number, text in enumerate((prompt, [*prompt, 0, 0, 0, 0, 0])):
        source.submit(Submit(DEPLOYMENT, number, tuple(text), 4, (), Sampling()))
        assert source.feed.sequences.reused(number) == 0
        plan.settle()
        assert [t for event in plan.told if event.sequence == number for t in event.ids] == expected(text, 4)


def test_questions_that_begin_alike_are_taken_up_where_they_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 3)
    plan, common, reused = Plan("recurrent", 2), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1], []
    source = plan.deployments[0]
    assert source.feed is not None
    for number, question in enumerate(([0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 2, 1, 0], [0, 1, 0, 1])):
        source.submit(Submit(DEPLOYMENT, number, (*common, *question), 2, (), Sampling(), "anna"))
        reused.append(source.feed.sequences.reused(number))
        plan.settle()
        said = [token for event in plan.told if event.sequence == number for token in event.ids]
        assert said == expected([*common, *question], 2)
    # The first ends with a snapshot near its end, the second with one where they part, which all others begin with.
    assert reused == [0, 0, 10, 10, 10]
    for number in (6, 7):  # a prompt that is the beginning of earlier ones: its own last tokens are what will differ
        source.submit(Submit(DEPLOYMENT, number, tuple(common[:9]), 1, (), Sampling(), "anna"))
        assert source.feed.sequences.reused(number) == (0 if number == 6 else 7)
        plan.settle()


@pytest.mark.parametrize("passes", range(4))
def test_a_snapshot_that_not_every_stage_has_made_is_no_place_to_begin(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence is cancelled after the chunk before the snapshot has passed so many stages."""
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 3)
    plan, prompt = Plan("recurrent", 1), [1, 2, 3, 1, 2]
    source = plan.deployments[0]
    source.submit(Submit(DEPLOYMENT, 1, tuple(prompt), 3, (), Sampling()))
    for place in range(passes):
        plan.compute(place)
        while plan.wires[place].frames and (place < passes - 1 or passes == STAGES):
            plan.deliver(place)
    source.cancel(1)
    plan.settle()
    source.submit(Submit(DEPLOYMENT, 2, (*prompt, 3, 3), 3, (), Sampling()))
    assert source.feed is not None
    assert source.feed.sequences.reused(2) == (3 if passes == 3 else 0)
    plan.settle()
    assert [token for event in plan.told if event.sequence == 2 for token in event.ids] == expected([*prompt, 3, 3], 3)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_slot_that_some_stage_went_on_in_has_lost_its_end(ahead: bool) -> None:
    """The sequence is cancelled while its next step waits at the first stage, or was computed there."""
    plan, prompt = Plan("recurrent", 1), [1, 2, 3]
    source = plan.deployments[0]
    source.submit(Submit(DEPLOYMENT, 1, tuple(prompt), 9, (), Sampling()))
    for place in range(STAGES):
        plan.compute(place)
        while plan.wires[place].frames:
            plan.deliver(place)
    if ahead:
        plan.compute(0)
    source.cancel(1)
    plan.settle()
    again = [*prompt, *expected(prompt, 1), 2]
    source.submit(Submit(DEPLOYMENT, 2, tuple(again), 2, (), Sampling()))
    assert source.feed is not None
    assert source.feed.sequences.reused(2) == 0
    plan.settle()
    assert [token for event in plan.told if event.sequence == 2 for token in event.ids] == expected(again, 2)
